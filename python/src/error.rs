//! Errors of the library as exceptions of `eqim.errors`.

use std::error::Error as _;
use std::io::{self, ErrorKind};

use eqim::Error;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::keywords::keyword_of;

/// An exception of `eqim.errors`.
pub fn exception(py: Python<'_>, class: &str, message: String) -> PyErr {
    let made = py.import("eqim.errors").and_then(|errors| errors.getattr(class)?.call1((&message,)));
    // The package is damaged if its module of errors is missing: the message is still shown.
    made.map_or_else(|_| PyRuntimeError::new_err(message), PyErr::from_value)
}

/// An exception for input that cannot be used.
pub fn bad_input(py: Python<'_>, message: impl Into<String>) -> PyErr {
    exception(py, "InputError", message.into())
}

/// An exception for input that cannot be used, because of another exception.
pub fn bad_input_caused(py: Python<'_>, message: impl Into<String>, cause: PyErr) -> PyErr {
    let error = bad_input(py, message);
    error.set_cause(py, Some(cause));
    error
}

/// How messages name settings.
#[derive(Clone, Copy)]
pub enum Names {
    /// As keywords of methods in Python.
    Keywords,
    /// As in files of jobs.
    Jobs,
}

impl Names {
    /// The name of a setting.
    pub fn of(self, setting: &str) -> &str {
        match self {
            Self::Keywords => keyword_of(setting),
            Self::Jobs => setting,
        }
    }
}

/// The exception of an error.
pub fn to_python(py: Python<'_>, error: Error, names: Names) -> PyErr {
    let text = error.to_string();
    let text = match error.field() {
        Some(field) => match text.strip_prefix(field) {
            Some(rest) => format!("{}{rest}", names.of(field)),
            None => format!("{text} ({})", names.of(field)),
        },
        None => text,
    };
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    let class = match (error.is_input(), cause.map(io::Error::kind)) {
        (true, Some(ErrorKind::NotFound)) => "NotFoundError",
        (true, _) => "InputError",
        (false, _) => "RunError",
    };
    exception(py, class, text)
}

/// Converts results of the library.
pub trait OrRaise<T> {
    /// The value, or the exception of the error. Settings have the names of their keywords.
    ///
    /// # Errors
    /// The exception.
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;

    /// The value, or the exception of the error.
    ///
    /// # Errors
    /// The exception.
    fn or_raise_as(self, py: Python<'_>, names: Names) -> PyResult<T>;
}

impl<T> OrRaise<T> for eqim::Result<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.or_raise_as(py, Names::Keywords)
    }

    fn or_raise_as(self, py: Python<'_>, names: Names) -> PyResult<T> {
        self.map_err(|error| to_python(py, error, names))
    }
}
