//! Warnings of the library as warnings of Python.

use std::ffi::CString;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyRuntimeWarning;
use pyo3::prelude::*;
use tracing::Level;

/// Text that several writers share.
#[derive(Clone, Default)]
struct Text(Arc<Mutex<Vec<u8>>>);

impl Write for Text {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Calls a function. Returns its result and the warnings of the library, one per line.
pub fn collected<T>(work: impl FnOnce() -> T) -> (T, String) {
    let text = Text::default();
    let writer = text.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(Level::WARN)
        .with_ansi(false)
        .with_level(false)
        .with_target(false)
        .without_time()
        .with_writer(move || writer.clone())
        .finish();
    let result = tracing::subscriber::with_default(subscriber, work);
    let bytes = std::mem::take(&mut *text.0.lock().unwrap_or_else(PoisonError::into_inner));
    (result, String::from_utf8_lossy(&bytes).into_owned())
}

/// Shows warnings, one per line.
///
/// # Errors
/// The warning, if the filters of Python make it an error.
pub fn show(py: Python<'_>, messages: &str) -> PyResult<()> {
    for message in messages.lines().map(str::trim).filter(|message| !message.is_empty()) {
        // Messages have no zero bytes: they are lines of text.
        let message = CString::new(message.replace('\0', ""))?;
        PyErr::warn(py, &py.get_type::<PyRuntimeWarning>(), &message, 1)?;
    }
    Ok(())
}
