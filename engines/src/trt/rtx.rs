//! What TensorRT for RTX has that ordinary TensorRT has not.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use eqim::{Error, Result};
use trtx::builder::ComputeCapability;
use trtx::{BuilderConfig, CudaEngine, CudaGraphStrategy, ExecutionContext, RuntimeCache};

use super::Target;

/// Name of the library, for people and sidecars.
pub const NAME: &str = "TensorRT-RTX";
/// File name of the library.
pub const LIBRARY: &str = "libtensorrt_rtx.so.1";
/// File name of its ONNX parser.
pub const PARSER: &str = "libtensorrt_onnxparser_rtx.so.1";

/// Checks that this library builds for targets.
///
/// # Errors
/// [`Error::input`] with the reason.
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

/// Asks a builder for an engine that runs on all of `targets`.
///
/// # Errors
/// [`Error::input`] for a target that this library does not know.
pub fn set_targets(config: &mut BuilderConfig, targets: &[Target]) -> Result<()> {
    let failed = |error: trtx::Error| Error::run_caused("TensorRT", error);
    config.set_nb_compute_capabilities(targets.len() as i32).map_err(failed)?;
    for (index, target) in targets.iter().enumerate() {
        config.set_compute_capability(capability(*target)?, index as i32).map_err(failed)?;
    }
    Ok(())
}

/// What TensorRT compiles for the GPU when it first runs.
pub type Cache = Arc<RuntimeCache>;

/// A context that runs an engine, with what was compiled for it before, where that is still of use.
///
/// # Errors
/// TensorRT's.
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

/// The cache as it stands in a file.
///
/// # Errors
/// TensorRT's.
pub fn serialized(cache: &Cache) -> trtx::Result<Vec<u8>> {
    cache.serialize().map(|bytes| bytes.to_vec())
}
