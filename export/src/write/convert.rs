//! A weight in the precision of a bundle.

use candle_core::{DType, Tensor};
use eqim::bundle::Precision;
use eqim::{Error, Result};

/// A weight in a precision.
///
/// # Errors
/// [`Error::input`] if a value exceeds the range of FP16.
pub fn convert(name: &str, tensor: &Tensor, precision: Precision) -> Result<Tensor> {
    match precision {
        Precision::Fp32 => return Ok(tensor.clone()),
        Precision::Bf16 => return Ok(tensor.to_dtype(DType::BF16)?),
        Precision::Fp16 => {}
    }
    let largest = tensor.abs()?.max_all()?.to_scalar::<f32>()?;
    let limit = half::f16::MAX.to_f32();
    if largest > limit {
        return Err(Error::input(
            format!("tensor {name}"),
            format!("has a value of {largest}, beyond FP16's {limit}: export in FP32"),
        ));
    }
    Ok(tensor.to_dtype(DType::F16)?)
}
