//! Arrays as inputs of graphs, and outputs as arrays.

use eqim::{Result, ResultExt};
use half::f16;
use ndarray::{Array, ArrayView, Dimension};
pub use ort::value::DynValue;
use ort::value::Tensor;

use super::runtime::failed;

/// An array as an input.
///
/// # Errors
/// [`Error::run`] when ONNX Runtime refuses its shape.
pub fn float_input<D: Dimension>(array: ArrayView<f32, D>) -> Result<DynValue> {
    let values: Vec<f32> = array.iter().copied().collect();
    Ok(Tensor::from_array((array.shape().to_vec(), values)).map_err(failed("input"))?.into_dyn())
}

/// An array of FP16, a cache, as an input.
///
/// # Errors
/// [`Error::run`] when ONNX Runtime refuses its shape.
pub fn half_input<D: Dimension>(array: Array<f16, D>) -> Result<DynValue> {
    let shape = array.shape().to_vec();
    let values: Vec<f16> = array.into_iter().collect();
    Ok(Tensor::from_array((shape, values)).map_err(failed("input"))?.into_dyn())
}

/// Integers `[rows]` as an input.
///
/// # Errors
/// [`Error::run`] when ONNX Runtime refuses them.
pub fn integer_input(values: &[i64]) -> Result<DynValue> {
    Ok(Tensor::from_array((vec![values.len()], values.to_vec())).map_err(failed("input"))?.into_dyn())
}

/// Values of `f32` or `f16` as an array of as many axes.
///
/// # Errors
/// [`Error::run`] for values of another type or rank.
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
