//! Equivariant Image Modeling (Dong et al., 2025, arXiv 2503.18948): the model, its checkpoints and its generation
//! loop.
//!
//! The model is written once, in [`model`], over the primitives of [`ops::Ops`]. An interpreter of these primitives
//! runs the model, computes its cost or lowers it to ONNX. [`generate`] generates images with any [`engine::Engine`],
//! token by token.
//!
//! Comments call the PyTorch code (<https://github.com/drx-code/EquivariantModeling>) the reference.
//!
//! ```
//! use eqim::engine::{Engine, candle::CandleEngine};
//! use eqim::generate::generate;
//! use eqim::request::{Noise, Request};
//! # use std::path::Path;
//!
//! let (config, weights) = eqim::checkpoint::load_safetensors(Path::new("assets/demo/model.safetensors"))?;
//! let engine = CandleEngine::new(config, weights);
//!
//! // Two tokens of class 3, from the noise of torch.manual_seed(7), in 4 steps of Euler's method.
//! let request = Request { steps: 4, noise: Noise::Seed(7), ..Request::new(engine.config(), [Some(3)], 2) };
//! let generated = generate(&engine, &request, |_| {})?;
//! let image = engine.decode_tokens(generated.tokens.view())?;
//! assert_eq!(image.dim(), (1, 3, 256, 32)); // batch, channels, height, width
//! # Ok::<(), eqim::Error>(())
//! ```

pub mod bundle;
pub mod checkpoint;
pub mod close;
pub mod config;
pub mod digest;
pub mod efficientnet;
pub mod engine;
mod error;
pub mod files;
pub mod generate;
pub mod kind;
pub mod limits;
pub mod lock;
pub mod long;
pub mod model;
pub mod ops;
pub mod picture;
pub mod request;
pub mod temporary;
pub mod weights;

pub use config::Config;
pub use error::{Error, Result, ResultExt};
