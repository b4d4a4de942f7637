//! Normalization of rows, forward and backward with few passes over the data.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::storage::{BLOCK, LANES, add_rows, values, with_values};

/// Layer normalization of `x [rows, width]` with `weight [width]` and `bias [width]` (ONNX `LayerNormalization`).
pub struct LayerNorm {
    /// Constant that is added to the variance.
    pub eps: f32,
}

/// Sum of `value(index)` in lanes, so that the compiler can use vectors.
#[inline(always)]
fn sum(count: usize, value: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = count / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += value(start + lane);
        }
    }
    (whole..count).for_each(|index| lanes[index - whole] += value(index));
    lanes.iter().sum()
}

impl LayerNorm {
    /// Mean of a row, and the reciprocal of its standard deviation.
    #[inline(always)]
    fn moments(&self, x: &[f32]) -> (f32, f32) {
        let width = x.len() as f32;
        let mean = sum(x.len(), |index| x[index]) / width;
        let variance = sum(x.len(), |index| (x[index] - mean) * (x[index] - mean)) / width;
        (mean, 1.0 / (variance + self.eps).sqrt())
    }

    /// Writes the gradient of a row to `of_x`, and adds those of weight and bias.
    #[inline(always)]
    fn row_gradients(
        &self,
        of_x: &mut [f32],
        x: &[f32],
        weight: &[f32],
        gradient: &[f32],
        (of_weight, of_bias): (&mut [f32], &mut [f32]),
    ) {
        let width = weight.len();
        let (x, gradient, of_x) = (&x[..width], &gradient[..width], &mut of_x[..width]);
        let (of_weight, of_bias) = (&mut of_weight[..width], &mut of_bias[..width]);
        let (mean, scale) = self.moments(x);
        for index in 0..width {
            of_weight[index] += gradient[index] * (x[index] - mean) * scale;
            of_bias[index] += gradient[index];
        }
        // dx = s·(g·w - mean(g·w) - x̂·mean(g·w·x̂)), with x̂ = (x - mean)·s.
        let of_mean = sum(width, |index| gradient[index] * weight[index]) / width as f32;
        let product = |index: usize| gradient[index] * weight[index] * (x[index] - mean);
        let of_normed = sum(width, product) * scale / width as f32;
        for index in 0..width {
            let normed = (x[index] - mean) * scale;
            of_x[index] = scale * (gradient[index] * weight[index] - of_mean - normed * of_normed);
        }
    }

    /// Gradients of `x`, of the weight and of the bias.
    fn gradients(&self, x: &[f32], weight: &[f32], gradient: &[f32]) -> [Vec<f32>; 3] {
        let width = weight.len();
        let mut of_x = vec![0.0; x.len()];
        let blocks = of_x.par_chunks_mut(BLOCK * width).zip(x.par_chunks(BLOCK * width));
        let blocks = blocks.zip(gradient.par_chunks(BLOCK * width));
        let parts: Vec<[Vec<f32>; 2]> = blocks
            .map(|((of_x, x), gradient)| {
                let (mut of_weight, mut of_bias) = (vec![0.0; width], vec![0.0; width]);
                let rows = of_x.chunks_mut(width).zip(x.chunks(width)).zip(gradient.chunks(width));
                Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        for ((of_x, x), gradient) in rows {
                            self.row_gradients(of_x, x, weight, gradient, (&mut of_weight, &mut of_bias));
                        }
                    },
                );
                [of_weight, of_bias]
            })
            .collect();
        let total = |part: usize| {
            let mut total = vec![0.0; width];
            parts.iter().for_each(|parts| add_rows(&mut total, &parts[part]));
            total
        };
        [of_x, total(0), total(1)]
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight, bias) = (values(x, layout)?, values(weight, weight_layout)?, values(bias, bias_layout)?);
        let width = weight.len();
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(BLOCK * width).zip(x.par_chunks(BLOCK * width)).for_each(|(y, x)| {
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_mut(width).zip(x.chunks(width)) {
                        let (mean, scale) = self.moments(x);
                        for (((y, x), weight), bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                            *y = (x - mean) * scale * weight + bias;
                        }
                    }
                },
            );
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let [of_x, of_weight, of_bias] =
            with_values([x, weight, &gradient], |[x, weight, gradient]| Ok(self.gradients(x, weight, gradient)))?;
        let device = x.device();
        let of_x = Tensor::from_vec(of_x, x.shape(), device)?;
        let of_weight = Tensor::from_vec(of_weight, weight.shape(), device)?;
        let of_bias = Tensor::from_vec(of_bias, weight.shape(), device)?;
        Ok((Some(of_x), Some(of_weight), Some(of_bias)))
    }
}
