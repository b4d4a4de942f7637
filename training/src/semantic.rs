//! Semantic features of images, which the tokenizer's semantic decoder learns to predict, if a network for them is given.

use std::path::Path;

use candle_core::{Device, Tensor};
use eqim::Result;

use crate::dino::{self, Dino};
use crate::efficientnet::EfficientNet;

/// A network with semantic features.
#[derive(Debug)]
pub enum Semantic {
    /// DINOv2, as in the reference.
    Dino(Dino),
    /// The last stage of EfficientNet-Lite0.
    EfficientNet(EfficientNet),
}

impl Semantic {
    /// Reads the weights of one of the networks to `device`. The names of the tensors say which one it is.
    ///
    /// # Errors
    /// Those of [`EfficientNet::is_in`], [`EfficientNet::open`] and [`Dino::open`].
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        match EfficientNet::is_in(path, "DINOv2", dino::ANCHOR)? {
            true => EfficientNet::open(path, device).map(Self::EfficientNet),
            false => Dino::open(path, device).map(Self::Dino),
        }
    }

    /// Name of the network.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dino(_) => "DINOv2",
            Self::EfficientNet(_) => "EfficientNet-Lite0",
        }
    }

    /// Width of the features.
    pub fn width(&self) -> usize {
        match self {
            Self::Dino(network) => network.width(),
            Self::EfficientNet(network) => network.width(),
        }
    }

    /// Features `[batch, width, rows, columns]` of images `[batch, 3, height, width]` in -1..1.
    ///
    /// # Errors
    /// If the shapes do not match.
    pub fn features(&self, images: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
        match self {
            Self::Dino(network) => network.features(images, rows, columns),
            Self::EfficientNet(network) => network.last_features(images, rows, columns),
        }
    }
}
