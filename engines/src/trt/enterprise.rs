//! Ordinary TensorRT, which builds for the GPU of the machine that it runs on.

use std::path::Path;

use eqim::{Error, Result};
use trtx::{BuilderConfig, CudaEngine, ExecutionContext};

use super::Target;

/// Name of the library, in messages and sidecars.
pub const NAME: &str = "TensorRT";
/// File name of the library.
pub const LIBRARY: &str = "libnvinfer.so.11";
/// File name of its ONNX parser.
pub const PARSER: &str = "libnvonnxparser.so.11";

/// Checks that one target is asked for: it has to be the GPU of this machine, which the runtime checks.
///
/// # Errors
/// [`Error::input`] for several.
pub fn check_targets(targets: &[Target]) -> Result<()> {
    match targets {
        [_] => Ok(()),
        _ => Err(Error::setting(
            "target",
            "names several GPUs, expected one: ordinary TensorRT builds for the GPU of this machine",
        )),
    }
}

/// Nothing to ask for: the builder knows its GPU.
///
/// # Errors
/// None.
pub fn set_targets(_config: &mut BuilderConfig, _targets: &[Target]) -> Result<()> {
    Ok(())
}

/// Ordinary TensorRT compiles everything when it builds: there is nothing to keep.
pub enum Cache {}

/// A context that runs an engine.
///
/// # Errors
/// TensorRT's; for CUDA graphs, which TensorRT for RTX alone captures by itself.
pub fn execution(
    engine: &mut CudaEngine<'static>,
    _cache_file: &Path,
    cuda_graph: bool,
) -> trtx::Result<(ExecutionContext<'static>, Option<Cache>)> {
    if cuda_graph {
        let problem = "CUDA graphs are for TensorRT for RTX: ordinary TensorRT does not capture graphs by itself";
        return Err(trtx::Error::InvalidArgument(problem.into()));
    }
    Ok((engine.create_execution_context()?, None))
}

/// Never called.
///
/// # Errors
/// None.
pub fn serialized(cache: &Cache) -> trtx::Result<Vec<u8>> {
    match *cache {}
}
