//! The model and the pictures that equivariance is measured on.

use std::path::Path;

use eqim::engine::Engine;

/// Model, pictures and settings of a measurement.
pub struct Subject<'a> {
    /// Engine of the model.
    pub engine: &'a dyn Engine,
    /// Folder of pictures. Its sub-folders are classes if they have the names of the model's classes, or if their
    /// number is the model's number of classes.
    pub images: &'a Path,
    /// Length in tokens of the images that the model was trained on.
    pub trained: usize,
    /// Number of positions to measure the loss at.
    pub positions: usize,
    /// Seed of the noise.
    pub seed: u64,
}
