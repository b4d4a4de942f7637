//! Training of the tokenizer and the generator with Candle, on folders of photographs.
//!
//! ```
//! use eqim_training::recipe::{Base, Recipe};
//!
//! // A preset with one key changed by a TOML file.
//! # let folder = tempfile::tempdir().expect("a folder");
//! # let path = folder.path().join("recipe.toml");
//! std::fs::write(&path, "[generator]\nlabel_drop_prob = 0.2\n").expect("a file");
//! let recipe = Recipe::read(Base::Demo, &path)?;
//! assert_eq!(recipe.generator.label_drop_prob, 0.2);
//! assert_eq!(recipe.tokenizer, Recipe::new(Base::Demo).tokenizer);
//! # Ok::<(), eqim::Error>(())
//! ```

pub mod adamw;
pub mod curve;
pub mod data;
pub mod dino;
pub mod discriminator;
pub mod efficientnet;
pub mod evaluation;
pub mod generator;
pub mod initial;
pub mod latents;
pub mod learner;
pub mod lpips;
pub mod metrics;
pub mod perceptual;
pub mod photos;
pub mod random;
pub mod ranks;
pub mod recipe;
mod resize;
pub mod run;
pub mod semantic;
pub mod shards;
pub mod start;
pub mod structure;
pub mod tokenizer;
