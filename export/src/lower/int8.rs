//! Products with weights in INT8, as ONNX nodes.

use eqim::Result;
use eqim::ops::{Conv, Ops, scoped};
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
        let x = if conv.reflect { self.pad_reflect(x, conv.spatial)? } else { x.clone() };
        let weight = self.dequantized_weight()?;
        Ok(self.computed("Conv", &[&x, &weight, &bias], vec![]))
    }

    fn dynamic_gemm(&mut self, x: &Value, _input: usize, output: usize) -> Result<Value> {
        let (float, byte) = (DataType::Float, DataType::Uint8);
        let bias = self.param("bias", &[output])?;
        let (levels, scale) = self.weight_levels()?;
        let outputs = [("output", byte), ("scale", float), ("zero_point", byte)];
        let [x, x_scale, x_zero] = self.node_of("DynamicQuantizeLinear", &[x], vec![], outputs);
        let zero = self.initializer(DataType::Int8, &[], vec![0]);
        let sums = self.node("MatMulInteger", &[&x, &levels, &x_zero, &zero], vec![], DataType::Int32);
        let sums = self.cast(&sums, float);
        let scale = self.node("Mul", &[&x_scale, &scale], vec![], float);
        let y = self.node("Mul", &[&sums, &scale], vec![], float);
        Ok(self.node("Add", &[&y, &bias], vec![], float))
    }

    fn integer_conv(&mut self, x: &Value, conv: Conv, (input, output): (Affine, Affine)) -> Result<Value> {
        let (levels, scale) = self.weight_levels()?;
        let bias = self.stored(&bias_name(&scoped(&self.scope, "bias")))?;
        let channels = self.weights.get(&scale.name).map_or(0, |place| place.shape[0]);
        let zeros = self.initializer(DataType::Int8, &[channels], vec![0; channels]);
        let [x_scale, x_zero] = self.affine(input);
        let [y_scale, y_zero] = self.affine(output);
        let x = self.node("QuantizeLinear", &[x, &x_scale, &x_zero], vec![], DataType::Uint8);
        let x = if conv.reflect { self.pad_reflect(&x, conv.spatial)? } else { x };
        let inputs = [&x, &x_scale, &x_zero, &levels, &scale, &zeros, &y_scale, &y_zero, &bias];
        let y = self.node("QLinearConv", &inputs, vec![], DataType::Uint8);
        Ok(self.node("DequantizeLinear", &[&y, &y_scale, &y_zero], vec![], DataType::Float))
    }
}
