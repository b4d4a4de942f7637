//! A structural loss between images that needs no pretrained network.

use candle_core::Tensor;
use eqim::Result;

const SCALES: usize = 4;

/// Difference in edges and areas between a reconstruction and an image, both `[batch, channels, height, width]`, as a
/// scalar.
///
/// The scales are full size, halves, quarters and eighths (means over 2×2 pixels). At each scale, the loss is the mean
/// absolute difference of the steps between neighbouring pixels, in both directions (the gradient difference loss of
/// Mathieu et al., ICLR 2016). From halves on, the mean absolute difference of the pixels is added. The result is the
/// mean over the scales; it is 0 for equal images.
///
/// # Errors
/// If the shapes differ.
pub fn structure(reconstruction: &Tensor, image: &Tensor) -> Result<Tensor> {
    // Everything before the absolute values is linear in the images, so that one difference is enough for all scales.
    let mut difference = (reconstruction - image)?;
    let mut total = edges(&difference)?;
    let mut scales = 1;
    while scales < SCALES && [2, 3].iter().all(|&axis| difference.dims()[axis].is_multiple_of(4)) {
        difference = difference.avg_pool2d(2)?;
        total = (total + (edges(&difference)? + difference.abs()?.mean_all()?)?)?;
        scales += 1;
    }
    Ok((total / scales as f64)?)
}

/// Mean absolute step between neighbouring pixels, summed over both directions.
fn edges(x: &Tensor) -> Result<Tensor> {
    let steps = |axis: usize| -> Result<Tensor> {
        let length = x.dim(axis)? - 1;
        Ok((x.narrow(axis, 1, length)? - x.narrow(axis, 0, length)?)?.abs()?.mean_all()?)
    };
    Ok((steps(2)? + steps(3)?)?)
}
