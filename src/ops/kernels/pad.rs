//! Reflect padding by one row and column on every side, with one pass forward and one backward.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::storage::{values, with_values};

/// Pads `x [batch, channels, height, width]`, height and width at least 2, to `[batch, channels, height+2, width+2]`.
pub struct PadReflect;

impl CustomOp1 for PadReflect {
    fn name(&self) -> &'static str {
        "pad reflect"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, channels, height, width) = layout.shape().dims4()?;
        let x = values(x, layout)?;
        let mut y = vec![0.0; batch * channels * (height + 2) * (width + 2)];
        let planes = y.par_chunks_mut((height + 2) * (width + 2)).zip(x.par_chunks(height * width));
        planes.for_each(|(y, x)| {
            for (row, y) in y.chunks_exact_mut(width + 2).enumerate() {
                let x = &x[source(row, height) * width..][..width];
                y[1..=width].copy_from_slice(x);
                (y[0], y[width + 1]) = (x[1], x[width - 2]);
            }
        });
        Ok((CpuStorage::F32(y), (batch, channels, height + 2, width + 2).into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (_, _, height, width) = x.dims4()?;
        let gradient = gradient.contiguous()?;
        let of_x = with_values([&gradient], |[gradient]| {
            let mut of_x = vec![0.0; x.elem_count()];
            let planes = of_x.par_chunks_mut(height * width).zip(gradient.par_chunks((height + 2) * (width + 2)));
            planes.for_each(|(of_x, gradient)| {
                for (row, gradient) in gradient.chunks_exact(width + 2).enumerate() {
                    let of_x = &mut of_x[source(row, height) * width..][..width];
                    of_x.iter_mut().zip(&gradient[1..]).for_each(|(of_x, gradient)| *of_x += gradient);
                    of_x[1] += gradient[0];
                    of_x[width - 2] += gradient[width + 1];
                }
            });
            Ok(of_x)
        })?;
        Ok(Some(Tensor::from_vec(of_x, x.shape(), x.device())?))
    }
}

/// Row of the input that is copied to `row` of the padded image.
fn source(row: usize, height: usize) -> usize {
    match row {
        0 => 1,
        _ if row > height => height - 2,
        _ => row - 1,
    }
}
