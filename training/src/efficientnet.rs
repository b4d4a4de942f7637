//! EfficientNet-Lite0 with constant weights, on Candle.

use std::path::Path;

use candle_core::{Device, Tensor};
use eqim::checkpoint::has_tensor;
use eqim::efficientnet::{self, ANCHOR, DEPTH};
use eqim::ops::eager::Eager;
use eqim::weights::Weights;
use eqim::{Error, Result};

use crate::resize::{Kernel, resize};

/// EfficientNet-Lite0 with constant weights.
#[derive(Debug)]
pub struct EfficientNet {
    weights: Weights,
}

/// An image is this many times larger than the maps of the last stage.
const REDUCTION: usize = 32;

impl EfficientNet {
    /// Reads the weights to `device`.
    ///
    /// # Errors
    /// Those of [`efficientnet::load`].
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        Ok(Self { weights: efficientnet::load(path)?.to_device(device)? })
    }

    /// Whether a file has weights of this network. If not, it has the tensor `anchor` of the network `other`.
    ///
    /// # Errors
    /// [`Error::input`] if it is neither, or if the file cannot be read.
    pub fn is_in(path: &Path, other: &str, anchor: &str) -> Result<bool> {
        if has_tensor(path, ANCHOR)? {
            return Ok(true);
        }
        if has_tensor(path, anchor)? {
            return Ok(false);
        }
        let problem = format!("is neither EfficientNet-Lite0 (no tensor {ANCHOR}) nor {other} (no tensor {anchor})");
        Err(Error::input(path.display(), problem))
    }

    /// Feature maps of the first `depth` stages for images `[batch, 3, height, width]` in -1..1.
    ///
    /// # Errors
    /// If a Candle operation fails.
    pub fn maps(&self, images: &Tensor, depth: usize) -> Result<Vec<Tensor>> {
        efficientnet::stages(&mut Eager::new(&self.weights), images, depth)
    }

    /// The features before the classifier, `[batch, 1280]`, and the logits, for the map of the last stage.
    ///
    /// # Errors
    /// If a Candle operation fails.
    pub fn head(&self, map: &Tensor) -> Result<(Tensor, Tensor)> {
        efficientnet::head(&mut Eager::new(&self.weights), map)
    }

    /// Width of the [last features](EfficientNet::last_features).
    pub fn width(&self) -> usize {
        efficientnet::channels(DEPTH - 1)
    }

    /// Features `[batch, width, rows, columns]` of the last stage for images `[batch, 3, height, width]` in -1..1, which
    /// are scaled so that the stage has this size.
    ///
    /// # Errors
    /// If a Candle operation fails.
    pub fn last_features(&self, images: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
        let images = resize(images, rows * REDUCTION, columns * REDUCTION, Kernel::PYTORCH)?;
        self.maps(&images, DEPTH)?.pop().ok_or_else(|| Error::run("EfficientNet-Lite0", "has no stages"))
    }
}
