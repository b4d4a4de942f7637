//! Checkpoints in Python: their tensors, and their export.

use std::ffi::OsString;
use std::path::PathBuf;

use candle_core::Tensor;
use eqim::checkpoint::{self, Hints, Part, WeightSet};
use eqim::engine::candle::to_array;
use numpy::PyArrayDyn;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::{OrRaise, bad_input};
use crate::libraries;
use crate::settings::{argument, value};

/// Load the tensors of a checkpoint: of the reference (.pth, .ckpt), or .safetensors.
///
/// Parameters
/// ----------
/// path
///     The checkpoint.
/// part
///     Half of the model. By default, all halves that the file has.
/// weights
///     The moving averages or the trained weights. By default those with which the reference samples.
/// heads
///     Number of attention heads, if the file does not have it.
///
/// Returns
/// -------
/// dict
///     Tensors by the names of the reference, float32.
///
/// Raises
/// ------
/// NotFoundError
///     If there is no such file.
/// InputError
///     If the file is not a checkpoint of such a model.
#[pyfunction]
#[pyo3(signature = (path, *, part=None, weights=None, heads=None))]
pub fn load_checkpoint<'py>(
    py: Python<'py>,
    #[pyo3(from_py_with = argument)] path: PathBuf,
    #[pyo3(from_py_with = argument)] part: Option<&str>,
    #[pyo3(from_py_with = argument)] weights: Option<&str>,
    #[pyo3(from_py_with = argument)] heads: Option<usize>,
) -> PyResult<Bound<'py, PyDict>> {
    let unknown = |keyword: &str, found: &str, expected: &str| {
        bad_input(py, format!("{keyword} is {found:?}, expected {expected}"))
    };
    let part = match part {
        None => None,
        Some("generator") => Some(Part::Generator),
        Some("tokenizer") => Some(Part::Tokenizer),
        Some(other) => return Err(unknown("part", other, "generator or tokenizer")),
    };
    let set = match weights {
        None => None,
        Some("ema") => Some(WeightSet::Ema),
        Some("raw") => Some(WeightSet::Raw),
        Some(other) => return Err(unknown("weights", other, "ema or raw")),
    };
    let hints = Hints { heads, ..Hints::default() };
    let loaded = py.detach(|| {
        let parts = part.map_or_else(|| checkpoint::parts(&path), |part| Ok(vec![part]))?;
        checkpoint::load_parts(&path, &parts, set, &hints)
    });
    let tensors = PyDict::new(py);
    for (name, tensor) in loaded.or_raise(py)?.iter() {
        tensors.set_item(name, array(py, tensor)?)?;
    }
    Ok(tensors)
}

/// A tensor as an array.
fn array<'py>(py: Python<'py>, tensor: &Tensor) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
    Ok(PyArrayDyn::from_owned_array(py, to_array(tensor).or_raise(py)?))
}

/// Export a checkpoint to a bundle, as ``eqim-export onnx`` does.
///
/// Parameters
/// ----------
/// output
///     Folder to write.
/// **options
///     The options of ``eqim-export onnx``, with underscores for dashes: ``generator``, ``tokenizer``, ``class_names``,
///     ``dtype``, ``int8=True`` and the others of ``eqim-export onnx --help``.
///
/// Returns
/// -------
/// pathlib.Path
///     The folder.
#[pyfunction]
#[pyo3(signature = (*, output, **options))]
pub fn export(
    py: Python<'_>,
    #[pyo3(from_py_with = argument)] output: PathBuf,
    options: Option<&Bound<'_, PyDict>>,
) -> PyResult<PathBuf> {
    libraries::find(py)?;
    let mut arguments = vec![OsString::from("--output"), output.clone().into()];
    for (keyword, given) in options.into_iter().flatten() {
        let keyword: String = keyword.extract()?;
        let flag = format!("--{}", keyword.replace('_', "-"));
        let values = match value(&keyword, &given)? {
            serde_json::Value::Array(values) => values,
            value => vec![value],
        };
        for value in values {
            match value {
                serde_json::Value::Null | serde_json::Value::Bool(false) => {}
                serde_json::Value::Bool(true) => arguments.push(flag.clone().into()),
                serde_json::Value::String(text) => arguments.push(format!("{flag}={text}").into()),
                other => arguments.push(format!("{flag}={other}").into()),
            }
        }
    }
    py.detach(|| eqim_programs::export::export(arguments)).or_raise(py)?;
    Ok(output)
}
