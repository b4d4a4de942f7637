//! The progress of an image.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::bad_input_caused;

/// Shows the tokens of an image: calls a function, and moves a bar.
pub struct Progress {
    total: usize,
    callback: Option<Py<PyAny>>,
    bar: Option<Py<PyAny>>,
}

impl Progress {
    /// The progress of an image of `total` tokens. `callback` receives the number of tokens so far and of all.
    ///
    /// # Errors
    /// `InputError` if a bar is wanted and tqdm is not installed.
    pub fn new(py: Python<'_>, total: usize, callback: Option<Py<PyAny>>, with_bar: bool) -> PyResult<Self> {
        let bar = if with_bar { Some(bar(py, total)?) } else { None };
        Ok(Self { total, callback, bar })
    }

    /// Shows that `known` tokens are known.
    ///
    /// # Errors
    /// Those of the function.
    pub fn show(&self, py: Python<'_>, known: usize) -> PyResult<()> {
        if let Some(callback) = &self.callback {
            callback.call1(py, (known, self.total))?;
        }
        if let Some(bar) = &self.bar {
            let shown: usize = bar.getattr(py, "n")?.extract(py)?;
            bar.call_method1(py, "update", (known - shown,))?;
        }
        Ok(())
    }

    /// Ends the bar.
    ///
    /// # Errors
    /// Those of Python.
    pub fn finish(&self, py: Python<'_>) -> PyResult<()> {
        self.bar.as_ref().map_or(Ok(()), |bar| bar.call_method0(py, "close").map(drop))
    }
}

fn bar(py: Python<'_>, total: usize) -> PyResult<Py<PyAny>> {
    let missing = |cause| bad_input_caused(py, "progress is True, which needs tqdm: pip install tqdm", cause);
    let tqdm = py.import("tqdm.auto").map_err(missing)?;
    let options = PyDict::new(py);
    options.set_item("total", total)?;
    options.set_item("unit", "token")?;
    Ok(tqdm.getattr("tqdm")?.call((), Some(&options))?.unbind())
}
