//! Networks that make features of images.

use eqim::Result;
use ndarray::{Array2, ArrayView4};

/// Outputs of a network for a batch of images.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// Features, `[batch, width]`.
    pub features: Array2<f32>,
    /// Logits of classes, `[batch, classes]`, if the network has them.
    pub logits: Option<Array2<f32>>,
}

/// A network with an image as its input.
pub trait Network {
    /// Name in messages and reports, such as the file of the network.
    fn name(&self) -> &str;

    /// What identifies the network: features of networks with different identities are not compared.
    fn identity(&self) -> &str;

    /// Height and width of the images that the network takes; `None` if it takes any size.
    fn size(&self) -> Option<(usize, usize)>;

    /// Makes the outputs for images `[batch, 3, height, width]`, red, green and blue from 0 to 255.
    ///
    /// # Errors
    /// [`eqim::Error::run`] if the network fails.
    fn run(&self, images: ArrayView4<f32>) -> Result<Outputs>;
}
