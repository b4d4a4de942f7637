//! Limits to a range, with one pass forward and one backward.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::storage::{values, with_values};

const PART: usize = 1 << 15;

/// Limits values to `low..=high`. The gradient is 0 outside of the range and at its ends.
pub struct Clamp {
    /// Smallest value.
    pub low: f32,
    /// Largest value.
    pub high: f32,
}

impl CustomOp1 for Clamp {
    fn name(&self) -> &'static str {
        "clamp"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(x, layout)?;
        let &Self { low, high } = self;
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(PART).zip(x.par_chunks(PART)).for_each(|(y, x)| {
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    y.iter_mut().zip(x).for_each(|(y, &x)| {
                        *y = if x < low {
                            low
                        } else if x > high {
                            high
                        } else {
                            x
                        }
                    })
                },
            );
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        let &Self { low, high } = self;
        let of_x = with_values([x, &gradient], |[x, gradient]| {
            let mut of_x = vec![0.0; x.len()];
            let parts = of_x.par_chunks_mut(PART).zip(x.par_chunks(PART)).zip(gradient.par_chunks(PART));
            parts.for_each(|((of_x, x), gradient)| {
                Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        for ((of_x, &x), &gradient) in of_x.iter_mut().zip(x).zip(gradient) {
                            *of_x = if low < x && x < high { gradient } else { 0.0 };
                        }
                    },
                );
            });
            Ok(of_x)
        })?;
        Ok(Some(Tensor::from_vec(of_x, x.shape(), x.device())?))
    }
}
