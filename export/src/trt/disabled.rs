//! Replacements of the builder's functions for a program that was built without TensorRT.

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

/// A serialized engine, which this build never creates.
pub struct SerializedEngine;

impl SerializedEngine {
    /// Always empty.
    pub fn bytes(&self) -> &[u8] {
        &[]
    }

    /// Always empty.
    pub fn layers(&self) -> &[Layers] {
        &[]
    }
}

/// Always fails.
///
/// # Errors
/// [`Error::run`], always.
pub fn version() -> Result<String> {
    missing()
}

/// Always fails.
///
/// # Errors
/// [`Error::run`], always.
pub fn check_targets(_targets: &[Target]) -> Result<()> {
    missing()
}

/// Always fails.
///
/// # Errors
/// [`Error::run`], always.
pub fn unsupported(_model: &Path) -> Result<Vec<Unsupported>> {
    missing()
}

/// Always fails.
///
/// # Errors
/// [`Error::run`], always.
pub fn compile(
    _model: &Path,
    _profiles: &BTreeMap<String, Profile>,
    _targets: &[Target],
    _watch: impl Fn(&str) + Send + Sync + 'static,
) -> Result<SerializedEngine> {
    missing()
}
