//! Kernels for the functions of the model's graphs ([`eqim::ops::function`]), for the CPU. ONNX Runtime runs them instead
//! of the functions' bodies.
//!
//! At one to four rows, the time of a stage is the time to read its weights. A kernel reads each weight once, in order,
//! from the mapped file, or from a copy in large pages of memory if it has read the file often. All its layers, and the
//! norms and activations between them, run in one parallel region.

pub mod block;
pub mod dot;
pub mod flow;
pub mod linear;
mod operators;
mod residence;
mod rows;
pub mod team;

pub(super) use operators::domain;
