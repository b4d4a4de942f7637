//! Exports checkpoints to bundles: lowers the model to ONNX and validates the result.
//!
//! ```
//! use eqim::bundle::Precision;
//! use eqim_export::lower::NEWEST_OPSET;
//! use eqim_export::write::{Options, draft};
//! # use std::path::Path;
//!
//! let (config, weights) = eqim::checkpoint::load_safetensors(Path::new("../assets/demo/model.safetensors"))?;
//! # let folder = tempfile::tempdir().expect("a folder");
//! # let output = folder.path().join("bundle");
//! let options = Options { precision: Precision::Fp16, opset: NEWEST_OPSET, policy: None, functions: true };
//! // Nothing is written to `output` until the draft is published. The draft can be validated before that.
//! let draft = draft(&output, &config, &weights, options, |file| println!("writing {file}"))?;
//! let bundle = draft.publish()?;
//! assert_eq!(bundle.manifest.graphs.len(), 5);
//! # Ok::<(), eqim::Error>(())
//! ```

pub mod drift;
pub mod features;
pub mod inspect;
pub mod lower;
pub mod onnx;
pub mod quantization;
pub mod trt;
pub mod validate;
pub mod write;
