//! The functions of [`super`] with Candle's own operators, for every device and type.

use candle_core::{D, Result, Tensor};

/// Same as [`super::group_norm`].
///
/// # Errors
/// If the shapes do not fit.
pub fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize, eps: f32) -> Result<Tensor> {
    let mut affine = vec![1; x.rank()];
    affine[1] = x.dim(1)?;
    let grouped = x.reshape((x.dim(0)?, groups, ()))?;
    let centered = grouped.broadcast_sub(&grouped.mean_keepdim(D::Minus1)?)?;
    let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centered.broadcast_div(&(variance + f64::from(eps))?.sqrt()?)?.reshape(x.shape())?;
    normed.broadcast_mul(&weight.reshape(affine.as_slice())?)?.broadcast_add(&bias.reshape(affine.as_slice())?)
}

/// Same as [`super::conv3x3`].
///
/// # Errors
/// If the shapes do not fit.
pub fn conv3x3(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    conv2d(x, weight, bias, 1, 1)
}

/// Same as [`super::conv2d`] for one group, and as [`super::depthwise`] for one group per channel.
///
/// # Errors
/// If the shapes do not fit.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize, groups: usize) -> Result<Tensor> {
    x.contiguous()?.conv2d(weight, 0, stride, 1, groups)?.broadcast_add(&bias.reshape((1, bias.elem_count(), 1, 1))?)
}

/// Same as [`super::pad_reflect`].
///
/// # Errors
/// If the shapes do not fit.
pub fn pad_reflect(x: &Tensor) -> Result<Tensor> {
    let mut x = x.clone();
    for axis in 2..4 {
        let length = x.dim(axis)?;
        x = Tensor::cat(&[&x.narrow(axis, 1, 1)?, &x, &x.narrow(axis, length - 2, 1)?], axis)?;
    }
    Ok(x)
}
