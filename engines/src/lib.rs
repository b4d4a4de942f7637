//! Bundles, the engines that run them, and what the command lines share.

pub mod bench;
pub mod bundle;
pub mod chart;
pub mod cli;
pub mod memory;
pub mod native;
pub mod onnxruntime;
mod open;
pub mod run;
pub mod trt;

pub use open::{Backend, Options, open};
