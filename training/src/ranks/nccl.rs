//! The GPUs of all ranks, which exchange values by NCCL without the memory of the machine.

use std::fmt::{self, Debug, Formatter};

use candle_core::cuda_backend::cudarc::nccl::result::NcclError;
use candle_core::cuda_backend::cudarc::nccl::safe::{Comm, Id, ReduceOp};
use candle_core::{CpuStorage, CudaStorage, Device, InplaceOp1, Layout, Tensor, bail};
use eqim::{Error, Result};

use super::mpi::World;

/// The GPUs of all ranks.
pub struct Gpus(Comm);

impl Debug for Gpus {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "GPU {} of {}", self.0.rank(), self.0.world_size())
    }
}

impl Gpus {
    /// Joins the GPU of this rank to those of the others. All ranks call it.
    pub fn join(world: &World, device: &Device) -> Result<Self> {
        let failed = |error: NcclError| Error::run("NCCL", format!("cannot join the GPUs: {error:?}"));
        // NCCL finds the ranks by an identifier, which the first one draws.
        let mut id = match world.rank() {
            0 => Id::new().map_err(failed)?.internal().map(|byte| byte as u8),
            _ => [0; 128],
        };
        world.broadcast(0, &mut id);
        let stream = device.as_cuda_device()?.cuda_stream();
        let comm = Comm::from_rank(stream, world.rank(), world.size(), Id::uninit(id.map(|byte| byte as _)));
        Ok(Self(comm.map_err(failed)?))
    }

    /// Replaces values by their sums over all ranks.
    pub fn sum(&self, values: &Tensor) -> Result<()> {
        Ok(values.inplace_op1(&Exchange { comm: &self.0, owner: None })?)
    }

    /// Replaces values by those of the rank `owner`.
    pub fn broadcast(&self, owner: usize, values: &Tensor) -> Result<()> {
        Ok(values.inplace_op1(&Exchange { comm: &self.0, owner: Some(owner) })?)
    }
}

/// Replaces values by those of a rank, or by the sums over all ranks.
struct Exchange<'a> {
    comm: &'a Comm,
    owner: Option<usize>,
}

impl InplaceOp1 for Exchange<'_> {
    fn name(&self) -> &'static str {
        "exchange between GPUs"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        bail!("expected a tensor on a GPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        let values = storage.as_cuda_slice_mut::<f32>()?;
        if layout.contiguous_offsets() != Some((0, values.len())) {
            bail!("expected a tensor that fills its memory");
        }
        let done = match self.owner {
            Some(owner) => self.comm.broadcast_in_place(values, owner as i32),
            None => self.comm.all_reduce_in_place(values, &ReduceOp::Sum),
        };
        match done {
            Ok(_) => Ok(()),
            Err(error) => bail!("NCCL: {error:?}"),
        }
    }
}
