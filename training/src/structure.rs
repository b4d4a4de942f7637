//! A difference of images in structure that needs no pretrained network.

use candle_core::Tensor;
use eqim::Result;

const SCALES: usize = 4;

/// How far a reconstruction's edges and areas are from an image's, both `[batch, channels, height, width]`, as a scalar.
///
/// At full size and at halves, quarters and eighths (means over 2×2 pixels), the mean absolute difference of neighbouring
/// pixels' steps in both directions (the gradient difference loss of Mathieu et al., ICLR 2016) plus, from halves on, that
/// of the pixels themselves; the mean over the scales. Nothing for equal images.
///
/// # Errors
/// When the shapes differ.
pub fn structure(reconstruction: &Tensor, image: &Tensor) -> Result<Tensor> {
    // All of it is linear in the images up to the absolute value, so one difference serves every scale.
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

/// Mean absolute step between neighbours, in both directions together.
fn edges(x: &Tensor) -> Result<Tensor> {
    let steps = |axis: usize| -> Result<Tensor> {
        let length = x.dim(axis)? - 1;
        Ok((x.narrow(axis, 1, length)? - x.narrow(axis, 0, length)?)?.abs()?.mean_all()?)
    };
    Ok((steps(2)? + steps(3)?)?)
}
