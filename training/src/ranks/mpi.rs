//! The ranks of MPI.

use std::mem::ManuallyDrop;

use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::datatype::Equivalence;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Destination, Root, Source};

/// The ranks of MPI. Messages from one rank to another arrive in order.
pub struct World {
    world: SimpleCommunicator,
    local: usize,
    /// Ends MPI when it is dropped, for which it waits for all ranks.
    _universe: Universe,
}

impl std::fmt::Debug for World {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "rank {} of {}", self.rank(), self.size())
    }
}

/// Tag of calls.
const CALL: i32 = 1;
/// Tag of values.
const VALUES: i32 = 2;
/// Values per message: MPI counts them as 32-bit integers, and sums need a second buffer.
const CHUNK: usize = 1 << 22;

impl World {
    pub fn join() -> Result<Self, String> {
        let (universe, _) = mpi::initialize_with_threading(Threading::Funneled)
            .ok_or("share a training, but MPI was started before")?;
        let world = universe.world();
        // The communicator of a machine lives as long as the process.
        let machine = ManuallyDrop::new(world.split_shared(world.rank()));
        let local = machine.rank() as usize;
        Ok(Self { world, local, _universe: universe })
    }

    pub fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    pub fn size(&self) -> usize {
        self.world.size() as usize
    }

    pub fn local(&self) -> usize {
        self.local
    }

    /// Sends an empty message.
    pub fn call(&self, rank: usize) {
        self.world.process_at_rank(rank as i32).send_with_tag(&[0u8; 0][..], CALL);
    }

    /// Receives an empty message, if there is one.
    pub fn has_called(&self, rank: usize) -> bool {
        let other = self.world.process_at_rank(rank as i32);
        let has_called = other.immediate_probe_with_tag(CALL).is_some();
        if has_called {
            other.receive_into_with_tag(&mut [0u8; 0][..], CALL);
        }
        has_called
    }

    pub fn sum<T: Equivalence + Copy>(&self, values: &mut [T]) {
        for chunk in values.chunks_mut(CHUNK) {
            let own = chunk.to_vec();
            self.world.all_reduce_into(&own[..], chunk, SystemOperation::sum());
        }
    }

    /// Sends values to a rank, and receives values from it, at most `CHUNK` each.
    pub fn swap(&self, rank: usize, values: &[f32], received: &mut [f32]) {
        let other = self.world.process_at_rank(rank as i32);
        mpi::point_to_point::send_receive_into_with_tags(values, &other, VALUES, received, &other, VALUES);
    }

    pub fn broadcast<T: Equivalence>(&self, owner: usize, values: &mut [T]) {
        let root = self.world.process_at_rank(owner as i32);
        values.chunks_mut(CHUNK).for_each(|chunk| root.broadcast_into(chunk));
    }

    pub fn send(&self, rank: usize, values: &[f32]) {
        let other = self.world.process_at_rank(rank as i32);
        values.chunks(CHUNK).for_each(|chunk| other.send_with_tag(chunk, VALUES));
    }

    pub fn receive(&self, rank: usize, values: &mut [f32]) {
        let other = self.world.process_at_rank(rank as i32);
        for chunk in values.chunks_mut(CHUNK) {
            other.receive_into_with_tag(chunk, VALUES);
        }
    }

    pub fn abort(&self, code: u8) {
        self.world.abort(code.into());
    }
}
