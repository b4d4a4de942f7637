//! The windows of a convolution as columns of a matrix (im2col), for convolutions with any kernel and stride.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::storage::{values, with_values};

/// Copies the windows of `x [batch, channels, height, width]` to `[batch, channels·kernel·kernel, rows·columns]`, as
/// PyTorch's `Unfold`. The gradient adds them up again (`Fold`).
pub struct Unfold {
    /// Height and width of a window.
    pub kernel: usize,
    /// Distance of two windows along both axes.
    pub stride: usize,
}

impl Unfold {
    /// Number of windows along an axis of `size` elements.
    pub fn windows(&self, size: usize) -> usize {
        (size - self.kernel) / self.stride + 1
    }

    /// Calls `copy` with every row of a window's taps: the channel's row `y·width..` in which it starts, the number of
    /// the tap, and the row of windows.
    fn each_tap(&self, rows: usize, mut copy: impl FnMut(usize, usize, usize, usize)) {
        for ky in 0..self.kernel {
            for kx in 0..self.kernel {
                for row in 0..rows {
                    copy(row * self.stride + ky, kx, ky * self.kernel + kx, row);
                }
            }
        }
    }
}

impl CustomOp1 for Unfold {
    fn name(&self) -> &'static str {
        "unfold"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, channels, height, width) = layout.shape().dims4()?;
        let (rows, columns, taps) = (self.windows(height), self.windows(width), self.kernel * self.kernel);
        let x = values(x, layout)?;
        let mut y = vec![0.0; batch * channels * taps * rows * columns];
        let planes = y.par_chunks_mut(taps * rows * columns).zip(x.par_chunks(height * width));
        planes.for_each(|(y, x)| {
            self.each_tap(rows, |from, kx, tap, row| {
                let to = &mut y[(tap * rows + row) * columns..][..columns];
                let from = x[from * width + kx..].iter().step_by(self.stride);
                to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            });
        });
        Ok((CpuStorage::F32(y), (batch, channels * taps, rows * columns).into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (_, _, height, width) = x.dims4()?;
        let (rows, columns, taps) = (self.windows(height), self.windows(width), self.kernel * self.kernel);
        let gradient = gradient.contiguous()?;
        let of_x = with_values([&gradient], |[gradient]| {
            let mut of_x = vec![0.0; x.elem_count()];
            let planes = of_x.par_chunks_mut(height * width).zip(gradient.par_chunks(taps * rows * columns));
            planes.for_each(|(of_x, gradient)| {
                self.each_tap(rows, |to, kx, tap, row| {
                    let from = &gradient[(tap * rows + row) * columns..][..columns];
                    let to = of_x[to * width + kx..].iter_mut().step_by(self.stride);
                    to.zip(from).for_each(|(to, from)| *to += from);
                });
            });
            Ok(of_x)
        })?;
        Ok(Some(Tensor::from_vec(of_x, x.shape(), x.device())?))
    }
}
