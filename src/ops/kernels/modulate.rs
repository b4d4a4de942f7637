//! Products and sums of adaptive layer norm, with one pass forward and one backward.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::storage::{BLOCK, Rows, with_rows};

/// x · (offset + scale) + shift, for matrices `[rows, width]`.
pub struct Modulate {
    /// 1 for the modulation of adaptive layer norm, 0 for a gate.
    pub offset: f32,
}

impl Modulate {
    /// Gradients of x and scale.
    fn gradients(&self, x: Rows, scale: Rows, gradient: Rows) -> [Vec<f32>; 2] {
        let (rows, width) = (x.count(), x.width());
        let [mut of_x, mut of_scale] = [(); 2].map(|()| vec![0.0; rows * width]);
        let blocks = of_x.par_chunks_mut(BLOCK * width).zip(of_scale.par_chunks_mut(BLOCK * width));
        blocks.enumerate().for_each(|(block, (of_x, of_scale))| {
            for (index, (of_x, of_scale)) in of_x.chunks_mut(width).zip(of_scale.chunks_mut(width)).enumerate() {
                let [x, scale, gradient] = [x, scale, gradient].map(|rows| rows.row(block * BLOCK + index));
                for column in 0..width {
                    of_x[column] = gradient[column] * (self.offset + scale[column]);
                    of_scale[column] = gradient[column] * x[column];
                }
            }
        });
        [of_x, of_scale]
    }
}

impl CustomOp3 for Modulate {
    fn name(&self) -> &'static str {
        "modulate"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        scale: &CpuStorage,
        scale_layout: &Layout,
        shift: &CpuStorage,
        shift_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, scale) = (Rows::new(x, layout)?, Rows::new(scale, scale_layout)?);
        let (shift, width) = (Rows::new(shift, shift_layout)?, x.width());
        let mut y = vec![0.0; x.count() * width];
        y.par_chunks_mut(BLOCK * width).enumerate().for_each(|(block, y)| {
            for (index, y) in y.chunks_mut(width).enumerate() {
                let [x, scale, shift] = [x, scale, shift].map(|rows| rows.row(block * BLOCK + index));
                for (column, y) in y.iter_mut().enumerate() {
                    *y = x[column] * (self.offset + scale[column]) + shift[column];
                }
            }
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        scale: &Tensor,
        _shift: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let gradients =
            with_rows([x, scale, &gradient], |[x, scale, gradient]| Ok(self.gradients(x, scale, gradient)))?;
        let [of_x, of_scale] = gradients.map(|values| Tensor::from_vec(values, x.shape(), x.device()));
        Ok((Some(of_x?), Some(of_scale?), Some(gradient)))
    }
}
