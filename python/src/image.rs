//! Images in Python.

use std::path::PathBuf;

use eqim::bundle::FileRecord;
use eqim::digest::sha256;
use eqim::picture::{self, Format};
use eqim::request::record::{Origin, Record};
use eqim::{ResultExt, files};
use ndarray::Array3;
use numpy::{PyArray1, PyArray2, PyArray3, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::error::{OrRaise, bad_input, bad_input_caused};
use crate::making::Making;
use crate::settings;

/// Pixels of an array `[height, width, 3]`, row by row.
type Bytes = PyArray3<u8>;

/// An image. Notebooks show it, and NumPy and DLPack read it without a copy.
#[pyclass(frozen, module = "eqim")]
pub struct Image {
    pub pixels: Py<Bytes>,
    /// Tokens of a generated image, float32 [tokens, embed] in the order of generation. Latents are the tokens divided
    /// by the model's ``vae_norm``.
    #[pyo3(get)]
    tokens: Option<Py<PyArray2<f32>>>,
    /// What made a generated image.
    origin: Option<Origin>,
}

impl Image {
    /// An image that is complete.
    ///
    /// # Errors
    /// Those of Python.
    pub fn generated(py: Python<'_>, making: Making) -> PyResult<Self> {
        let tokens = PyArray2::from_owned_array(py, making.tokens).unbind();
        let pixels = pixels(py, making.pixels.bytes, making.pixels.size)?;
        Ok(Self { pixels, tokens: Some(tokens), origin: Some(making.origin) })
    }

    /// An image of decoded pixels `[3, height, width]`.
    ///
    /// # Errors
    /// Those of Python.
    pub fn decoded(py: Python<'_>, image: &Array3<f32>) -> PyResult<Self> {
        let (_, height, width) = image.dim();
        let bytes = py.detach(|| picture::bytes(image.view()));
        Ok(Self { pixels: pixels(py, bytes, (width, height))?, tokens: None, origin: None })
    }
}

/// Bytes, row by row, as an array `[height, width, 3]` that owns them.
fn pixels(py: Python<'_>, bytes: Vec<u8>, (width, height): (usize, usize)) -> PyResult<Py<Bytes>> {
    Ok(PyArray1::from_vec(py, bytes).reshape([height, width, 3])?.unbind())
}

/// The bytes, row by row, and the size of an array of pixels. They are copied, because Python may change them.
fn contents(py: Python<'_>, pixels: &Py<Bytes>) -> (Vec<u8>, (u32, u32)) {
    let array = pixels.bind(py);
    let (height, width) = (array.dims()[0] as u32, array.dims()[1] as u32);
    (array.readonly().as_array().iter().copied().collect(), (width, height))
}

/// An image of Pillow.
fn to_pil<'py>(py: Python<'py>, pixels: &Py<Bytes>) -> PyResult<Bound<'py, PyAny>> {
    let missing = |cause| bad_input_caused(py, "Pillow is not installed: pip install pillow", cause);
    let pillow = py.import("PIL.Image").map_err(missing)?;
    pillow.call_method1("fromarray", (pixels,))
}

/// The file of an image.
fn file(py: Python<'_>, pixels: &Py<Bytes>, format: Format) -> PyResult<Vec<u8>> {
    let (bytes, size) = contents(py, pixels);
    py.detach(|| picture::encode(&bytes, size, format)).or_raise(py)
}

/// A view of pixels. Python can change the shape of an array in place, which must not be that of the image.
fn view<'py>(py: Python<'py>, pixels: &Py<Bytes>) -> PyResult<Bound<'py, PyAny>> {
    pixels.bind(py).call_method0("view")
}

#[pymethods]
impl Image {
    /// Settings of a generated image, as ``eqim-run`` records them.
    #[getter]
    fn settings<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(origin) = &self.origin else { return Ok(None) };
        // As text, a number of 32 bits has the fewest digits that give it back, as in the records of eqim-run.
        let text = serde_json::to_string(&origin.settings).or_run("settings").or_raise(py)?;
        let settings = py.import("json")?.call_method1("loads", (text,))?.cast_into::<PyDict>()?;
        for (name, value) in &settings.copy()? {
            if value.is_none() {
                settings.del_item(name)?;
            }
        }
        Ok(Some(settings.into_any()))
    }

    /// The files of a generated image, as ``eqim-run --jobs`` writes them.
    ///
    /// Parameters
    /// ----------
    /// name
    ///     Id of the job, which names its image in the record.
    ///
    /// Returns
    /// -------
    /// tuple of bytes and str
    ///     The PNG ``NAME.png`` and the record ``NAME.json``.
    ///
    /// Raises
    /// ------
    /// InputError
    ///     If the image was not generated.
    fn files<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = settings::argument)] name: String,
    ) -> PyResult<(Bound<'py, PyBytes>, String)> {
        let origin =
            self.origin.clone().ok_or_else(|| bad_input(py, "the image was not generated: it has no record"))?;
        let png = file(py, &self.pixels, Format::Png)?;
        let image = FileRecord { file: format!("{name}.png"), bytes: png.len() as u64, sha256: sha256(&png) };
        let record = files::json(&Record { origin, image }).or_raise(py)?;
        Ok((PyBytes::new(py, &png), record))
    }

    /// Pixels, uint8 [height, width, 3].
    #[getter]
    fn pixels<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        view(py, &self.pixels)
    }

    /// Width in pixels.
    #[getter]
    fn width(&self, py: Python<'_>) -> usize {
        self.pixels.bind(py).dims()[1]
    }

    /// Height in pixels.
    #[getter]
    fn height(&self, py: Python<'_>) -> usize {
        self.pixels.bind(py).dims()[0]
    }

    /// Convert to an image of Pillow, which must be installed.
    fn to_pil<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_pil(py, &self.pixels)
    }

    /// Write the image as a PNG, JPEG or WebP, by the suffix of the path. The file is replaced once it is complete.
    ///
    /// Raises
    /// ------
    /// InputError
    ///     If the suffix is another one.
    /// RunError
    ///     If the file cannot be written.
    fn save(&self, py: Python<'_>, #[pyo3(from_py_with = settings::argument)] path: PathBuf) -> PyResult<()> {
        let suffix = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        let format = match suffix.as_str() {
            "png" => Format::Png,
            "jpg" | "jpeg" => Format::Jpeg,
            "webp" => Format::WebP,
            _ => {
                let problem = format!("{}: has the suffix {suffix:?}, expected png, jpg or webp", path.display());
                return Err(bad_input(py, problem));
            }
        };
        let file = file(py, &self.pixels, format)?;
        py.detach(|| files::write(&path, &file)).or_raise(py)
    }

    #[pyo3(signature = (dtype=None, copy=None))]
    fn __array__<'py>(
        &self,
        py: Python<'py>,
        dtype: Option<Bound<'py, PyAny>>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let pixels = view(py, &self.pixels)?;
        let must_copy = copy == Some(true);
        let array = match dtype {
            Some(dtype) => {
                let options = PyDict::new(py);
                options.set_item("copy", must_copy)?;
                pixels.call_method("astype", (dtype,), Some(&options))?
            }
            None if must_copy => pixels.call_method0("copy")?,
            None => pixels.clone(),
        };
        if copy == Some(false) && !array.is(&pixels) {
            return Err(bad_input(py, "copy is False, but pixels of another type are a copy"));
        }
        Ok(array)
    }

    #[pyo3(signature = (**options))]
    fn __dlpack__<'py>(&self, py: Python<'py>, options: Option<&Bound<'py, PyDict>>) -> PyResult<Bound<'py, PyAny>> {
        self.pixels.bind(py).call_method("__dlpack__", (), options)
    }

    fn __dlpack_device__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.pixels.bind(py).call_method0("__dlpack_device__")
    }

    fn _repr_png_<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &file(py, &self.pixels, Format::Png)?))
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("<eqim.Image {}x{}>", self.width(py), self.height(py))
    }
}

/// Columns of an image that are final.
#[pyclass(frozen, module = "eqim")]
pub struct Strip {
    /// Number of pixels to the left of the strip.
    #[pyo3(get)]
    x: usize,
    pixels: Py<Bytes>,
}

impl Strip {
    /// Columns `[3, height, width]` at pixel `x`.
    ///
    /// # Errors
    /// Those of Python.
    pub fn new(py: Python<'_>, x: usize, columns: &Array3<f32>) -> PyResult<Self> {
        let (_, height, width) = columns.dim();
        let bytes = py.detach(|| picture::bytes(columns.view()));
        Ok(Self { x, pixels: pixels(py, bytes, (width, height))? })
    }
}

#[pymethods]
impl Strip {
    /// Pixels, uint8 [height, width, 3].
    #[getter]
    fn pixels<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        view(py, &self.pixels)
    }

    /// Convert to an image of Pillow, which must be installed.
    fn to_pil<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_pil(py, &self.pixels)
    }

    fn _repr_png_<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &file(py, &self.pixels, Format::Png)?))
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let shape = self.pixels.bind(py).dims();
        format!("<eqim.Strip {}x{} at {}>", shape[1], shape[0], self.x)
    }
}
