//! The programs as console scripts.

use std::ffi::OsString;

use pyo3::prelude::*;

use crate::error::bad_input;
use crate::libraries;

/// main(arguments, /)
/// --
///
/// Runs the program whose name is the first argument. Returns the exit code of the process.
#[pyfunction]
pub fn main(py: Python<'_>, arguments: Vec<OsString>) -> PyResult<u8> {
    libraries::find(py)?;
    let program = match arguments.first().map(|name| name.to_string_lossy()).as_deref() {
        Some("eqim-bench") => eqim_programs::bench::main,
        Some("eqim-eval") => eqim_programs::eval::main,
        Some("eqim-export") => eqim_programs::export::main,
        Some("eqim-run") => eqim_programs::run::main,
        Some("eqim-serve") => eqim_serve::main,
        Some("eqim-train") => eqim_programs::train::main,
        _ => return Err(bad_input(py, format!("{arguments:?} names no program"))),
    };
    Ok(py.detach(|| program(arguments)))
}
