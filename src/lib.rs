//! Equivariant Image Modeling (Dong et al., 2025, arXiv 2503.18948): the model, its checkpoints and its generation loop.
//!
//! The model is written once, in [`model`], over the primitives of [`ops::Ops`]. What runs it, counts it or lowers it
//! to ONNX is an interpreter of those primitives. [`generate`] drives any [`engine::Engine`] token by token.

pub mod animation;
pub mod batch;
pub mod candle;
pub mod canvas;
pub mod checkpoint;
pub mod condition;
pub mod config;
pub mod engine;
mod error;
pub mod files;
pub mod generate;
pub mod model;
pub mod ops;
pub mod picture;
pub mod random;
pub mod solver;
pub mod tensors;
pub mod tiles;
pub mod weights;

pub use config::Config;
pub use error::{Error, Result};
