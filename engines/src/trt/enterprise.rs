//! Ordinary TensorRT, which builds for the GPU of the machine that it runs on.

use eqim::{Error, Result};
use trtx::BuilderConfig;

use super::Target;

/// Name of the library, for people and sidecars.
pub const NAME: &str = "TensorRT";
/// File name of the library.
pub const LIBRARY: &str = "libnvinfer.so.11";
/// File name of its ONNX parser.
pub const PARSER: &str = "libnvonnxparser.so.11";

/// Every target is taken: it has to be the GPU of this machine, which the runtime checks.
///
/// # Errors
/// None.
pub fn check_target(_target: Target) -> Result<()> {
    Ok(())
}

/// Checks that one target is asked for.
///
/// # Errors
/// [`Error::Input`] for several.
pub fn set_targets(_config: &mut BuilderConfig, targets: &[Target]) -> Result<()> {
    match targets {
        [_] => Ok(()),
        _ => Err(Error::input("--target", "names several GPUs: ordinary TensorRT builds for the one of this machine")),
    }
}
