//! Training in Candle: the tokenizer and the generator from folders of photographs.

pub mod curve;
pub mod data;
pub mod dino;
pub mod discriminator;
pub mod generator;
pub mod initial;
pub mod latents;
pub mod learner;
pub mod metrics;
pub mod perceptual;
pub mod recipe;
pub mod run;
pub mod structure;
pub mod tokenizer;
