//! Engines that run bundles, on ONNX Runtime, TensorRT or Candle, and the selection of one of them.
//!
//! ```no_run
//! use eqim::bundle::Bundle;
//! use eqim_engines::{Backend, Options, open};
//! # use std::path::Path;
//!
//! // A folder that `eqim-export onnx` wrote.
//! let bundle = Bundle::open(Path::new("bundle"))?;
//! let engine = open(&bundle, &Options { backend: Backend::Ort, threads: Some(4), ..Options::default() })?;
//! println!("{} classes on {}", engine.config().generator.class_num, engine.name());
//! # Ok::<(), eqim::Error>(())
//! ```

pub mod native;
pub mod onnxruntime;
mod open;
pub mod pages;
pub mod trt;

pub use open::{Backend, MOST_THREADS, Options, open};
