//! Candle operators of our own for the CPU, where training spends its time: fused, on all cores, with their gradients.
//!
//! Every result is independent of the number of threads, so that a resumed training goes on bit for bit.

mod conv;
mod norm;
mod pad;
mod silu;

pub use conv::Conv3x3;
pub use norm::GroupNorm;
pub use pad::PadReflect;
pub use silu::Silu;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};

/// The values of a contiguous tensor of `f32`.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(values) = storage else { bail!("expected a tensor of f32") };
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor") };
    Ok(&values[start..end])
}

/// Calls `read` with the values of contiguous tensors of `f32` on the CPU.
fn with_values<const N: usize, R>(tensors: [&Tensor; N], read: impl FnOnce([&[f32]; N]) -> Result<R>) -> Result<R> {
    let stored = tensors.map(Tensor::storage_and_layout);
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&stored) {
        let Storage::Cpu(storage) = &**storage else { bail!("expected a tensor on the CPU") };
        *slice = values(storage, layout)?;
    }
    read(slices)
}

/// A sum in single precision over short runs, and in double over those.
fn sum(x: &[f32], term: impl Fn(f32) -> f32) -> f64 {
    const LANES: usize = 16;
    const RUN: usize = 64 * LANES;
    let mut total = 0.0;
    for run in x.chunks(RUN) {
        let (vectors, rest) = run.as_chunks::<LANES>();
        let mut sums = [0f32; LANES];
        for vector in vectors {
            sums.iter_mut().zip(vector).for_each(|(sum, &x)| *sum += term(x));
        }
        total += f64::from(sums.iter().sum::<f32>() + rest.iter().map(|&x| term(x)).sum::<f32>());
    }
    total
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device, Tensor, Var};

    use super::*;

    fn random(shape: &[usize]) -> Var {
        Var::from_tensor(&Tensor::randn(0f32, 1f32, shape, &Device::Cpu).unwrap()).unwrap()
    }

    /// Values and gradients, by a random direction, of `ours` against `theirs`.
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
        let largest = |x: &Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let difference = largest(&(found - expected).unwrap());
        let scale = largest(expected).max(1.0);
        assert!(difference <= tolerance * scale, "{difference:e} of {scale:e}");
    }

    #[test]
    fn convolution_is_candles_own() {
        // Widths on both sides of a vector's, strips that do not divide, and channels that fill no block.
        for (batch, input, output, height, width) in
            [(2, 3, 5, 19, 33), (1, 4, 8, 8, 16), (2, 1, 1, 1, 1), (1, 7, 3, 17, 7)]
        {
            let x = random(&[batch, input, height + 2, width + 2]);
            let weight = random(&[output, input, 3, 3]);
            let bias = random(&[output]);
            let theirs =
                |t: &[&Tensor]| t[0].conv2d(t[1], 0, 1, 1, 1)?.broadcast_add(&t[2].reshape((1, output, 1, 1))?);
            same(&[&x, &weight, &bias], 1e-5, |t| t[0].apply_op3(t[1], t[2], Conv3x3), theirs);
        }
    }

    #[test]
    fn group_norm_is_its_formula() {
        let (groups, eps) = (2, 1e-3);
        let x = Var::from_tensor(&(random(&[3, 6, 5, 7]).as_tensor() + 2.0).unwrap()).unwrap();
        let theirs = |t: &[&Tensor]| {
            let x = t[0].reshape((3, groups, ()))?;
            let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
            let x = x.broadcast_div(&(variance + f64::from(eps))?.sqrt()?)?.reshape(t[0].shape())?;
            x.broadcast_mul(&t[1].reshape((1, 6, 1, 1))?)?.broadcast_add(&t[2].reshape((1, 6, 1, 1))?)
        };
        let ours = |t: &[&Tensor]| t[0].apply_op3(t[1], t[2], GroupNorm { groups, eps });
        same(&[&x, &random(&[6]), &random(&[6])], 1e-5, ours, theirs);
    }

    #[test]
    fn silu_is_its_formula() {
        let x = Tensor::arange(-100f32, 100f32, &Device::Cpu).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        same(&[&x], 1e-6, |t| t[0].apply_op1(Silu), |t| t[0].silu());
    }

    #[test]
    fn padding_mirrors() {
        let theirs = |t: &[&Tensor]| {
            let mut x = t[0].clone();
            for axis in 2..4 {
                let last = x.dim(axis)?;
                x = Tensor::cat(&[&x.narrow(axis, 1, 1)?, &x, &x.narrow(axis, last - 2, 1)?], axis)?;
            }
            Ok(x)
        };
        for (height, width) in [(2, 2), (3, 2), (5, 9)] {
            same(&[&random(&[2, 3, height, width])], 1e-6, |t| t[0].apply_op1(PadReflect), theirs);
        }
    }
}
