//! Arrays, tensors and pictures of other libraries as arrays of ours.

use std::path::{Path, PathBuf};

use eqim::picture;
use eqim::request::MOST_TOKENS;
use image::RgbImage;
use ndarray::{Array2, Array3};
use numpy::{PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::error::{OrRaise, bad_input, bad_input_caused};
use crate::image::Image;
use crate::settings;

/// The NumPy array of an object: an array, a tensor of another library (by DLPack), or what NumPy converts.
fn array<'py>(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyUntypedArray>> {
    let py = object.py();
    if let Ok(array) = object.cast::<PyUntypedArray>() {
        return Ok(array.clone());
    }
    let function = if object.hasattr("__dlpack__")? { "from_dlpack" } else { "asarray" };
    let converted = py.import("numpy")?.call_method1(function, (object,));
    Ok(converted.map_err(|cause| caused(py, &format!("{name} is not an array"), cause))?.cast_into()?)
}

/// The exception for an object that another library cannot convert.
fn caused(py: Python<'_>, problem: &str, cause: PyErr) -> PyErr {
    // Interrupts stay what they are.
    if !cause.is_instance_of::<PyException>(py) {
        return cause;
    }
    bad_input_caused(py, format!("{problem}: {}", cause.value(py)), cause)
}

/// Latents `[N, E]` of an object.
///
/// # Errors
/// `InputError` naming the type or the shape that does not fit, or if a value is not finite.
pub fn latents(object: &Bound<'_, PyAny>, embed: usize) -> PyResult<Array2<f32>> {
    let (py, array) = (object.py(), array("latents", object)?);
    let (kind, shape) = (array.dtype().kind(), array.shape());
    if kind != b'f' || !matches!(shape, &[count, values] if count >= 2 && values == embed) {
        let found = format!("{} of shape {shape:?}", array.dtype());
        return Err(bad_input(py, format!("latents are {found}, expected float32 of shape [2 or more, {embed}]")));
    }
    if shape[0] > MOST_TOKENS {
        return Err(bad_input(py, format!("latents are {} tokens, expected at most {MOST_TOKENS}", shape[0])));
    }
    // Copies other floating-point types and other orders in memory.
    let array = py.import("numpy")?.call_method1("ascontiguousarray", (array, "float32"))?;
    let array = array.cast_into::<PyArrayDyn<f32>>()?.readonly();
    let values = array.as_array().iter().copied().collect::<Vec<f32>>();
    if values.iter().any(|value| !value.is_finite()) {
        return Err(bad_input(py, "latents have a value that is not finite"));
    }
    let count = values.len() / embed;
    Array2::from_shape_vec((count, embed), values).map_err(|error| bad_input(py, format!("latents: {error}")))
}

/// A picture: the path of a PNG or JPEG, an [`Image`], an image of Pillow, or an array of bytes `[height, width, 3]`.
///
/// # Errors
/// `InputError` if it is none of these; `NotFoundError` if there is no such file.
pub fn picture(photo: &Bound<'_, PyAny>) -> PyResult<RgbImage> {
    let py = photo.py();
    if photo.is_instance_of::<PyString>() || photo.hasattr("__fspath__")? {
        let path: PathBuf = settings::argument(photo)?;
        return py.detach(|| picture::load(&path)).or_raise(py);
    }
    let pixels = match photo.cast::<Image>() {
        Ok(image) => image.get().pixels.bind(py).as_any().clone(),
        // Pictures of Pillow can have a palette, or no colours.
        Err(_) if photo.hasattr("convert")? => {
            let converted = photo.call_method1("convert", ("RGB",));
            converted.map_err(|cause| caused(py, "photo cannot be converted to RGB", cause))?
        }
        Err(_) => photo.clone(),
    };
    let array = array("photo", &pixels)?;
    let shape = array.shape().to_vec();
    let bytes =
        array.cast::<PyArrayDyn<u8>>().ok().filter(|_| matches!(shape[..], [height, width, 3] if height * width > 0));
    let Some(bytes) = bytes else {
        let found = format!("{} of shape {shape:?}", array.dtype());
        return Err(bad_input(py, format!("photo is {found}, expected a path, a picture or uint8 [height, width, 3]")));
    };
    if (shape[0] * shape[1]) as u64 > picture::MOST_PIXELS {
        let most = picture::MOST_PIXELS / 1_000_000;
        return Err(bad_input(py, format!("photo has shape {shape:?}, expected at most {most} million pixels")));
    }
    let bytes: Vec<u8> = bytes.readonly().as_array().iter().copied().collect();
    let image = RgbImage::from_raw(shape[1] as u32, shape[0] as u32, bytes);
    image.ok_or_else(|| bad_input(py, format!("photo has shape {shape:?}")))
}

/// Pixels of a picture at the height of a model, `[3, height, width]`, mirrored if the picture is continued to the left.
///
/// # Errors
/// `InputError` if the picture is too narrow or too wide.
pub fn beginning(
    photo: &Bound<'_, PyAny>,
    (height, multiple): (usize, usize),
    side: picture::Side,
) -> PyResult<Array3<f32>> {
    let image = picture(photo)?;
    let scaled = || picture::beginning(Path::new("photo"), image, height, multiple, side);
    Ok(photo.py().detach(scaled).or_raise(photo.py())?.pixels)
}
