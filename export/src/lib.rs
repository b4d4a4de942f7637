//! From checkpoints to bundles: lowering to ONNX, and checking what was written.

pub mod drift;
pub mod inspect;
pub mod lower;
pub mod onnx;
pub mod quantization;
pub mod trt;
pub mod validate;
pub mod write;
