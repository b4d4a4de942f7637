//! The model and the pictures that equivariance is measured on.

use std::path::Path;

use eqim::engine::Engine;

/// What is measured on.
pub struct Subject<'a> {
    /// The model.
    pub engine: &'a dyn Engine,
    /// A folder of pictures; its folders are classes, where they are as many as the model's or have their names.
    pub images: &'a Path,
    /// Tokens of the images that the model was trained on.
    pub trained: usize,
    /// Positions that the loss is measured at.
    pub positions: usize,
    /// Number that noise is drawn from.
    pub seed: u64,
}
