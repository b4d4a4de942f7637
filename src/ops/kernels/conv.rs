//! 3×3 convolution. Candle's own is several times slower in the forward pass, and slower still in the backward pass.
//!
//! The convolution is direct, without an unfolded copy of the image (im2col). The sums of a block of output channels
//! for a run of pixels stay in registers during the loop over input channels and taps.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::storage::{bias_gradient, values, with_values};

// Output channels per block. The sums of a block fit in the registers, and their products hide the latency of one another.
const CHANNELS: usize = 8;
// Rows per task. Their input is small enough to stay in a core's cache. The number does not depend on the number of
// cores, so sums over tasks do not depend on it either.
const ROWS: usize = 8;
const TAPS: usize = 9;

/// Sizes of a convolution of `x [batch, input, height+2, width+2]` to `y [batch, output, height, width]`.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    input: usize,
    output: usize,
    height: usize,
    width: usize,
}

impl Sizes {
    /// Length of a row of the input.
    fn stride(self) -> usize {
        self.width + 2
    }

    /// Number of elements of an input channel.
    fn plane(self) -> usize {
        (self.height + 2) * self.stride()
    }

    /// Divides the output's rows of all images into strips: (image, first row, number of rows).
    fn strips(self) -> Vec<(usize, usize, usize)> {
        let starts = (0..self.height).step_by(ROWS);
        let strips = starts.map(|start| (start, ROWS.min(self.height - start)));
        (0..self.batch).flat_map(|image| strips.clone().map(move |(start, rows)| (image, start, rows))).collect()
    }
}

/// Convolution with stride 1 (ONNX `Conv`) of `x [batch, input, height+2, width+2]` with `weight [output, input, 3, 3]`
/// and `bias [output]`.
pub struct Conv3x3;

impl CustomOp3 for Conv3x3 {
    fn name(&self) -> &'static str {
        "conv3x3"
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
        let (batch, input, height, width) = x_layout.shape().dims4()?;
        let output = weight_layout.shape().dims4()?.0;
        let sizes = Sizes { batch, input, output, height: height - 2, width: width - 2 };
        let (x, weight, bias) = (values(x, x_layout)?, values(weight, weight_layout)?, values(bias, bias_layout)?);
        let y = forward(sizes, x, weight, bias);
        Ok((CpuStorage::F32(y), (batch, output, sizes.height, sizes.width).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let area = gradient.dim(2)? * gradient.dim(3)?;
        let of_bias = with_values([&gradient], |[gradient]| Ok(bias_gradient(bias.elem_count(), area, gradient)))?;
        let of_bias = Tensor::from_vec(of_bias, bias.shape(), bias.device())?;
        let of_weight = x.apply_op2_no_bwd(&gradient, &WeightGradient)?;
        // The transposed convolution: the mirrored kernel is applied to the gradient with a border of zeros.
        let mirrored = weight.flip(&[2, 3])?.transpose(0, 1)?.contiguous()?;
        let bordered = gradient.pad_with_zeros(2, 2, 2)?.pad_with_zeros(3, 2, 2)?;
        let zeros = Tensor::zeros(mirrored.dim(0)?, gradient.dtype(), gradient.device())?;
        let of_x = bordered.apply_op3_no_bwd(&mirrored, &zeros, &Conv3x3)?;
        Ok((Some(of_x), Some(of_weight), Some(of_bias)))
    }
}

/// Gradient of the weight, `[output, input, 3, 3]`, from `x` and the gradient of `y`.
struct WeightGradient;

impl CustomOp2 for WeightGradient {
    fn name(&self) -> &'static str {
        "conv3x3 weight gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let input = x_layout.shape().dims4()?.1;
        let (batch, output, height, width) = gradient_layout.shape().dims4()?;
        let sizes = Sizes { batch, input, output, height, width };
        let (x, gradient) = (values(x, x_layout)?, values(gradient, gradient_layout)?);
        let parts: Vec<Vec<f32>> = sizes
            .strips()
            .into_par_iter()
            .map(|(image, start, rows)| Arch::new().dispatch(WeightStrip { sizes, x, gradient, image, start, rows }))
            .collect();
        // The parts are added in order, so that the sum does not depend on the number of threads.
        let mut sum = vec![0.0; output * input * TAPS];
        for part in parts {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        Ok((CpuStorage::F32(sum), (output, input, 3, 3).into()))
    }
}

fn forward(sizes: Sizes, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let packed = pack(sizes, weight);
    let mut y = vec![0.0; sizes.batch * sizes.output * sizes.height * sizes.width];
    // Each strip of rows receives its part of every output channel.
    let strips = sizes.strips();
    let mut parts: Vec<Vec<&mut [f32]>> = strips.iter().map(|_| Vec::with_capacity(sizes.output)).collect();
    let a_image = strips.len() / sizes.batch.max(1);
    for (plane, channel) in y.chunks_mut(sizes.height * sizes.width).enumerate() {
        let image = plane / sizes.output;
        for (strip, rows) in channel.chunks_mut(ROWS * sizes.width).enumerate() {
            parts[image * a_image + strip].push(rows);
        }
    }
    parts.into_par_iter().zip(strips).for_each(|(outputs, (image, start, rows))| {
        let x = &x[image * sizes.input * sizes.plane()..][..sizes.input * sizes.plane()];
        Arch::new().dispatch(Strip { sizes, x, packed: &packed, bias, outputs, start, rows });
    });
    y
}

/// Packs the weight as `[output / CHANNELS, input, tap]` (rounded up) of `CHANNELS` values. Unused places of the last
/// block are zero.
fn pack(sizes: Sizes, weight: &[f32]) -> Vec<[f32; CHANNELS]> {
    let taps = sizes.input * TAPS;
    let blocks = sizes.output.div_ceil(CHANNELS);
    let mut packed = vec![[0.0; CHANNELS]; blocks * taps];
    for (channel, kernel) in weight.chunks(taps).enumerate() {
        let block = &mut packed[channel / CHANNELS * taps..][..taps];
        block.iter_mut().zip(kernel).for_each(|(packed, &value)| packed[channel % CHANNELS] = value);
    }
    packed
}

/// A strip of rows of one image's convolution, with all output channels.
struct Strip<'a> {
    sizes: Sizes,
    x: &'a [f32],
    packed: &'a [[f32; CHANNELS]],
    bias: &'a [f32],
    outputs: Vec<&'a mut [f32]>,
    start: usize,
    rows: usize,
}

impl WithSimd for Strip<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { sizes, x, packed, bias, mut outputs, start, rows } = self;
        let lanes = S::F32_LANES;
        let taps = sizes.input * TAPS;
        for (block, outputs) in outputs.chunks_mut(CHANNELS).enumerate() {
            let kernel = &packed[block * taps..][..taps];
            let mut biases = [0.0; CHANNELS];
            let given = &bias[block * CHANNELS..][..outputs.len()];
            biases[..given.len()].copy_from_slice(given);
            for row in 0..rows {
                let from = &x[(start + row) * sizes.stride()..];
                for at in (0..sizes.width).step_by(lanes) {
                    let to = row * sizes.width + at;
                    let rest = lanes.min(sizes.width - at);
                    let sums = match rest == lanes {
                        true => pixels(simd, sizes, &from[at..], kernel, biases),
                        false => some_pixels(simd, sizes, &from[at..], rest, kernel, biases),
                    };
                    for (output, sum) in outputs.iter_mut().zip(sums) {
                        simd.partial_store_f32s(&mut output[to..][..rest], sum);
                    }
                }
            }
        }
    }
}

/// Computes one vector of adjacent pixels in a block of output channels. `x` starts at the upper left tap of the first
/// pixel.
#[inline(always)]
fn pixels<S: Simd>(
    simd: S,
    sizes: Sizes,
    x: &[f32],
    kernel: &[[f32; CHANNELS]],
    bias: [f32; CHANNELS],
) -> [S::f32s; CHANNELS] {
    let mut sums = [simd.splat_f32s(0.0); CHANNELS];
    for channel in 0..CHANNELS {
        sums[channel] = simd.splat_f32s(bias[channel]);
    }
    let length = S::F32_LANES + 2;
    for (input, kernel) in kernel.as_chunks::<TAPS>().0.iter().enumerate() {
        for ky in 0..3 {
            let row = &x[input * sizes.plane() + ky * sizes.stride()..][..length];
            for kx in 0..3 {
                let vector = S::as_simd_f32s(&row[kx..]).0[0];
                for channel in 0..CHANNELS {
                    let weight = simd.splat_f32s(kernel[3 * ky + kx][channel]);
                    sums[channel] = simd.mul_add_e_f32s(vector, weight, sums[channel]);
                }
            }
        }
    }
    sums
}

/// Computes `count` adjacent pixels, at most one vector, in a block of output channels.
#[inline(always)]
fn some_pixels<S: Simd>(
    simd: S,
    sizes: Sizes,
    x: &[f32],
    count: usize,
    kernel: &[[f32; CHANNELS]],
    bias: [f32; CHANNELS],
) -> [S::f32s; CHANNELS] {
    let mut sums = [simd.splat_f32s(0.0); CHANNELS];
    for channel in 0..CHANNELS {
        sums[channel] = simd.splat_f32s(bias[channel]);
    }
    for (input, kernel) in kernel.as_chunks::<TAPS>().0.iter().enumerate() {
        for (tap, weights) in kernel.iter().enumerate() {
            let at = input * sizes.plane() + tap / 3 * sizes.stride() + tap % 3;
            let vector = simd.partial_load_f32s(&x[at..][..count]);
            for channel in 0..CHANNELS {
                sums[channel] = simd.mul_add_e_f32s(vector, simd.splat_f32s(weights[channel]), sums[channel]);
            }
        }
    }
    sums
}

/// Contribution of a strip of rows of one image to the weight's gradient, `[output, input, 3, 3]`.
struct WeightStrip<'a> {
    sizes: Sizes,
    x: &'a [f32],
    gradient: &'a [f32],
    image: usize,
    start: usize,
    rows: usize,
}

impl WithSimd for WeightStrip<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        // A block has three sums per channel. Four channels need more than the 16 registers that processors with short
        // vectors have.
        if S::F32_LANES >= 16 { self.sums::<S, 4>(simd) } else { self.sums::<S, 2>(simd) }
    }
}

impl WeightStrip<'_> {
    /// The gradients, in blocks of `N` output channels.
    #[inline(always)]
    fn sums<S: Simd, const N: usize>(&self, simd: S) -> Vec<f32> {
        let &Self { sizes, image, .. } = self;
        let mut sums = vec![0.0; sizes.output * sizes.input * TAPS];
        let area = sizes.height * sizes.width;
        for first in (0..sizes.output).step_by(N) {
            // The last block uses the last channel more than once instead of reading past it.
            let channels: [usize; N] = std::array::from_fn(|channel| (first + channel).min(sizes.output - 1));
            let gradients = channels.map(|channel| &self.gradient[(image * sizes.output + channel) * area..][..area]);
            for input in 0..sizes.input {
                let x = &self.x[(image * sizes.input + input) * sizes.plane()..][..sizes.plane()];
                for ky in 0..3 {
                    let taps = self.taps(simd, x, gradients, ky);
                    for (channel, taps) in channels.into_iter().zip(taps) {
                        let to = (channel * sizes.input + input) * TAPS + 3 * ky;
                        sums[to..to + 3].copy_from_slice(&taps);
                    }
                }
            }
        }
        sums
    }

    /// The gradients of the three taps in row `ky` of the kernel, for a block of output channels.
    #[inline(always)]
    fn taps<S: Simd, const N: usize>(&self, simd: S, x: &[f32], gradients: [&[f32]; N], ky: usize) -> [[f32; 3]; N] {
        let &Self { sizes, start, rows, .. } = self;
        let lanes = S::F32_LANES;
        let whole = sizes.width / lanes * lanes;
        let mut vectors = [[simd.splat_f32s(0.0); 3]; N];
        for row in start..start + rows {
            let x = &x[(row + ky) * sizes.stride()..][..sizes.stride()];
            let mut rows_of_gradients = gradients;
            for gradient in &mut rows_of_gradients {
                *gradient = &gradient[row * sizes.width..][..sizes.width];
            }
            let gradients = rows_of_gradients;
            for at in (0..whole).step_by(lanes) {
                let x = &x[at..][..lanes + 2];
                let x = [
                    S::as_simd_f32s(&x[..lanes]).0[0],
                    S::as_simd_f32s(&x[1..][..lanes]).0[0],
                    S::as_simd_f32s(&x[2..][..lanes]).0[0],
                ];
                for channel in 0..N {
                    let gradient = S::as_simd_f32s(&gradients[channel][at..][..lanes]).0[0];
                    for kx in 0..3 {
                        vectors[channel][kx] = simd.mul_add_e_f32s(gradient, x[kx], vectors[channel][kx]);
                    }
                }
            }
            if whole < sizes.width {
                let rest = sizes.width - whole;
                let x = [
                    simd.partial_load_f32s(&x[whole..][..rest]),
                    simd.partial_load_f32s(&x[whole + 1..][..rest]),
                    simd.partial_load_f32s(&x[whole + 2..][..rest]),
                ];
                for channel in 0..N {
                    let gradient = simd.partial_load_f32s(&gradients[channel][whole..]);
                    for kx in 0..3 {
                        vectors[channel][kx] = simd.mul_add_e_f32s(gradient, x[kx], vectors[channel][kx]);
                    }
                }
            }
        }
        // Closures of `map` would not be compiled for the vector instructions.
        let mut sums = [[0.0; 3]; N];
        for channel in 0..N {
            for kx in 0..3 {
                sums[channel][kx] = simd.reduce_sum_f32s(vectors[channel][kx]);
            }
        }
        sums
    }
}
