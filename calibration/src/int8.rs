//! 8-bit numbers: scales, rounding, and the forms that products with weights take in INT8.

use candle_core::Tensor;
use eqim::ops::cost::{Cost, Shape};
use eqim::ops::eager::Eager;
use eqim::ops::{Conv, Ops};
use eqim::{Error, Result};
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Positive levels of weights in integer products on a CPU. Processors without VNNI add pairs of products of an
/// unsigned and a signed byte in 16 bits (`vpmaddubsw`), which 2 · 255 · 64 never fills; 127 levels would.
pub const CPU_WEIGHT_LEVELS: f32 = 64.0;
/// Positive levels of weights elsewhere.
pub const WEIGHT_LEVELS: f32 = 127.0;

/// The smallest number of FP16 that is not below `scale`, so that graphs in FP16 and in FP32 quantize alike and nothing
/// within the range is cut.
///
/// # Errors
/// [`Error::run`] for a scale that is not finite, negative, or beyond FP16.
pub fn representable(scale: f32) -> Result<f32> {
    let rounded = f16::from_f32(scale);
    let up = if rounded.to_f32() < scale { f16::from_bits(rounded.to_bits() + 1) } else { rounded };
    if scale.is_nan() || scale < 0.0 || !up.is_finite() {
        return Err(Error::run("scale", format!("is {scale}, expected a number of FP16 of at least 0")));
    }
    Ok(up.to_f32().max(f16::from_bits(1).to_f32()))
}

/// An unsigned 8-bit quantization: `(q - zero) · scale`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Affine {
    /// Step between two levels.
    pub scale: f32,
    /// The level that means 0.
    pub zero: u8,
}

impl Affine {
    /// Covers `low..=high`, which holds 0.
    ///
    /// # Errors
    /// [`Error::run`] for a range beyond FP16's scales.
    pub fn covering(low: f32, high: f32) -> Result<Self> {
        // Constant zeros: any scale represents them.
        let scale = if low == high { 1.0 } else { representable((high - low) / 255.0)? };
        Ok(Self { scale, zero: (-low / scale).round_ties_even().clamp(0.0, 255.0) as u8 })
    }

    /// What becomes of a value (ONNX `QuantizeLinear` and `DequantizeLinear`).
    pub fn round(self, value: f32) -> f32 {
        let zero = f32::from(self.zero);
        (((value / self.scale).round_ties_even() + zero).clamp(0.0, 255.0) - zero) * self.scale
    }

    /// The range of one tensor as ONNX `DynamicQuantizeLinear` finds it.
    pub fn dynamic(values: &[f32]) -> Self {
        let low = values.iter().copied().fold(0.0, f32::min);
        let high = values.iter().copied().fold(0.0, f32::max);
        let scale = if low == high { 1.0 } else { (high - low) / 255.0 };
        Self { scale, zero: (-low / scale).round_ties_even().clamp(0.0, 255.0) as u8 }
    }
}

/// What becomes of a value in a symmetric 8-bit quantization (ONNX `QuantizeLinear` and `DequantizeLinear`).
pub fn round_symmetric(value: f32, scale: f32) -> f32 {
    (value / scale).round_ties_even().clamp(-128.0, 127.0) * scale
}

/// A weight in 8 bits, its first axis the output channels.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    /// Levels, in the order of the weight.
    pub levels: Vec<i8>,
    /// A scale for every channel.
    pub scales: Vec<f32>,
}

/// Quantizes a weight per output channel; a channel of zeros gets a scale of 1.
///
/// # Errors
/// [`Error::run`] for values beyond FP16's scales.
pub fn round_weight(weight: &Tensor, levels: f32) -> Result<Rounded> {
    let values = weight.flatten_all()?.to_vec1::<f32>()?;
    let channel = values.len() / weight.dim(0)?;
    let largest = |channel: &[f32]| channel.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let scale = |largest: f32| if largest == 0.0 { Ok(1.0) } else { representable(largest / levels) };
    let scales = values.par_chunks(channel).map(|channel| scale(largest(channel))).collect::<Result<Vec<f32>>>()?;
    let level = |value: f32, scale: f32| (value / scale).round_ties_even().clamp(-levels, levels) as i8;
    let rounded = values
        .par_chunks(channel)
        .zip(&scales)
        .flat_map_iter(|(channel, &scale)| channel.iter().map(move |&value| level(value, scale)));
    Ok(Rounded { levels: rounded.collect(), scales })
}

impl Rounded {
    /// The weight's values, in `shape`.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn tensor(&self, shape: &[usize]) -> Result<Tensor> {
        let channel = self.levels.len() / self.scales.len().max(1);
        let channels = self.levels.chunks(channel).zip(&self.scales);
        let values: Vec<f32> =
            channels.flat_map(|(channel, &scale)| channel.iter().map(move |&level| f32::from(level) * scale)).collect();
        Ok(Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?)
    }
}

/// A bias as integer convolutions add it: in 32 bits, at the product of the input's scale and the channel's.
pub fn round_bias(bias: f32, input: f32, weight: f32) -> i32 {
    // The conversion saturates.
    (f64::from(bias) / (f64::from(input) * f64::from(weight))).round_ties_even() as i32
}

/// The forms that products with the weights of the current scope take in INT8, in addition to the primitives of [`Ops`].
pub trait Int8: Ops {
    /// Rounds activations to a symmetric 8-bit grid (ONNX `QuantizeLinear`, `DequantizeLinear`; zero point 0).
    ///
    /// # Errors
    /// When the interpreter refuses.
    fn quantize_dequantize(&mut self, x: &Self::Tensor, scale: f32) -> Result<Self::Tensor>;

    /// [`Ops::gemm`] with a weight that is stored in 8 bits per output channel (ONNX `DequantizeLinear`).
    ///
    /// # Errors
    /// When the interpreter refuses.
    fn dequantized_gemm(&mut self, x: &Self::Tensor, input: usize, output: usize) -> Result<Self::Tensor>;

    /// [`Ops::conv`] with a weight that is stored in 8 bits per output channel (ONNX `DequantizeLinear`).
    ///
    /// # Errors
    /// When the interpreter refuses.
    fn dequantized_conv(&mut self, x: &Self::Tensor, conv: Conv) -> Result<Self::Tensor>;

    /// [`Ops::gemm`] in integers, with activations quantized by the range they have (ONNX `DynamicQuantizeLinear`,
    /// `MatMulInteger`).
    ///
    /// # Errors
    /// When the interpreter refuses.
    fn dynamic_gemm(&mut self, x: &Self::Tensor, input: usize, output: usize) -> Result<Self::Tensor>;

    /// [`Ops::conv`] in integers from an 8-bit input to an 8-bit output of these ranges (ONNX `QLinearConv`). Where the
    /// convolution mirrors its input, it does so after the input is in 8 bits.
    ///
    /// # Errors
    /// When the interpreter refuses.
    fn integer_conv(&mut self, x: &Self::Tensor, conv: Conv, ranges: (Affine, Affine)) -> Result<Self::Tensor>;
}

/// Applies a function to every element.
fn each(x: &Tensor, function: impl Fn(f32) -> f32 + Sync + Send) -> Result<Tensor> {
    let mut values = x.flatten_all()?.to_vec1::<f32>()?;
    values.par_iter_mut().for_each(|value| *value = function(*value));
    Ok(Tensor::from_vec(values, x.shape(), x.device())?)
}

/// The preview of INT8: values on the grids of 8 bits, sums in FP32. Weights, and biases of integer convolutions, have to
/// be rounded beforehand, once: [`Preview`](crate::Preview) does.
impl Int8 for Eager<'_> {
    fn quantize_dequantize(&mut self, x: &Tensor, scale: f32) -> Result<Tensor> {
        each(x, |value| round_symmetric(value, scale))
    }

    fn dequantized_gemm(&mut self, x: &Tensor, input: usize, output: usize) -> Result<Tensor> {
        self.gemm(x, input, output)
    }

    fn dequantized_conv(&mut self, x: &Tensor, conv: Conv) -> Result<Tensor> {
        self.conv(x, conv)
    }

    fn dynamic_gemm(&mut self, x: &Tensor, input: usize, output: usize) -> Result<Tensor> {
        let range = Affine::dynamic(&x.flatten_all()?.to_vec1::<f32>()?);
        let x = each(x, |value| range.round(value))?;
        self.gemm(&x, input, output)
    }

    fn integer_conv(&mut self, x: &Tensor, conv: Conv, (input, output): (Affine, Affine)) -> Result<Tensor> {
        let x = each(x, |value| input.round(value))?;
        let y = self.conv(&x, conv)?;
        each(&y, |value| output.round(value))
    }
}

/// INT8 multiplies and adds as often as FP32.
impl Int8 for Cost {
    fn quantize_dequantize(&mut self, x: &Shape, _scale: f32) -> Result<Shape> {
        Ok(x.clone())
    }

    fn dequantized_gemm(&mut self, x: &Shape, input: usize, output: usize) -> Result<Shape> {
        self.gemm(x, input, output)
    }

    fn dequantized_conv(&mut self, x: &Shape, conv: Conv) -> Result<Shape> {
        self.conv(x, conv)
    }

    fn dynamic_gemm(&mut self, x: &Shape, input: usize, output: usize) -> Result<Shape> {
        self.gemm(x, input, output)
    }

    fn integer_conv(&mut self, x: &Shape, conv: Conv, _ranges: (Affine, Affine)) -> Result<Shape> {
        self.conv(x, conv)
    }
}
