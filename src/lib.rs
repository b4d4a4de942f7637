//! Equivariant Image Modeling (Dong et al., 2025, arXiv 2503.18948): the model, its checkpoints and its generation loop.
//!
//! The model is written once, in [`model`], over the primitives of [`ops::Ops`]. What runs it, counts it or lowers it
//! to ONNX is an interpreter of those primitives. [`generate`] drives any [`engine::Engine`] token by token.

pub mod bundle;
pub mod checkpoint;
pub mod close;
pub mod config;
pub mod digest;
pub mod engine;
mod error;
pub mod files;
pub mod generate;
pub mod model;
pub mod ops;
pub mod picture;
pub mod request;
pub mod weights;

pub use config::Config;
pub use error::{Error, Result, ResultExt};
