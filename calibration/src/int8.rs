//! 8-bit quantization: scales, rounding, and the INT8 variants of products with weights.

use candle_core::Tensor;
use eqim::ops::cost::{Cost, Shape};
use eqim::ops::eager::Eager;
use eqim::ops::{Conv, Dim, Ops, OpsExt};
use eqim::{Error, Result};
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Number of positive levels of weights in integer products on a CPU. Processors without VNNI multiply unsigned by
/// signed bytes and add pairs of these products in 16 bits (`vpmaddubsw`). With 64 levels the sum is at most
/// `2 · 255 · 64` and never saturates; with 127 levels it can.
pub const CPU_WEIGHT_LEVELS: f32 = 64.0;
/// Number of positive levels of weights in all other products.
pub const WEIGHT_LEVELS: f32 = 127.0;

/// The smallest positive FP16 number that is at least `scale`. With it, graphs in FP16 and in FP32 quantize
/// identically, and no value within the range is clipped.
///
/// # Errors
/// [`Error::run`] if the scale is negative, not finite, or beyond the FP16 range.
pub fn representable(scale: f32) -> Result<f32> {
    let rounded = f16::from_f32(scale);
    let up = if rounded.to_f32() < scale { f16::from_bits(rounded.to_bits() + 1) } else { rounded };
    if scale.is_nan() || scale < 0.0 || !up.is_finite() {
        return Err(Error::run("scale", format!("is {scale}, expected a number of FP16 of at least 0")));
    }
    Ok(up.to_f32().max(f16::from_bits(1).to_f32()))
}

/// An unsigned 8-bit quantization: the level `q` represents the value `(q - zero) · scale`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Affine {
    /// Step between two neighbouring levels.
    pub scale: f32,
    /// Zero point: the level that represents 0.
    pub zero: u8,
}

impl Affine {
    /// The quantization that covers `low..=high`. This range must include 0.
    ///
    /// # Errors
    /// [`Error::run`] if FP16 cannot represent the scale.
    pub fn covering(low: f32, high: f32) -> Result<Self> {
        // All values are 0, which any scale represents.
        let scale = if low == high { 1.0 } else { representable((high - low) / 255.0)? };
        Ok(Self { scale, zero: (-low / scale).round_ties_even().clamp(0.0, 255.0) as u8 })
    }

    /// Quantizes and dequantizes a value (ONNX `QuantizeLinear` and `DequantizeLinear`).
    pub fn round(self, value: f32) -> f32 {
        let zero = f32::from(self.zero);
        (((value / self.scale).round_ties_even() + zero).clamp(0.0, 255.0) - zero) * self.scale
    }

    /// The quantization that covers the values of one row (ONNX `DynamicQuantizeLinear`).
    pub fn dynamic(values: &[f32]) -> Self {
        let low = values.iter().copied().fold(0.0, f32::min);
        let high = values.iter().copied().fold(0.0, f32::max);
        let scale = if low == high { 1.0 } else { (high - low) / 255.0 };
        Self { scale, zero: (-low / scale).round_ties_even().clamp(0.0, 255.0) as u8 }
    }
}

/// Quantizes and dequantizes a value symmetrically in 8 bits (ONNX `QuantizeLinear` and `DequantizeLinear`).
pub fn round_symmetric(value: f32, scale: f32) -> f32 {
    (value / scale).round_ties_even().clamp(-128.0, 127.0) * scale
}

/// A weight in 8 bits. Its first axis is the output channels.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    /// Levels, in the order of the weight's elements.
    pub levels: Vec<i8>,
    /// Scales, one per output channel.
    pub scales: Vec<f32>,
}

/// Quantizes a weight per output channel. A channel of zeros gets a scale of 1.
///
/// # Errors
/// [`Error::run`] if FP16 cannot represent a scale.
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
    /// The dequantized weight in `shape`.
    ///
    /// # Errors
    /// If the number of elements does not fit the shape.
    pub fn tensor(&self, shape: &[usize]) -> Result<Tensor> {
        let channel = self.levels.len() / self.scales.len().max(1);
        let channels = self.levels.chunks(channel).zip(&self.scales);
        let values: Vec<f32> =
            channels.flat_map(|(channel, &scale)| channel.iter().map(move |&level| f32::from(level) * scale)).collect();
        Ok(Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?)
    }
}

/// Quantizes a bias for an integer convolution: to 32 bits, with the product of the scale of the input and the scale of
/// the weight's channel as its scale.
pub fn round_bias(bias: f32, input: f32, weight: f32) -> i32 {
    // The conversion saturates.
    (f64::from(bias) / (f64::from(input) * f64::from(weight))).round_ties_even() as i32
}

/// INT8 variants of products with the weights of the current scope, in addition to the primitives of [`Ops`].
pub trait Int8: Ops {
    /// Rounds activations to the levels of a symmetric 8-bit quantization (ONNX `QuantizeLinear` and
    /// `DequantizeLinear`, with zero point 0).
    ///
    /// # Errors
    /// If the interpreter fails.
    fn quantize_dequantize(&mut self, x: &Self::Tensor, scale: f32) -> Result<Self::Tensor>;

    /// [`Ops::gemm`] with a weight that is stored in 8 bits, with one scale per output channel (ONNX
    /// `DequantizeLinear`).
    ///
    /// # Errors
    /// If the interpreter fails.
    fn dequantized_gemm(&mut self, x: &Self::Tensor, input: usize, output: usize) -> Result<Self::Tensor>;

    /// [`Ops::conv`] with a weight that is stored in 8 bits, with one scale per output channel (ONNX
    /// `DequantizeLinear`).
    ///
    /// # Errors
    /// If the interpreter fails.
    fn dequantized_conv(&mut self, x: &Self::Tensor, conv: Conv) -> Result<Self::Tensor>;

    /// `x [rows, input] · weightᵀ + bias` in integers (ONNX `MatMulInteger`), with the weight of the current scope. Its
    /// `shape` is `[output, …]`, and all axes but the first one are `input`. At run time, every row of `x` is quantized by
    /// its own range ([`Affine::dynamic`]), so that no row depends on the others.
    ///
    /// # Errors
    /// If the interpreter fails.
    fn dynamic_gemm(&mut self, x: &Self::Tensor, shape: &[usize]) -> Result<Self::Tensor>;

    /// [`Ops::conv`] in integers (ONNX `QLinearConv`). `ranges` are the quantizations of the input and the output. If
    /// the convolution pads its input by reflection, the padding follows the quantization of the input.
    ///
    /// # Errors
    /// If the interpreter fails.
    fn integer_conv(&mut self, x: &Self::Tensor, conv: Conv, ranges: (Affine, Affine)) -> Result<Self::Tensor>;
}

/// `x · weightᵀ + bias` with the weight of the current scope, in primitives. `shape` is that of the weight.
fn plain_gemm<O: Ops>(o: &mut O, x: &O::Tensor, shape: &[usize]) -> Result<O::Tensor> {
    let (weight, bias) = (o.param("weight", shape)?, o.param("bias", &shape[..1])?);
    let weight = o.reshape(&weight, &[Dim::Is(shape[0]), Dim::Rest])?;
    let weight = o.permute(&weight, &[1, 0])?;
    let y = o.matmul(x, &weight)?;
    o.add(&y, &bias)
}

/// Applies a function to every element.
fn each(x: &Tensor, function: impl Fn(f32) -> f32 + Sync + Send) -> Result<Tensor> {
    let mut values = x.flatten_all()?.to_vec1::<f32>()?;
    values.par_iter_mut().for_each(|value| *value = function(*value));
    Ok(Tensor::from_vec(values, x.shape(), x.device())?)
}

/// Simulation of INT8: values are rounded to 8-bit levels, sums are in FP32. The weights, and the biases of integer
/// convolutions, must be rounded before. [`Preview`](crate::Preview) does this once.
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

    fn dynamic_gemm(&mut self, x: &Tensor, shape: &[usize]) -> Result<Tensor> {
        let mut values = x.flatten_all()?.to_vec1::<f32>()?;
        for row in values.chunks_mut(shape[1..].iter().product()) {
            let range = Affine::dynamic(row);
            row.iter_mut().for_each(|value| *value = range.round(*value));
        }
        plain_gemm(self, &Tensor::from_vec(values, x.shape(), x.device())?, shape)
    }

    fn integer_conv(&mut self, x: &Tensor, conv: Conv, (input, output): (Affine, Affine)) -> Result<Tensor> {
        let x = each(x, |value| input.round(value))?;
        let y = self.conv(&x, conv)?;
        each(&y, |value| output.round(value))
    }
}

/// INT8 has as many multiply-adds as FP32.
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

    fn dynamic_gemm(&mut self, x: &Shape, shape: &[usize]) -> Result<Shape> {
        plain_gemm(self, x, shape)
    }

    fn integer_conv(&mut self, x: &Shape, conv: Conv, _ranges: (Affine, Affine)) -> Result<Shape> {
        self.conv(x, conv)
    }
}
