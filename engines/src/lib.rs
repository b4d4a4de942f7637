//! The engines that run bundles: ONNX Runtime, TensorRT, and the choice among them.

pub mod native;
pub mod onnxruntime;
mod open;
pub mod trt;

pub use open::{Backend, Options, open};
