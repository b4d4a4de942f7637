//! Ordinary TensorRT, which builds engines for the GPU of the build machine.

use std::path::Path;

use eqim::{Error, Result};
use trtx::{BuilderConfig, CudaEngine, ExecutionContext};

use super::Target;

/// Name of the library in messages and sidecars.
pub const NAME: &str = "TensorRT";
/// File name of the library.
pub const LIBRARY: &str = "libnvinfer.so.11";
/// File name of the ONNX parser.
pub const PARSER: &str = "libnvonnxparser.so.11";

/// Checks that one target is requested. It must be the GPU of this machine; the runtime checks this.
///
/// # Errors
/// [`Error::setting`] if the number of targets is not one.
pub fn check_targets(targets: &[Target]) -> Result<()> {
    match targets {
        [_] => Ok(()),
        _ => Err(Error::setting(
            "target",
            "names several GPUs, expected one: ordinary TensorRT builds for the GPU of this machine",
        )),
    }
}

/// Does nothing: the builder builds for the GPU of this machine.
///
/// # Errors
/// Never.
pub fn set_targets(_config: &mut BuilderConfig, _targets: &[Target]) -> Result<()> {
    Ok(())
}

/// Type without values. Ordinary TensorRT has no runtime cache, because it compiles all kernels when it builds an
/// engine.
pub enum Cache {}

/// Creates an execution context for an engine.
///
/// # Errors
/// If TensorRT reports an error, or if a CUDA graph is requested: only TensorRT for RTX captures CUDA graphs by itself.
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

/// Never called, because [`Cache`] has no values.
///
/// # Errors
/// Never.
pub fn serialized(cache: &Cache) -> trtx::Result<Vec<u8>> {
    match *cache {}
}
