//! The functions of [`super`] with Candle's own operators, for every device and type.

use std::sync::Mutex;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, D, Layout, Result, Shape, Storage, Tensor};

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

/// Same as [`super::layer_norm`].
///
/// # Errors
/// If the shapes do not fit.
pub fn layer_norm(x: &Tensor, affine: Option<(&Tensor, &Tensor)>, eps: f32) -> Result<Tensor> {
    let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centered.broadcast_div(&(variance + f64::from(eps))?.sqrt()?)?;
    let Some((weight, bias)) = affine else { return Ok(normed) };
    normed.broadcast_mul(weight)?.broadcast_add(bias)
}

/// Same as [`super::softmax`].
///
/// # Errors
/// If Candle fails.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let exp = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

/// Same as [`super::modulate`].
///
/// # Errors
/// If the shapes cannot be broadcast.
pub fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    x.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(shift)
}

/// Same as [`super::gated_residual`].
///
/// # Errors
/// If the shapes cannot be broadcast.
pub fn gated_residual(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    x.broadcast_add(&gate.broadcast_mul(y)?)
}

/// Same as [`super::conv2d`].
///
/// # Errors
/// If the shapes do not fit.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize) -> Result<Tensor> {
    let x = x.contiguous()?;
    let y = match x.track_op() || weight.track_op() {
        true => x.apply_op2(weight, Conv2d::new(&x, weight, stride)?)?,
        false => x.conv2d(weight, 0, stride, 1, 1)?,
    };
    y.broadcast_add(&bias.reshape((1, (), 1, 1))?)
}

/// Candle's convolution with the gradients that it lacks: Candle's own know some strides only, and are slow on a GPU.
struct Conv2d {
    stride: usize,
    /// The convolution, until the operator has returned it.
    y: Mutex<Option<Tensor>>,
}

impl Conv2d {
    fn new(x: &Tensor, weight: &Tensor, stride: usize) -> Result<Self> {
        let y = x.detach().conv2d(&weight.detach(), 0, stride, 1, 1)?;
        Ok(Self { stride, y: Mutex::new(Some(y)) })
    }

    fn take(&self) -> Result<Tensor> {
        let y = self.y.lock().map_or(None, |mut y| y.take());
        y.ok_or_else(|| candle_core::Error::msg("a convolution is taken once"))
    }
}

impl CustomOp2 for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = self.take()?;
        match &*y.storage_and_layout().0 {
            Storage::Cpu(values) => Ok((values.clone(), y.shape().clone())),
            _ => candle_core::bail!("a convolution is on another device than its input"),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let y = self.take()?;
        match &*y.storage_and_layout().0 {
            Storage::Cuda(values) => Ok((values.try_clone(y.layout())?, y.shape().clone())),
            _ => candle_core::bail!("a convolution is on another device than its input"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (x, weight, kernel) = (x.detach(), weight.detach(), weight.dim(2)?);
        let gradient = spread(gradient, self.stride)?;
        // Rows and columns that no window reaches.
        let [below, beside] = [2, 3].map(|axis| x.dims()[axis] + 1 - kernel - gradient.dims()[axis]);
        // The transposed convolution: the mirrored kernel is applied to the gradient with a border of zeros.
        let mirrored = weight.flip(&[2, 3])?.transpose(0, 1)?.contiguous()?;
        let border = kernel - 1;
        let bordered =
            gradient.pad_with_zeros(2, border, border + below)?.pad_with_zeros(3, border, border + beside)?;
        let of_x = bordered.conv2d(&mirrored, 0, 1, 1, 1)?;
        // The sum over the images takes the place of that over the channels.
        let read = x.narrow(2, 0, x.dim(2)? - below)?.narrow(3, 0, x.dim(3)? - beside)?;
        let [read, gradient] = [read, gradient].map(|tensor| tensor.transpose(0, 1)?.contiguous());
        let of_weight = read?.conv2d(&gradient?, 0, 1, 1, 1)?.transpose(0, 1)?;
        Ok((Some(of_x), Some(of_weight)))
    }
}

/// Inserts `stride - 1` zeros between the rows and the columns of `x [batch, channels, height, width]`.
fn spread(x: &Tensor, stride: usize) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    let spread = x.reshape((batch, channels, height, 1, width, 1))?;
    let spread = spread.pad_with_zeros(3, 0, stride - 1)?.pad_with_zeros(5, 0, stride - 1)?;
    let spread = spread.reshape((batch, channels, height * stride, width * stride))?;
    spread.narrow(2, 0, (height - 1) * stride + 1)?.narrow(3, 0, (width - 1) * stride + 1)?.contiguous()
}

/// Same as [`super::depthwise`]. Candle's convolution takes one kernel per channel.
///
/// # Errors
/// If the shapes do not fit.
pub fn depthwise(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize) -> Result<Tensor> {
    let channels = x.dim(1)?;
    let kernel = weight.dim(2)?;
    let mut y = bias.reshape((1, channels, 1, 1))?;
    for (tap, window) in taps(x, kernel, stride)?.iter().enumerate() {
        let weight = weight.flatten_from(1)?.narrow(1, tap, 1)?.reshape((1, channels, 1, 1))?;
        y = window.broadcast_mul(&weight)?.broadcast_add(&y)?;
    }
    Ok(y)
}

/// The pixels of `x [batch, channels, height, width]` that each tap of a kernel reads, in the kernel's order:
/// `kernel²` tensors `[batch, channels, rows, columns]`.
fn taps(x: &Tensor, kernel: usize, stride: usize) -> Result<Vec<Tensor>> {
    let (batch, channels, height, width) = x.dims4()?;
    if height.min(width) < kernel {
        candle_core::bail!("a kernel of {kernel} does not fit {:?}", x.dims());
    }
    let [rows, columns] = [height, width].map(|size| (size - kernel) / stride + 1);
    // Row `a · stride + b` of the image is row `a` of part `b`.
    let [above, beside] = [height, width].map(|size| size.div_ceil(stride));
    let x = x.pad_with_zeros(2, 0, above * stride - height)?.pad_with_zeros(3, 0, beside * stride - width)?;
    let parts = x.reshape((batch, channels, above, stride, beside, stride))?;
    let tap = |tap: usize| {
        let (row, column) = (tap / kernel, tap % kernel);
        let part = parts.narrow(3, row % stride, 1)?.narrow(5, column % stride, 1)?;
        let part = part.narrow(2, row / stride, rows)?.narrow(4, column / stride, columns)?;
        part.reshape((batch, channels, rows, columns))
    };
    (0..kernel * kernel).map(tap).collect()
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
