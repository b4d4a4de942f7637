//! The processes that share a training, its ranks. MPI starts them (`mpirun -n 4 eqim-train …`), and each takes its share of
//! the batches.

use std::cell::Cell;
#[cfg(feature = "nccl")]
use std::cell::OnceCell;
use std::ops::Range;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use eqim::{Error, Result};

#[cfg_attr(not(feature = "mpi"), path = "ranks/none.rs")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod watchdog;

use mpi::World;
use watchdog::Watchdog;

/// All ranks of a training, as one of them sees them.
#[derive(Debug)]
pub struct Ranks {
    rank: usize,
    size: usize,
    local: usize,
    /// Seconds within which every rank answers.
    timeout: Cell<u64>,
    others: Option<Others>,
}

/// How a rank reaches the others.
#[derive(Debug)]
struct Others {
    world: World,
    watchdog: Watchdog,
    /// The GPUs of all ranks, if there are any.
    #[cfg(feature = "nccl")]
    gpus: OnceCell<nccl::Gpus>,
}

/// Seconds within which every rank answers until the recipe is known.
const FIRST_TIMEOUT: u64 = 600;
/// How much longer the other ranks wait than the first, which knows the rank that does not answer.
const GRACE: Duration = Duration::from_secs(5);
/// Variables in which launchers tell a process the number of ranks: `mpirun` of Open MPI and of MPICH, and `srun`.
const SIZES: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];

impl Ranks {
    /// A training of one process.
    pub fn alone() -> Self {
        Self { rank: 0, size: 1, local: 0, timeout: Cell::new(FIRST_TIMEOUT), others: None }
    }

    /// Joins the ranks that a launcher of MPI started. Without one, the process is alone.
    ///
    /// # Errors
    /// [`Error::input`] if a launcher started several processes, but this build is without MPI or its MPI does not find them.
    pub fn join() -> Result<Self> {
        let size = |name| std::env::var(name).ok().and_then(|size| size.parse::<usize>().ok());
        let Some(started) = SIZES.into_iter().find_map(size).filter(|size| *size > 1) else { return Ok(Self::alone()) };
        let bad = |problem: String| Error::input(format!("{started} processes"), problem);
        let world = World::join().map_err(bad)?;
        let (rank, size, local) = (world.rank(), world.size(), world.local());
        if size != started {
            let advice = "start them with mpirun of the MPI of this build, or with srun --mpi=pmix";
            return Err(bad(format!("were started, but MPI finds {size}: {advice}")));
        }
        let name = format!("rank {rank} of {size}");
        let watchdog = Watchdog::start(name)?;
        let others = Others {
            world,
            watchdog,
            #[cfg(feature = "nccl")]
            gpus: OnceCell::new(),
        };
        let others = Some(others);
        Ok(Self { rank, size, local, timeout: Cell::new(FIRST_TIMEOUT), others })
    }

    /// Number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Number of this rank among the ranks of the same machine, from 0.
    pub fn local(&self) -> usize {
        self.local
    }

    /// Whether this is the first rank, which writes the files.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// Sets the seconds within which every rank has to answer.
    pub fn set_timeout(&self, seconds: u64) {
        self.timeout.set(seconds);
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout.get())
    }

    /// The part of `count` things that is this rank's. The parts are contiguous, in the order of the ranks.
    pub fn share(&self, count: usize) -> Range<usize> {
        self.rank * count / self.size..(self.rank + 1) * count / self.size
    }

    /// Waits until all ranks have called this.
    ///
    /// # Errors
    /// [`Error::run`] naming a rank that did not call it in time.
    pub fn meet(&self) -> Result<()> {
        let Some(Others { world, .. }) = &self.others else { return Ok(()) };
        let until = |deadline: Instant, rank: usize| {
            while !world.has_called(rank) {
                if Instant::now() > deadline {
                    let seconds = self.timeout().as_secs();
                    let problem = format!(
                        "did not answer within {seconds} s: it hangs, or plan.timeout is too short for its work"
                    );
                    return Err(Error::run(format!("rank {rank}"), problem));
                }
                std::thread::sleep(Duration::from_micros(20));
            }
            Ok(())
        };
        let deadline = Instant::now() + self.timeout();
        match self.rank {
            0 => {
                (1..self.size).try_for_each(|rank| until(deadline, rank))?;
                (1..self.size).for_each(|rank| world.call(rank));
                Ok(())
            }
            _ => {
                world.call(0);
                until(deadline + GRACE, 0)
            }
        }
    }

    /// Checks that all ranks have the same `text`.
    ///
    /// # Errors
    /// [`Error::input`] naming the first line in which the text differs from that of the first rank; [`Error::run`] if a rank
    /// does not answer.
    pub fn agree(&self, subject: &str, text: &str) -> Result<()> {
        if self.others.is_none() {
            return Ok(());
        }
        self.meet()?;
        let mut length = [text.len() as u64];
        self.exchange(|world| world.broadcast(0, &mut length));
        let mut first = text.as_bytes().to_vec();
        first.resize(length[0] as usize, 0);
        self.exchange(|world| world.broadcast(0, &mut first));
        if let Some((theirs, own)) = difference(&String::from_utf8_lossy(&first), text) {
            let advice = "start all ranks with the same program, recipe and files";
            return Err(Error::input(subject, format!("rank 0 has `{theirs}`, this rank has `{own}`: {advice}")));
        }
        // No rank goes on while another has found a difference.
        self.meet()
    }

    /// The sums of `values [count]` over all ranks. On a CPU, and if the number of ranks is a power of two, the first half of
    /// the ranks is summed, the second half, and then both. GPUs sum by NCCL, if this build has it.
    ///
    /// # Errors
    /// If NCCL or a Candle operation fails.
    pub fn sum(&self, values: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "nccl")]
        if values.device().is_cuda() {
            return self.on_gpus(values, nccl::Gpus::sum);
        }
        let mut summed = values.to_vec1()?;
        self.exchange(|world| match self.size.is_power_of_two() {
            true => self.sum_in_pairs(world, &mut summed),
            false => world.sum(&mut summed),
        });
        Ok(Tensor::from_vec(summed, values.shape(), values.device())?)
    }

    /// Sums with the rank 1 away, then with the one 2 away, then 4, and so on. Each time a rank keeps the sums of one half of
    /// its values. Then all parts go back the same way (recursive halving and doubling: Thakur et al., IJHPCA 2005).
    fn sum_in_pairs(&self, world: &World, values: &mut [f32]) {
        let (mut whole, mut levels) = (0..values.len(), vec![]);
        for distance in (0..self.size.ilog2()).map(|level| 1 << level) {
            let middle = whole.start + whole.len() / 2;
            let (lower, upper) = (whole.start..middle, middle..whole.end);
            let (own, other) = if self.rank & distance == 0 { (lower, upper) } else { (upper, lower) };
            let mut received = vec![0.0; own.len()];
            world.swap(self.rank ^ distance, &values[other.clone()], &mut received);
            // Addition is commutative: which of the two is first does not matter.
            values[own.clone()].iter_mut().zip(received).for_each(|(value, more)| *value += more);
            levels.push((distance, own.clone(), other));
            whole = own;
        }
        for (distance, own, other) in levels.into_iter().rev() {
            let mut received = vec![0.0; other.len()];
            world.swap(self.rank ^ distance, &values[own], &mut received);
            values[other].copy_from_slice(&received);
        }
    }

    /// Replaces the values by their sums over all ranks.
    pub fn sum_doubles(&self, values: &mut [f64]) {
        self.exchange(|world| world.sum(values));
    }

    /// The `values [count]` of the rank `owner`.
    ///
    /// # Errors
    /// If NCCL or a Candle operation fails.
    pub fn broadcast(&self, owner: usize, values: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "nccl")]
        if values.device().is_cuda() {
            return self.on_gpus(values, |gpus, values| gpus.broadcast(owner, values));
        }
        let mut shared = values.to_vec1::<f32>()?;
        self.exchange(|world| world.broadcast(owner, &mut shared));
        Ok(Tensor::from_vec(shared, values.shape(), values.device())?)
    }

    /// What `work` makes of a copy of the values, with the GPUs of all ranks. The first call joins the GPU of `values` to them.
    #[cfg(feature = "nccl")]
    fn on_gpus(&self, values: &Tensor, work: impl FnOnce(&nccl::Gpus, &Tensor) -> Result<()>) -> Result<Tensor> {
        let values = values.copy()?;
        let Some(others) = &self.others else { return Ok(values) };
        self.watched(others, |Others { world, gpus, .. }| {
            if gpus.get().is_none() {
                let _ = gpus.set(nccl::Gpus::join(world, values.device())?);
            }
            gpus.get().map_or(Ok(()), |gpus| work(gpus, &values))?;
            values.device().synchronize()?;
            Ok(values)
        })
    }

    /// Replaces the values on the first rank by those of the rank `owner`.
    pub fn send_to_first(&self, owner: usize, values: &mut [f32]) {
        self.exchange(|world| match self.rank {
            0 if owner != 0 => world.receive(owner, values),
            rank if rank == owner && owner != 0 => world.send(0, values),
            _ => {}
        });
    }

    /// Ends all ranks, this one with the exit code `code`. Does nothing if the process is alone.
    pub fn abort(&self, code: u8) {
        if let Some(Others { world, .. }) = &self.others {
            world.abort(code);
        }
    }

    fn exchange(&self, work: impl FnOnce(&World)) {
        if let Some(others) = &self.others {
            self.watched(others, |others| work(&others.world));
        }
    }

    /// Does work that waits for the other ranks. The watchdog ends the process if they do not answer.
    fn watched<T>(&self, others: &Others, work: impl FnOnce(&Others) -> T) -> T {
        others.watchdog.set(self.timeout() + GRACE);
        let done = work(others);
        others.watchdog.unset();
        done
    }
}

/// The first line in which two texts differ. A line that is missing is empty.
pub fn difference<'a>(first: &'a str, second: &'a str) -> Option<(&'a str, &'a str)> {
    let (mut first, mut second) = (first.lines(), second.lines());
    loop {
        match (first.next(), second.next()) {
            (None, None) => return None,
            (one, other) if one == other => {}
            (one, other) => return Some((one.unwrap_or_default(), other.unwrap_or_default())),
        }
    }
}
