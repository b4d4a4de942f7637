//! What TensorRT for RTX has that ordinary TensorRT has not.

use eqim::{Error, Result};
use trtx::BuilderConfig;
use trtx::builder::ComputeCapability;

use super::Target;

/// Name of the library, for people and sidecars.
pub const NAME: &str = "TensorRT-RTX";
/// File name of the library.
pub const LIBRARY: &str = "libtensorrt_rtx.so.1";
/// File name of its ONNX parser.
pub const PARSER: &str = "libtensorrt_onnxparser_rtx.so.1";

/// Checks that this library builds for a target.
///
/// # Errors
/// [`Error::Input`] with the reason.
pub fn check_target(target: Target) -> Result<()> {
    capability(target).map(|_| ())
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
                 eqim-export with --features eqim-export/tensorrt-enterprise, which uses ordinary TensorRT"
            );
            return Err(Error::input("--target", problem));
        }
    })
}

/// Asks a builder for an engine that runs on all of `targets`.
///
/// # Errors
/// [`Error::Input`] for a target that this library does not know.
pub fn set_targets(config: &mut BuilderConfig, targets: &[Target]) -> Result<()> {
    let failed = |error: trtx::Error| Error::run("TensorRT", error);
    config.set_nb_compute_capabilities(targets.len() as i32).map_err(failed)?;
    for (index, target) in targets.iter().enumerate() {
        config.set_compute_capability(capability(*target)?, index as i32).map_err(failed)?;
    }
    Ok(())
}
