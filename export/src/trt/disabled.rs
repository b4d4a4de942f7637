//! This program was built without TensorRT.

use std::collections::BTreeMap;
use std::path::Path;

use eqim::{Error, Result};
use eqim_engines::trt::{Layers, Profile, Target};

use crate::trt::support::Unsupported;

fn missing<T>() -> Result<T> {
    Err(Error::run(
        "TensorRT",
        "this eqim-export was built without it: run `cargo xtask setup`, then build with \
         `cargo build --release --features tensorrt`",
    ))
}

/// Never a plan.
pub struct SerializedEngine;

impl SerializedEngine {
    /// No bytes.
    pub fn bytes(&self) -> &[u8] {
        &[]
    }

    /// No layers.
    pub fn layers(&self) -> &[Layers] {
        &[]
    }
}

/// Always an error.
///
/// # Errors
/// Always.
pub fn version() -> Result<String> {
    missing()
}

/// Always an error.
///
/// # Errors
/// Always.
pub fn check_targets(_targets: &[Target]) -> Result<()> {
    missing()
}

/// Always an error.
///
/// # Errors
/// Always.
pub fn unsupported(_model: &Path) -> Result<Vec<Unsupported>> {
    missing()
}

/// Always an error.
///
/// # Errors
/// Always.
pub fn compile(
    _model: &Path,
    _profiles: &BTreeMap<String, Profile>,
    _targets: &[Target],
    _watch: impl Fn(&str) + Send + Sync + 'static,
) -> Result<SerializedEngine> {
    missing()
}
