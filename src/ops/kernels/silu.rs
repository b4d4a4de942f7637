//! x · sigmoid(x), with one pass forward and one backward.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::storage::{values, with_values};

const PART: usize = 1 << 15;

/// x · sigmoid(x), also called swish.
pub struct Silu;

impl CustomOp1 for Silu {
    fn name(&self) -> &'static str {
        "silu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(x, layout)?;
        let mut y = vec![0.0; x.len()];
        let parts = y.par_chunks_mut(PART).zip(x.par_chunks(PART));
        parts.for_each(|(y, x)| {
            Arch::new().dispatch(
                #[inline(always)]
                || y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * sigmoid(x)),
            );
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        let of_x = with_values([x, &gradient], |[x, gradient]| {
            let mut of_x = vec![0.0; x.len()];
            let parts = of_x.par_chunks_mut(PART).zip(x.par_chunks(PART)).zip(gradient.par_chunks(PART));
            parts.for_each(|((of_x, x), gradient)| {
                Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        for ((of_x, &x), gradient) in of_x.iter_mut().zip(x).zip(gradient) {
                            let s = sigmoid(x);
                            *of_x = gradient * (s + x * s * (1.0 - s));
                        }
                    },
                );
            });
            Ok(of_x)
        })?;
        Ok(Some(Tensor::from_vec(of_x, x.shape(), x.device())?))
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// e^x within 2 units in the last place, in a form that compilers vectorize. The power of two is set through the bits
/// of the exponent, and a polynomial gives the rest (Cephes' `expf`). The standard library's function needs one call
/// per element.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let power = (x * std::f32::consts::LOG2_E + 0.5).floor();
    // ln 2 is split into two parts. The first has few bits, so that its product with `power` is exact.
    let x = x - power * 0.693_359_4 + power * 2.121_944_4e-4;
    let p = 1.987_569_1e-4f32;
    let p = p * x + 1.398_199_9e-3;
    let p = p * x + 8.333_452e-3;
    let p = p * x + 4.166_579_6e-2;
    let p = p * x + 0.166_666_66;
    let p = p * x + 0.5;
    let p = p * x * x + x + 1.0;
    p * f32::from_bits(((power as i32 + 127) as u32) << 23)
}
