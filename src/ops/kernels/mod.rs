//! Kernels for the operators that take most of the training time. On the CPU, `f32` tensors use the fused,
//! multithreaded operators of this module, which have gradients. All other tensors use Candle's operators.
//!
//! Results on the CPU do not depend on the number of threads, so a resumed training continues bit for bit.

mod conv;
mod depthwise;
mod layer_norm;
mod linear;
mod modulate;
mod norm;
mod pad;
mod pointwise;
pub mod portable;
mod softmax;
pub mod storage;
mod unfold;

use conv::Conv3x3;
use depthwise::Depthwise;
use layer_norm::LayerNorm;
use linear::Linear;
use modulate::Modulate;
use norm::GroupNorm;
use pad::PadReflect;
pub use pointwise::exp;
use pointwise::{Clamp, Gelu, Pointwise, Silu};
use softmax::Softmax;
use unfold::Unfold;

use candle_core::{D, DType, Result, Tensor};

/// Whether the operators of this module support a tensor.
fn ours(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// x · sigmoid(x).
///
/// # Errors
/// If Candle fails.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if ours(x) { x.contiguous()?.apply_op1(Pointwise(Silu)) } else { x.silu() }
}

/// Exact GELU, x · (1 + erf(x / √2)) / 2.
///
/// # Errors
/// If Candle fails.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if ours(x) { x.contiguous()?.apply_op1(Pointwise(Gelu)) } else { x.gelu_erf() }
}

/// Softmax over the last axis of `x` (ONNX `Softmax`).
///
/// # Errors
/// If Candle fails.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    if ours(x) { x.contiguous()?.apply_op1(Softmax) } else { portable::softmax(x) }
}

/// x · (1 + scale) + shift, for `x`, `shift` and `scale` of `[rows, width]`.
///
/// # Errors
/// If Candle fails.
pub fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    if are_rows([x, shift, scale]) {
        return x.apply_op3(scale, shift, Modulate { offset: 1.0 });
    }
    portable::modulate(x, shift, scale)
}

/// x + gate · y, for `x`, `gate` and `y` of `[rows, width]`.
///
/// # Errors
/// If Candle fails.
pub fn gated_residual(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    if are_rows([x, gate, y]) {
        return y.apply_op3(gate, x, Modulate { offset: 0.0 });
    }
    portable::gated_residual(x, gate, y)
}

/// Whether [`Modulate`] supports these tensors: matrices of one shape, whose rows may lie apart.
fn are_rows(tensors: [&Tensor; 3]) -> bool {
    let supported = |x: &Tensor| ours(x) && x.rank() == 2 && x.dims() == tensors[0].dims() && x.stride()[1] == 1;
    tensors.into_iter().all(supported)
}

/// Limits `x` to `low..=high`. A value that is not a number stays one.
///
/// # Errors
/// If Candle fails.
pub fn clamp(x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
    if ours(x) { x.contiguous()?.apply_op1(Pointwise(Clamp { low, high })) } else { x.clamp(low, high) }
}

/// Normalization of `x [batch, channels, …]` over groups of channels, with `weight` and `bias` `[channels]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize, eps: f32) -> Result<Tensor> {
    if ours(x) {
        return x.contiguous()?.apply_op3(weight, bias, GroupNorm { groups, eps });
    }
    portable::group_norm(x, weight, bias, groups, eps)
}

/// Normalization of the rows of `x [rows, width]`, with `affine`, a weight and a bias `[width]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn layer_norm(x: &Tensor, affine: Option<(&Tensor, &Tensor)>, eps: f32) -> Result<Tensor> {
    if !ours(x) {
        return portable::layer_norm(x, affine, eps);
    }
    let width = x.dim(D::Minus1)?;
    let (weight, bias) = match affine {
        Some((weight, bias)) => (weight.contiguous()?, bias.contiguous()?),
        None => (Tensor::ones(width, DType::F32, x.device())?, Tensor::zeros(width, DType::F32, x.device())?),
    };
    if weight.dims() != [width] || bias.dims() != [width] {
        candle_core::bail!("a weight of {:?} and a bias of {:?} do not fit {:?}", weight.dims(), bias.dims(), x.dims());
    }
    x.contiguous()?.apply_op3(&weight, &bias, LayerNorm { eps })
}

/// `x [rows, input]` times the transposed `weight [output, input]`, plus `bias [output]`. The bias is of `f32`, and so is the
/// result; `x` and the weight may be of another type.
///
/// # Errors
/// If the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    if !ours(x) {
        return x.matmul(&weight.t()?)?.to_dtype(DType::F32)?.broadcast_add(bias);
    }
    let ((_, input), (output, of_input)) = (x.dims2()?, weight.dims2()?);
    if of_input != input || bias.dims() != [output] {
        candle_core::bail!("a weight of {:?} and a bias of {:?} do not fit {:?}", weight.dims(), bias.dims(), x.dims());
    }
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Linear)
}

/// Convolution of `x [batch, input, height+2, width+2]` with `weight [output, input, 3, 3]` and `bias [output]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn conv3x3(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    if ours(x) { x.contiguous()?.apply_op3(weight, bias, Conv3x3) } else { portable::conv2d(x, weight, bias, 1) }
}

/// Convolution of `x [batch, input, height, width]` with `weight [output, input, kernel, kernel]`, `bias [output]` and
/// any stride.
///
/// # Errors
/// If the shapes do not fit.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize) -> Result<Tensor> {
    if !ours(x) {
        return portable::conv2d(x, weight, bias, stride);
    }
    let (batch, input, height, width) = x.dims4()?;
    let (output, of_input, kernel, _) = weight.dims4()?;
    if of_input != input || height.min(width) < kernel {
        candle_core::bail!("a convolution of {:?} does not fit {:?}", weight.dims(), x.dims());
    }
    let unfold = Unfold { kernel, stride };
    let size = (batch, output, unfold.windows(height), unfold.windows(width));
    let windows = x.contiguous()?.apply_op1(unfold)?;
    let y = weight.reshape((1, output, ()))?.broadcast_matmul(&windows)?;
    y.broadcast_add(&bias.reshape((output, 1))?)?.reshape(size)
}

/// Convolution of every channel of `x [batch, channels, height, width]` by itself, with `weight [channels, 1, kernel,
/// kernel]`, `bias [channels]` and any stride.
///
/// # Errors
/// If the shapes do not fit.
pub fn depthwise(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize) -> Result<Tensor> {
    let channels = x.dim(1)?;
    if !ours(x) {
        return portable::depthwise(x, weight, bias, stride);
    }
    let (of_channels, one, kernel, _) = weight.dims4()?;
    if of_channels != channels || one != 1 || x.dim(2)?.min(x.dim(3)?) < kernel {
        candle_core::bail!("a depthwise convolution of {:?} does not fit {:?}", weight.dims(), x.dims());
    }
    x.contiguous()?.apply_op3(weight, bias, Depthwise { stride })
}

/// Pads `x [batch, channels, height, width]` by one mirrored row or column on every side.
///
/// # Errors
/// If the shapes do not fit.
pub fn pad_reflect(x: &Tensor) -> Result<Tensor> {
    if ours(x) { x.contiguous()?.apply_op1(PadReflect) } else { portable::pad_reflect(x) }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    use super::*;
    use crate::close::{largest, largest_difference, values};

    fn random(shape: &[usize]) -> Var {
        Var::from_tensor(&Tensor::randn(0f32, 1f32, shape, &Device::Cpu).unwrap()).unwrap()
    }

    /// Compares values, and gradients in a random direction, of `ours` and `theirs`.
    fn same(
        vars: &[&Var],
        tolerance: f32,
        ours: impl Fn(&[&Tensor]) -> Result<Tensor>,
        theirs: impl Fn(&[&Tensor]) -> Result<Tensor>,
    ) {
        let tensors: Vec<&Tensor> = vars.iter().map(|var| var.as_tensor()).collect();
        let (y, expected) = (ours(&tensors).unwrap(), theirs(&tensors).unwrap());
        close(&y, &expected, tolerance);
        let direction = Tensor::randn(0f32, 1f32, y.shape(), &Device::Cpu).unwrap();
        let gradients = |y: Tensor| (y * &direction).unwrap().sum_all().unwrap().backward().unwrap();
        let (found, expected) = (gradients(y), gradients(expected));
        for var in tensors {
            close(found.get(var).unwrap(), expected.get(var).unwrap(), tolerance);
        }
    }

    fn close(found: &Tensor, expected: &Tensor, tolerance: f32) {
        assert_eq!(found.dims(), expected.dims());
        let [found, expected] = [found, expected].map(|tensor| values(tensor).unwrap());
        let (difference, scale) = (largest_difference(&found, &expected), largest(&expected).max(1.0));
        assert!(difference <= tolerance * scale, "{difference:e} of {scale:e}");
    }

    #[test]
    fn convolution_is_candles_own() {
        // Widths below and above a vector's length, strips of unequal length, and channels that do not fill a block.
        let sizes = [(2, 3, 5, 19, 33), (1, 4, 8, 8, 16), (2, 1, 1, 1, 1), (1, 7, 3, 17, 7)];
        for (batch, input, output, height, width) in sizes {
            let x = random(&[batch, input, height + 2, width + 2]);
            let (weight, bias) = (random(&[output, input, 3, 3]), random(&[output]));
            let theirs = |t: &[&Tensor]| reference(t, 1, 1);
            same(&[&x, &weight, &bias], 1e-5, |t| conv3x3(t[0], t[1], t[2]), theirs);
        }
    }

    #[test]
    fn layer_norm_is_candles_own() {
        for (rows, width) in [(1, 1), (3, 17), (130, 40), (64, 368)] {
            let (x, weight, bias) = (random(&[rows, width]), random(&[width]), random(&[width]));
            let ours = |t: &[&Tensor]| layer_norm(t[0], Some((t[1], t[2])), 1e-3);
            same(&[&x, &weight, &bias], 1e-5, ours, |t| portable::layer_norm(t[0], Some((t[1], t[2])), 1e-3));
            same(&[&x], 1e-5, |t| layer_norm(t[0], None, 1e-3), |t| portable::layer_norm(t[0], None, 1e-3));
        }
        let wrong = layer_norm(&random(&[3, 4]), Some((&random(&[3]), &random(&[4]))), 1e-6);
        assert!(wrong.unwrap_err().to_string().contains("do not fit"));
    }

    #[test]
    fn linear_is_candles_own() {
        for (rows, input, output) in [(1, 1, 1), (3, 17, 5), (130, 40, 33), (64, 16, 368)] {
            let (x, weight, bias) = (random(&[rows, input]), random(&[output, input]), random(&[output]));
            let theirs = |t: &[&Tensor]| t[0].matmul(&t[1].t()?)?.broadcast_add(t[2]);
            same(&[&x, &weight, &bias], 1e-5, |t| linear(t[0], t[1], t[2]), theirs);
        }
        let wrong = linear(&random(&[3, 4]), &random(&[5, 3]), &random(&[5]));
        assert!(wrong.unwrap_err().to_string().contains("do not fit"));
    }

    /// A convolution by Candle with stride 1, of which every `stride`-th row and column is taken. Candle's own gradients
    /// know no groups, and a stride only for some sizes.
    fn reference(t: &[&Tensor], stride: usize, groups: usize) -> Result<Tensor> {
        let (input, output) = (t[0].dim(1)? / groups, t[1].dim(0)? / groups);
        let group = |group: usize| -> Result<Tensor> {
            let x = t[0].narrow(1, group * input, input)?;
            let (weight, bias) = (t[1].narrow(0, group * output, output)?, t[2].narrow(0, group * output, output)?);
            let mut y = x.contiguous()?.conv2d(&weight, 0, 1, 1, 1)?.broadcast_add(&bias.reshape((1, (), 1, 1))?)?;
            for axis in [2, 3] {
                let taken = Tensor::arange_step(0u32, y.dim(axis)? as u32, stride as u32, y.device())?;
                y = y.index_select(&taken, axis)?;
            }
            Ok(y)
        };
        Tensor::cat(&(0..groups).map(group).collect::<Result<Vec<_>>>()?, 1)
    }

    #[test]
    fn convolution_with_a_stride_is_candles_own() {
        for (batch, input, output, kernel, stride, height, width) in
            [(2, 3, 5, 3, 2, 19, 32), (1, 4, 8, 4, 2, 8, 17), (2, 2, 3, 5, 1, 9, 5), (1, 3, 2, 4, 1, 4, 4)]
        {
            let x = random(&[batch, input, height, width]);
            let (weight, bias) = (random(&[output, input, kernel, kernel]), random(&[output]));
            let theirs = |t: &[&Tensor]| reference(t, stride, 1);
            same(&[&x, &weight, &bias], 1e-5, |t| conv2d(t[0], t[1], t[2], stride), theirs);
            same(&[&x, &weight, &bias], 1e-5, |t| portable::conv2d(t[0], t[1], t[2], stride), theirs);
        }
    }

    #[test]
    fn depthwise_convolution_is_candles_own() {
        for (batch, channels, kernel, stride, height, width) in
            [(2, 3, 3, 1, 19, 32), (1, 4, 3, 2, 8, 17), (2, 5, 5, 2, 11, 40), (1, 1, 5, 3, 9, 8), (1, 2, 3, 1, 3, 3)]
        {
            let x = random(&[batch, channels, height, width]);
            let (weight, bias) = (random(&[channels, 1, kernel, kernel]), random(&[channels]));
            let theirs = |t: &[&Tensor]| reference(t, stride, channels);
            same(&[&x, &weight, &bias], 1e-5, |t| depthwise(t[0], t[1], t[2], stride), theirs);
            same(&[&x, &weight, &bias], 1e-5, |t| portable::depthwise(t[0], t[1], t[2], stride), theirs);
        }
    }

    #[test]
    fn group_norm_is_its_formula() {
        let (groups, eps) = (2, 1e-3);
        let x = Var::from_tensor(&(random(&[3, 6, 5, 7]).as_tensor() + 2.0).unwrap()).unwrap();
        let theirs = |t: &[&Tensor]| portable::group_norm(t[0], t[1], t[2], groups, eps);
        let ours = |t: &[&Tensor]| group_norm(t[0], t[1], t[2], groups, eps);
        same(&[&x, &random(&[6]), &random(&[6])], 1e-5, ours, theirs);
    }

    #[test]
    fn silu_is_its_formula() {
        let x = Tensor::arange(-100f32, 100f32, &Device::Cpu).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        same(&[&x], 1e-6, |t| silu(t[0]), |t| t[0].silu());
    }

    #[test]
    fn gelu_is_candles_own() {
        let x = Tensor::arange(-800f32, 800f32, &Device::Cpu).unwrap();
        let x = Var::from_tensor(&(x * 0.01).unwrap()).unwrap();
        same(&[&x], 1e-6, |t| gelu(t[0]), |t| t[0].gelu_erf());
        let nan = Tensor::new(&[f32::NAN], &Device::Cpu).unwrap();
        assert!(gelu(&nan).unwrap().to_vec1::<f32>().unwrap()[0].is_nan());
    }

    #[test]
    fn softmax_is_its_formula() {
        for shape in [&[1, 1][..], &[3, 17], &[2, 3, 130, 24]] {
            let x = Var::from_tensor(&(random(shape).as_tensor() * 5.0).unwrap()).unwrap();
            same(&[&x], 1e-6, |t| softmax(t[0]), |t| portable::softmax(t[0]));
        }
        let x =
            Tensor::new(&[[f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY], [1.0, f32::NAN, 2.0]], &Device::Cpu).unwrap();
        let y = softmax(&x).unwrap().to_vec2::<f32>().unwrap();
        assert!(y[0] == [0.0, 1.0, 0.0] && y[1].iter().all(|y| y.is_nan()), "{y:?}");
    }

    #[test]
    fn modulations_are_their_formulas() {
        for (rows, width) in [(1, 1), (3, 17), (130, 40)] {
            let (x, modulations) = (random(&[rows, width]), random(&[rows, 3 * width]));
            let part = |t: &Tensor, part: usize| t.narrow(1, part * width, width);
            let theirs = |t: &[&Tensor]| portable::modulate(t[0], &part(t[1], 0)?, &part(t[1], 1)?);
            same(&[&x, &modulations], 1e-6, |t| modulate(t[0], &part(t[1], 0)?, &part(t[1], 1)?), theirs);
            let theirs = |t: &[&Tensor]| portable::gated_residual(&part(t[1], 2)?, &part(t[1], 1)?, t[0]);
            same(&[&x, &modulations], 1e-6, |t| gated_residual(&part(t[1], 2)?, &part(t[1], 1)?, t[0]), theirs);
        }
    }

    #[test]
    fn clamp_is_candles_own() {
        let x = random(&[3, 50]);
        same(&[&x], 0.0, |t| clamp(t[0], -0.5, 0.7), |t| t[0].clamp(-0.5f32, 0.7f32));
        let nan = Tensor::new(&[f32::NAN], &Device::Cpu).unwrap();
        assert!(clamp(&nan, 0.0, 1.0).unwrap().to_vec1::<f32>().unwrap()[0].is_nan());
    }

    #[test]
    fn padding_mirrors() {
        for (height, width) in [(2, 2), (3, 2), (5, 9)] {
            let x = random(&[2, 3, height, width]);
            same(&[&x], 1e-6, |t| pad_reflect(t[0]), |t| portable::pad_reflect(t[0]));
        }
    }
}
