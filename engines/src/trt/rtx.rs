//! TensorRT for RTX: the parts in which it differs from ordinary TensorRT.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use eqim::{Error, Result};
use trtx::builder::ComputeCapability;
use trtx::{BuilderConfig, CudaEngine, CudaGraphStrategy, ExecutionContext, RuntimeCache};

use super::Target;

/// Name of the library in messages and sidecars.
pub const NAME: &str = "TensorRT-RTX";
/// File name of the library.
pub const LIBRARY: &str = "libtensorrt_rtx.so.1";
/// File name of the ONNX parser.
pub const PARSER: &str = "libtensorrt_onnxparser_rtx.so.1";

/// Checks that this library can build for all targets.
///
/// # Errors
/// [`Error::setting`] if it cannot build for one of them.
pub fn check_targets(targets: &[Target]) -> Result<()> {
    targets.iter().try_for_each(|&target| capability(target).map(|_| ()))
}

fn capability(target: Target) -> Result<ComputeCapability> {
    Ok(match target.capability() {
        75 => ComputeCapability::kSM75,
        80 => ComputeCapability::kSM80,
        86 => ComputeCapability::kSM86,
        89 => ComputeCapability::kSM89,
        120 => ComputeCapability::kSM120,
        121 => ComputeCapability::kSM121,
        _ => {
            let problem = format!(
                "{target} is a datacenter GPU that TensorRT for RTX does not build for: on that GPU, build \
                 eqim-export with --features tensorrt-enterprise, which uses ordinary TensorRT"
            );
            return Err(Error::setting("target", problem));
        }
    })
}

/// Sets the compute capabilities of a builder, so that the engine runs on all of `targets`.
///
/// # Errors
/// [`Error::setting`] if this library cannot build for a target; [`Error::run`] if TensorRT reports an error.
pub fn set_targets(config: &mut BuilderConfig, targets: &[Target]) -> Result<()> {
    let failed = |error: trtx::Error| Error::run_caused("TensorRT", error);
    config.set_nb_compute_capabilities(targets.len() as i32).map_err(failed)?;
    for (index, target) in targets.iter().enumerate() {
        config.set_compute_capability(capability(*target)?, index as i32).map_err(failed)?;
    }
    Ok(())
}

/// Runtime cache: the kernels that TensorRT compiles for the GPU at the first run.
pub type Cache = Arc<RuntimeCache>;

/// Creates an execution context for an engine. It reuses the kernels in `cache_file` if they are of this GPU and
/// version.
///
/// # Errors
/// If TensorRT reports an error.
pub fn execution(
    engine: &mut CudaEngine<'static>,
    cache_file: &Path,
    cuda_graph: bool,
) -> trtx::Result<(ExecutionContext<'static>, Option<Cache>)> {
    let mut config = engine.create_runtime_config()?;
    let cache = config.create_runtime_cache()?;
    if let Ok(bytes) = std::fs::read(cache_file)
        && cache.deserialize(&bytes).is_err()
    {
        tracing::warn!(
            "{} was written on another GPU or by another version, and is written again",
            cache_file.display()
        );
    }
    let cache = Arc::new(cache);
    config.set_runtime_cache(Arc::clone(&cache))?;
    if cuda_graph {
        config.set_cuda_graph_strategy(CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE)?;
    }
    let context = engine.create_execution_context_with_config(Rc::new(config))?;
    Ok((context, Some(cache)))
}

/// Content of a cache file.
///
/// # Errors
/// If TensorRT reports an error.
pub fn serialized(cache: &Cache) -> trtx::Result<Vec<u8>> {
    cache.serialize().map(|bytes| bytes.to_vec())
}
