//! Softmax over rows, with one pass forward and one backward.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::pointwise::exp;
use super::storage::{BLOCK, values, with_values};

/// Softmax over the last axis (ONNX `Softmax`).
pub struct Softmax;

/// Softmax of a row `x`, written to `y`.
#[inline(always)]
fn row(y: &mut [f32], x: &[f32]) {
    let most = x.iter().fold(f32::NEG_INFINITY, |most, &x| if x > most { x } else { most });
    for (y, x) in y.iter_mut().zip(x) {
        // `exp` does not reach zero, which a masked value needs.
        let power = x - most;
        *y = if power < -87.0 { 0.0 } else { exp(power) };
    }
    let scale = 1.0 / y.iter().sum::<f32>();
    y.iter_mut().for_each(|y| *y *= scale);
}

/// Gradient of a row, for its softmax `y`.
#[inline(always)]
fn row_gradient(of_x: &mut [f32], y: &[f32], gradient: &[f32]) {
    // dx = y·(g - Σ g·y)
    let mean = y.iter().zip(gradient).map(|(y, gradient)| y * gradient).sum::<f32>();
    for ((of_x, y), gradient) in of_x.iter_mut().zip(y).zip(gradient) {
        *of_x = y * (gradient - mean);
    }
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, width) = (values(x, layout)?, layout.shape().dim(D::Minus1)?.max(1));
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(BLOCK * width).zip(x.par_chunks(BLOCK * width)).for_each(|(y, x)| {
            Arch::new().dispatch(
                #[inline(always)]
                || y.chunks_mut(width).zip(x.chunks(width)).for_each(|(y, x)| row(y, x)),
            );
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (gradient, width) = (gradient.contiguous()?, x.dim(D::Minus1)?.max(1));
        let of_x = with_values([y, &gradient], |[y, gradient]| {
            let mut of_x = vec![0.0; y.len()];
            let blocks = of_x.par_chunks_mut(BLOCK * width).zip(y.par_chunks(BLOCK * width));
            blocks.zip(gradient.par_chunks(BLOCK * width)).for_each(|((of_x, y), gradient)| {
                let rows = of_x.chunks_mut(width).zip(y.chunks(width)).zip(gradient.chunks(width));
                Arch::new().dispatch(
                    #[inline(always)]
                    || rows.for_each(|((of_x, y), gradient)| row_gradient(of_x, y, gradient)),
                );
            });
            Ok(of_x)
        })?;
        Ok(Some(Tensor::from_vec(of_x, x.shape(), x.device())?))
    }
}
