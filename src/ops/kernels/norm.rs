//! Normalization over groups of channels, forward and backward with few passes over the data.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::storage::{LANES, sum, values, with_values};

/// Group normalization of `x [batch, channels, …]` with `weight [channels]` and `bias [channels]` (ONNX
/// `GroupNormalization`).
pub struct GroupNorm {
    /// Number of groups of channels.
    pub groups: usize,
    /// Constant that is added to the variance.
    pub eps: f32,
}

/// Mean of a group, and the reciprocal of its standard deviation.
struct Moments {
    mean: f32,
    scale: f32,
}

impl GroupNorm {
    fn moments(&self, x: &[f32]) -> Moments {
        let mean = sum(x, |x| x) / x.len() as f64;
        let variance = sum(x, |x| (x - mean as f32) * (x - mean as f32)) / x.len() as f64;
        Moments { mean: mean as f32, scale: (1.0 / (variance + f64::from(self.eps)).sqrt()) as f32 }
    }
}

/// Sums of `gradient` and of `gradient · x` over a channel.
fn sums(x: &[f32], gradient: &[f32]) -> (f64, f64) {
    const RUN: usize = 64 * LANES;
    let (mut plain, mut product) = (0.0, 0.0);
    for (x, gradient) in x.chunks(RUN).zip(gradient.chunks(RUN)) {
        let ((x, x_rest), (gradient, gradient_rest)) = (x.as_chunks::<LANES>(), gradient.as_chunks::<LANES>());
        let mut lanes = [(0f32, 0f32); LANES];
        for (x, gradient) in x.iter().zip(gradient) {
            for (lane, (x, gradient)) in lanes.iter_mut().zip(x.iter().zip(gradient)) {
                lane.0 += gradient;
                lane.1 += gradient * x;
            }
        }
        for (lane, (x, gradient)) in lanes.iter_mut().zip(x_rest.iter().zip(gradient_rest)) {
            lane.0 += gradient;
            lane.1 += gradient * x;
        }
        plain += lanes.iter().map(|lane| f64::from(lane.0)).sum::<f64>();
        product += lanes.iter().map(|lane| f64::from(lane.1)).sum::<f64>();
    }
    (plain, product)
}

impl GroupNorm {
    /// Gradients of `x`, of the weight and of the bias.
    fn gradients(&self, x: &[f32], weight: &[f32], gradient: &[f32], batch: usize) -> [Vec<f32>; 3] {
        let group = x.len() / (batch * self.groups);
        let mut of_x = vec![0.0; x.len()];
        let groups = of_x.par_chunks_mut(group).zip(x.par_chunks(group)).zip(gradient.par_chunks(group));
        let of_channels: Vec<Vec<[f32; 2]>> = groups
            .enumerate()
            .map(|(index, ((of_x, x), gradient))| {
                let channels = weight.len() / self.groups;
                let weight = &weight[index % self.groups * channels..][..channels];
                self.group_gradients(of_x, x, weight, gradient)
            })
            .collect();
        let channels = weight.len();
        let (mut of_weight, mut of_bias) = (vec![0.0; channels], vec![0.0; channels]);
        for (index, [weight, bias]) in of_channels.into_iter().flatten().enumerate() {
            of_weight[index % channels] += weight;
            of_bias[index % channels] += bias;
        }
        [of_x, of_weight, of_bias]
    }

    /// Writes the gradient of one group of `x` to `of_x`. Returns the gradients of weight and bias for each channel of
    /// the group.
    fn group_gradients(&self, of_x: &mut [f32], x: &[f32], weight: &[f32], gradient: &[f32]) -> Vec<[f32; 2]> {
        let Moments { mean, scale } = self.moments(x);
        let area = x.len() / weight.len();
        let channels = x.chunks(area).zip(gradient.chunks(area));
        let of_channels: Vec<[f32; 2]> = channels
            .map(|(x, gradient)| {
                let (plain, product) = sums(x, gradient);
                [((product - f64::from(mean) * plain) * f64::from(scale)) as f32, plain as f32]
            })
            .collect();
        let weighted = |part: usize| {
            let sum: f32 = of_channels.iter().zip(weight).map(|(of, weight)| of[part] * weight).sum();
            sum / x.len() as f32
        };
        let (of_normed, of_mean) = (weighted(0), weighted(1));
        // dx = s·(g·w - mean(g·w) - x̂·mean(g·w·x̂)), with x̂ = (x - mean)·s, as a linear function of g and x.
        let slope = -scale * scale * of_normed;
        let shift = -scale * of_mean - slope * mean;
        for (channel, of_x) in of_x.chunks_mut(area).enumerate() {
            let (x, gradient) = (&x[channel * area..][..area], &gradient[channel * area..][..area]);
            let factor = scale * weight[channel];
            for ((of_x, x), gradient) in of_x.iter_mut().zip(x).zip(gradient) {
                *of_x = factor * gradient + slope * x + shift;
            }
        }
        of_channels
    }
}

impl CustomOp3 for GroupNorm {
    fn name(&self) -> &'static str {
        "group norm"
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
        let channels = weight.len() / self.groups;
        let group = x.len() / (layout.shape().dims()[0] * self.groups);
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(group).zip(x.par_chunks(group)).enumerate().for_each(|(index, (y, x))| {
            let Moments { mean, scale } = self.moments(x);
            let area = group / channels;
            let first = index % self.groups * channels;
            for (channel, (y, x)) in y.chunks_mut(area).zip(x.chunks(area)).enumerate() {
                let scale = scale * weight[first + channel];
                let shift = bias[first + channel] - mean * scale;
                y.iter_mut().zip(x).for_each(|(y, x)| *y = x * scale + shift);
            }
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
        let batch = x.dim(0)?;
        let [of_x, of_weight, of_bias] =
            with_values(
                [x, weight, &gradient],
                |[x, weight, gradient]| Ok(self.gradients(x, weight, gradient, batch)),
            )?;
        let device = x.device();
        let of_x = Tensor::from_vec(of_x, x.shape(), device)?;
        let of_weight = Tensor::from_vec(of_weight, weight.shape(), device)?;
        let of_bias = Tensor::from_vec(of_bias, weight.shape(), device)?;
        Ok((Some(of_x), Some(of_weight), Some(of_bias)))
    }
}
