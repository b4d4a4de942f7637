//! Conversion of arrays to inputs of graphs, and of outputs to arrays.

use eqim::{Result, ResultExt};
use half::f16;
use ndarray::{Array, ArrayView, Dimension};
pub use ort::value::DynValue;
use ort::value::Tensor;

use super::failure::failed;

/// Converts an array to an input.
///
/// # Errors
/// [`eqim::Error::run`] if ONNX Runtime refuses the shape.
pub fn float_input<D: Dimension>(array: ArrayView<f32, D>) -> Result<DynValue> {
    let values: Vec<f32> = array.iter().copied().collect();
    Ok(Tensor::from_array((array.shape().to_vec(), values)).map_err(failed("input"))?.into_dyn())
}

/// Converts an FP16 array, a cache, to an input.
///
/// # Errors
/// [`eqim::Error::run`] if ONNX Runtime refuses the shape.
pub fn half_input<D: Dimension>(array: Array<f16, D>) -> Result<DynValue> {
    let shape = array.shape().to_vec();
    let values: Vec<f16> = array.into_iter().collect();
    Ok(Tensor::from_array((shape, values)).map_err(failed("input"))?.into_dyn())
}

/// Converts integers `[rows]` to an input.
///
/// # Errors
/// [`eqim::Error::run`] if ONNX Runtime refuses the values.
pub fn integer_input(values: &[i64]) -> Result<DynValue> {
    Ok(Tensor::from_array((vec![values.len()], values.to_vec())).map_err(failed("input"))?.into_dyn())
}

/// Converts a tensor of `f32` or `f16` to an array with the same number of axes.
///
/// # Errors
/// [`eqim::Error::run`] if the tensor has another type or rank.
pub fn float_output<D: Dimension>(value: &DynValue) -> Result<Array<f32, D>> {
    let (shape, values) = match value.try_extract_tensor::<f32>() {
        Ok((shape, values)) => (shape, values.to_vec()),
        Err(_) => {
            let (shape, values) = value.try_extract_tensor::<f16>().map_err(failed("output"))?;
            (shape, values.iter().map(|value| value.to_f32()).collect())
        }
    };
    let shape: Vec<usize> = shape.iter().map(|&size| size as usize).collect();
    let array = Array::from_shape_vec(shape, values).and_then(Array::into_dimensionality);
    array.or_run("output")
}
