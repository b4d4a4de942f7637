//! Kernels for the operators that take most of the training time. On the CPU, `f32` tensors use the fused,
//! multithreaded operators of this module, which have gradients. All other tensors use Candle's operators.
//!
//! Results on the CPU do not depend on the number of threads, so a resumed training continues bit for bit.

mod conv;
mod norm;
mod pad;
pub mod portable;
mod silu;
mod storage;

use conv::Conv3x3;
use norm::GroupNorm;
use pad::PadReflect;
use silu::Silu;
pub use silu::exp;

use candle_core::{DType, Result, Tensor};

/// Whether the operators of this module support a tensor.
fn ours(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// x · sigmoid(x).
///
/// # Errors
/// If Candle fails.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if ours(x) { x.contiguous()?.apply_op1(Silu) } else { x.silu() }
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

/// Convolution of `x [batch, input, height+2, width+2]` with `weight [output, input, 3, 3]` and `bias [output]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn conv3x3(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    if ours(x) { x.contiguous()?.apply_op3(weight, bias, Conv3x3) } else { portable::conv3x3(x, weight, bias) }
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
            let theirs = |t: &[&Tensor]| portable::conv3x3(t[0], t[1], t[2]);
            same(&[&x, &weight, &bias], 1e-5, |t| conv3x3(t[0], t[1], t[2]), theirs);
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
    fn padding_mirrors() {
        for (height, width) in [(2, 2), (3, 2), (5, 9)] {
            let x = random(&[2, 3, height, width]);
            same(&[&x], 1e-6, |t| pad_reflect(t[0]), |t| portable::pad_reflect(t[0]));
        }
    }
}
