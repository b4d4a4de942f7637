//! Products with weights in INT8, as ONNX nodes.

use super::conv_attributes;
use eqim::Result;
use eqim::ops::{Conv, Dim, Ops, OpsExt, function, scoped};
use eqim_calibration::int8::{Affine, Int8};

use super::{Lower, Value};
use crate::onnx::{AttributeProto, DataType};

/// Name of a weight's levels in the weights file.
pub fn weight_name(weight: &str) -> String {
    format!("{weight}.int8")
}

/// Name of a weight's scales, one per output channel.
pub fn scale_name(weight: &str) -> String {
    format!("{weight}.scale")
}

/// Name of the sums of a weight's levels, one per output channel.
pub fn sum_name(weight: &str) -> String {
    format!("{weight}.sum")
}

/// Name of a bias in 32-bit integers.
pub fn bias_name(bias: &str) -> String {
    format!("{bias}.int32")
}

impl Lower<'_> {
    /// Levels and scales of the scope's weight.
    fn weight_levels(&mut self) -> Result<(Value, Value)> {
        let name = scoped(&self.scope, "weight");
        Ok((self.stored(&weight_name(&name))?, self.stored(&scale_name(&name))?))
    }

    /// The scope's weight, dequantized.
    fn dequantized_weight(&mut self) -> Result<Value> {
        let (levels, scale) = self.weight_levels()?;
        let axis = vec![AttributeProto::int("axis", 0)];
        Ok(self.node("DequantizeLinear", &[&levels, &scale], axis, scale.data_type))
    }

    /// Quantizes every row of `x [rows, in]` by its own range, which includes 0. Returns the levels, and the scales and
    /// zero points `[rows, 1]`, both as floating-point numbers.
    fn quantize_rows(&mut self, x: &Value) -> Result<(Value, Value, Value)> {
        let float = DataType::Float;
        let [zero, one, levels] = [0.0, 1.0, 255.0].map(|value| self.floats(&[], &[value]));
        let end = |lower: &mut Self, reduce: &str, limit: &str| {
            let end = lower.reduce(reduce, x, &[1], true);
            lower.node(limit, &[&end, &zero], vec![], float)
        };
        let (low, high) = (end(self, "ReduceMin", "Min"), end(self, "ReduceMax", "Max"));
        let range = self.sub(&high, &low)?;
        let scale = self.node("Div", &[&range, &levels], vec![], float);
        let is_zero = self.node("Equal", &[&range, &zero], vec![], DataType::Bool);
        let scale = self.node("Where", &[&is_zero, &one, &scale], vec![], float);
        let round = |lower: &mut Self, x: &Value| {
            let x = lower.node("Div", &[x, &scale], vec![], float);
            lower.node("Round", &[&x], vec![], float)
        };
        let shift = round(self, &low);
        let shift = self.node("Neg", &[&shift], vec![], float);
        let shift = self.clamp(&shift, 0.0, 255.0)?;
        let x = round(self, x);
        let x = self.add(&x, &shift)?;
        let x = self.clamp(&x, 0.0, 255.0)?;
        Ok((self.cast(&x, DataType::Uint8), scale, shift))
    }

    /// Scale and zero point of an unsigned quantization.
    fn affine(&mut self, affine: Affine) -> [Value; 2] {
        let scale = self.floats(&[], &[affine.scale]);
        [scale, self.initializer(DataType::Uint8, &[], vec![affine.zero])]
    }
}

impl Int8 for Lower<'_> {
    fn quantize_dequantize(&mut self, x: &Value, scale: f32) -> Result<Value> {
        let compute = self.compute;
        let x = self.cast(x, compute);
        // Scales are FP16 numbers, so the conversion to FP16 is exact.
        let scale = match compute {
            DataType::Float16 => self.initializer(compute, &[], half::f16::from_f32(scale).to_le_bytes().to_vec()),
            DataType::Bfloat16 => self.initializer(compute, &[], half::bf16::from_f32(scale).to_le_bytes().to_vec()),
            _ => self.floats(&[], &[scale]),
        };
        let zero = self.initializer(DataType::Int8, &[], vec![0]);
        let levels = self.node("QuantizeLinear", &[&x, &scale, &zero], vec![], DataType::Int8);
        Ok(self.node("DequantizeLinear", &[&levels, &scale, &zero], vec![], compute))
    }

    fn dequantized_gemm(&mut self, x: &Value, _input: usize, output: usize) -> Result<Value> {
        let bias = self.param("bias", &[output])?;
        let weight = self.dequantized_weight()?;
        Ok(self.gemm_node(x, &weight, &bias))
    }

    fn dequantized_conv(&mut self, x: &Value, conv: Conv) -> Result<Value> {
        let bias = self.param("bias", &[conv.output])?;
        let x = self.reflected(x, conv)?;
        let weight = self.dequantized_weight()?;
        Ok(self.computed("Conv", &[&x, &weight, &bias], conv_attributes(conv)))
    }

    fn dynamic_gemm(&mut self, x: &Value, shape: &[usize]) -> Result<Value> {
        let [y] = self.function(function::DYNAMIC_LINEAR, &[x], |lower, inputs| {
            let weight = scoped(&lower.scope, "weight");
            let levels = lower.stored(&weight_name(&weight))?;
            let sums = lower.stored(&sum_name(&weight))?;
            let scale = lower.stored(&scale_name(&weight))?;
            let bias = lower.param("bias", &shape[..1])?;
            let (x, x_scale, x_zero) = lower.quantize_rows(&inputs[0])?;
            // From blocks [out/lanes, in/group, lanes, group] to [in, out]. All layers share this function, so its body has no
            // sizes.
            let levels = lower.permute(&levels, &[1, 3, 0, 2])?;
            let levels = lower.reshape(&levels, &[Dim::Rest, Dim::Of(&scale, 0)])?;
            let products = lower.node("MatMulInteger", &[&x, &levels], vec![], DataType::Int32);
            let x_zero = lower.cast(&x_zero, DataType::Int32);
            let shift = lower.node("Mul", &[&x_zero, &sums], vec![], DataType::Int32);
            let products = lower.node("Sub", &[&products, &shift], vec![], DataType::Int32);
            let products = lower.cast(&products, DataType::Float);
            let scale = lower.mul(&x_scale, &scale)?;
            let y = lower.mul(&products, &scale)?;
            Ok([lower.add(&y, &bias)?])
        })?;
        Ok(y)
    }

    fn integer_conv(&mut self, x: &Value, conv: Conv, (input, output): (Affine, Affine)) -> Result<Value> {
        let (levels, scale) = self.weight_levels()?;
        let bias = self.stored(&bias_name(&scoped(&self.scope, "bias")))?;
        let channels = self.weights.get(&scale.name).map_or(0, |place| place.shape[0]);
        let zeros = self.initializer(DataType::Int8, &[channels], vec![0; channels]);
        let [x_scale, x_zero] = self.affine(input);
        let [y_scale, y_zero] = self.affine(output);
        let x = self.node("QuantizeLinear", &[x, &x_scale, &x_zero], vec![], DataType::Uint8);
        let x = self.reflected(&x, conv)?;
        let inputs = [&x, &x_scale, &x_zero, &levels, &scale, &zeros, &y_scale, &y_zero, &bias];
        let y = self.node("QLinearConv", &inputs, conv_attributes(conv), DataType::Uint8);
        Ok(self.node("DequantizeLinear", &[&y, &y_scale, &y_zero], vec![], DataType::Float))
    }
}
