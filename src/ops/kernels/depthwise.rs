//! Depthwise convolution. Candle's own makes a separate convolution of every channel.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::storage::{bias_gradient, values, with_values};

/// Convolution (ONNX `Conv`) of every channel of `x [batch, channels, height, width]` by itself, with `weight
/// [channels, 1, kernel, kernel]` and `bias [channels]`.
pub struct Depthwise {
    /// Distance of two windows along both axes.
    pub stride: usize,
}

/// Sizes of one channel.
#[derive(Clone, Copy)]
struct Sizes {
    stride: usize,
    kernel: usize,
    width: usize,
    rows: usize,
    columns: usize,
}

impl Depthwise {
    fn sizes(&self, kernel: usize, height: usize, width: usize) -> Sizes {
        let windows = |size: usize| (size - kernel) / self.stride + 1;
        Sizes { stride: self.stride, kernel, width, rows: windows(height), columns: windows(width) }
    }
}

impl Sizes {
    /// Calls `each` with every row of windows and every tap: where in `x` the first window has the tap, the tap, and
    /// where in `y` the row starts.
    #[inline(always)]
    fn each_tap(self, mut each: impl FnMut(usize, usize, usize)) {
        for row in 0..self.rows {
            for ky in 0..self.kernel {
                for kx in 0..self.kernel {
                    let from = (row * self.stride + ky) * self.width + kx;
                    each(from, ky * self.kernel + kx, row * self.columns);
                }
            }
        }
    }

    /// The part of a row of `x` that the tap at `from` reads.
    #[inline(always)]
    fn span(self, from: usize) -> std::ops::Range<usize> {
        from..from + (self.columns - 1) * self.stride + 1
    }

    fn forward(self, x: &[f32], weight: &[f32], bias: f32, y: &mut [f32]) {
        y.fill(bias);
        self.each_tap(
            #[inline(always)]
            |from, tap, row| {
                let (x, y) = (&x[self.span(from)], &mut y[row..][..self.columns]);
                add_scaled(x, weight[tap], y, self.stride);
            },
        );
    }

    fn input_gradient(self, weight: &[f32], gradient: &[f32], of_x: &mut [f32]) {
        self.each_tap(
            #[inline(always)]
            |from, tap, row| {
                let (of_x, gradient) = (&mut of_x[self.span(from)], &gradient[row..][..self.columns]);
                spread_scaled(gradient, weight[tap], of_x, self.stride);
            },
        );
    }

    fn weight_gradient(self, x: &[f32], gradient: &[f32], of_weight: &mut [f32]) {
        self.each_tap(
            #[inline(always)]
            |from, tap, row| {
                let x = x[self.span(from)].iter().step_by(self.stride);
                let products = x.zip(&gradient[row..][..self.columns]).map(|(x, gradient)| x * gradient);
                of_weight[tap] += products.sum::<f32>();
            },
        );
    }
}

/// Adds every `stride`-th element of `x`, multiplied by `factor`, to `y`.
#[inline(always)]
fn add_scaled(x: &[f32], factor: f32, y: &mut [f32], stride: usize) {
    // Compilers vectorize a constant step only.
    match stride {
        1 => y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x),
        2 => y.iter_mut().zip(x.iter().step_by(2)).for_each(|(y, x)| *y += factor * x),
        _ => y.iter_mut().zip(x.iter().step_by(stride)).for_each(|(y, x)| *y += factor * x),
    }
}

/// Adds `x`, multiplied by `factor`, to every `stride`-th element of `y`.
#[inline(always)]
fn spread_scaled(x: &[f32], factor: f32, y: &mut [f32], stride: usize) {
    match stride {
        1 => y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x),
        _ => y.iter_mut().step_by(stride).zip(x).for_each(|(y, x)| *y += factor * x),
    }
}

impl CustomOp3 for Depthwise {
    fn name(&self) -> &'static str {
        "depthwise convolution"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, channels, height, width) = x_layout.shape().dims4()?;
        let sizes = self.sizes(weight_layout.shape().dims4()?.3, height, width);
        let (x, weight, bias) = (values(x, x_layout)?, values(weight, weight_layout)?, values(bias, bias_layout)?);
        let taps = sizes.kernel * sizes.kernel;
        let mut y = vec![0.0; batch * channels * sizes.rows * sizes.columns];
        let planes = y.par_chunks_mut(sizes.rows * sizes.columns).zip(x.par_chunks(height * width));
        planes.enumerate().for_each(|(plane, (y, x))| {
            let channel = plane % channels;
            let weight = &weight[channel * taps..][..taps];
            Arch::new().dispatch(
                #[inline(always)]
                || sizes.forward(x, weight, bias[channel], y),
            );
        });
        Ok((CpuStorage::F32(y), (batch, channels, sizes.rows, sizes.columns).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (_, channels, height, width) = x.dims4()?;
        let sizes = self.sizes(weight.dim(3)?, height, width);
        let (taps, area) = (sizes.kernel * sizes.kernel, sizes.rows * sizes.columns);
        let (gradient, weight) = (gradient.contiguous()?, weight.contiguous()?);
        let of_x = with_values([&weight, &gradient], |[weight, gradient]| {
            let mut of_x = vec![0.0; x.elem_count()];
            let planes = of_x.par_chunks_mut(height * width).zip(gradient.par_chunks(area));
            planes.enumerate().for_each(|(plane, (of_x, gradient))| {
                let weight = &weight[plane % channels * taps..][..taps];
                Arch::new().dispatch(
                    #[inline(always)]
                    || sizes.input_gradient(weight, gradient, of_x),
                );
            });
            Ok(of_x)
        })?;
        let of_x = Some(Tensor::from_vec(of_x, x.shape(), x.device())?);
        // The weights of a pretrained network are constants.
        if !weight.track_op() {
            return Ok((of_x, None, None));
        }
        let (of_weight, of_bias) = with_values([x, &gradient], |[x, gradient]| {
            let mut of_planes = vec![0.0; x.len() / (height * width) * taps];
            let planes = of_planes.par_chunks_mut(taps).zip(x.par_chunks(height * width));
            let planes = planes.zip(gradient.par_chunks(area));
            planes.for_each(|((of_weight, x), gradient)| sizes.weight_gradient(x, gradient, of_weight));
            let mut of_weight = vec![0.0; channels * taps];
            for image in of_planes.chunks(channels * taps) {
                of_weight.iter_mut().zip(image).for_each(|(sum, part)| *sum += part);
            }
            Ok((of_weight, bias_gradient(channels, area, gradient)))
        })?;
        let of_weight = Tensor::from_vec(of_weight, weight.shape(), weight.device())?;
        Ok((of_x, Some(of_weight), Some(Tensor::from_vec(of_bias, bias.shape(), bias.device())?)))
    }
}
