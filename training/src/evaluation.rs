//! The Fréchet distance to held-out photographs during a training.

use std::path::Path;

use candle_core::{DType, Device};
use eqim::efficientnet;
use eqim::engine::candle;
use eqim::ops::eager::Eager;
use eqim::weights::Weights;
use eqim::{Result, ResultExt};
use eqim_evaluation::frechet::{self, Moments};
use ndarray::{Array2, ArrayView3, Axis, s};
use rayon::prelude::*;

/// EfficientNet-Lite0 on the CPU, for distances between sets of images.
#[derive(Debug)]
pub struct Evaluation {
    weights: Weights,
}

impl Evaluation {
    /// Reads the weights of the network.
    ///
    /// # Errors
    /// Those of [`efficientnet::load`].
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { weights: efficientnet::load(path)? })
    }

    /// The Fréchet distance between the squares of images and those of real images, all `[3, height, width]` in -1..1.
    /// The squares of an image have its whole height and overlap by half.
    ///
    /// # Errors
    /// [`eqim::Error::input`] if there are fewer than two squares; [`eqim::Error::run`] if a feature is not finite.
    pub fn distance(&self, images: &[ArrayView3<f32>], real: &[ArrayView3<f32>]) -> Result<f64> {
        frechet::distance(&self.moments(images)?, &self.moments(real)?)
    }

    fn moments(&self, images: &[ArrayView3<f32>]) -> Result<Moments> {
        let squares: Vec<ArrayView3<f32>> = images.iter().flat_map(squares).collect();
        let features: Vec<f32> =
            squares.into_par_iter().map(|square| self.features(square)).collect::<Result<Vec<Vec<f32>>>>()?.concat();
        let width = efficientnet::description_width();
        let features = Array2::from_shape_vec((features.len() / width, width), features).or_run("features")?;
        Moments::of(features.view())
    }

    fn features(&self, square: ArrayView3<f32>) -> Result<Vec<f32>> {
        let bytes = square.mapv(|value| (value.clamp(-1.0, 1.0) + 1.0) * 127.5);
        let image = candle::to_tensor(bytes.insert_axis(Axis(0)).view())?.to_device(&Device::Cpu)?;
        let features = efficientnet::features(&mut Eager::new(&self.weights), &image)?;
        Ok(features.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }
}

/// The squares of an image that is at least as wide as high.
fn squares<'a>(image: &'a ArrayView3<'a, f32>) -> impl Iterator<Item = ArrayView3<'a, f32>> {
    let (_, height, width) = image.dim();
    let starts = (0..width).step_by((height / 2).max(1)).take_while(move |start| start + height <= width);
    starts.map(move |start| image.slice(s![.., .., start..start + height]))
}
