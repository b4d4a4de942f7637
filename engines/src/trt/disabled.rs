//! Replacement of the TensorRT backend in a program that was built without TensorRT.

use eqim::engine::Engine;
use eqim::model::Stage;
use eqim::{Error, Result};

use super::EngineSet;
use eqim::bundle::Bundle;

const MISSING: &str = "this program was built without TensorRT: build it with `cargo build --release --features \
                       tensorrt`, or choose the backend ort";

/// Returns an error that says how to build with TensorRT.
///
/// # Errors
/// Always.
pub fn ready() -> Result<()> {
    Err(Error::run("TensorRT", MISSING))
}

/// Returns an error that says how to build with TensorRT.
///
/// # Errors
/// Always.
pub fn open(_bundle: &Bundle, _set: &EngineSet, _cuda_graph: bool) -> Result<Box<dyn Engine>> {
    Err(Error::run("TensorRT", MISSING))
}

/// Returns an error that says how to build with TensorRT.
///
/// # Errors
/// Always.
pub fn inspected(_bundle: &Bundle, _set: &EngineSet, _stage: Stage) -> Result<String> {
    Err(Error::run("TensorRT", MISSING))
}
