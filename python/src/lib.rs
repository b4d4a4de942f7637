//! The native part of the Python package `eqim`: see `docs/python.md` and the stubs in `py_src/eqim/`.

mod arrays;
mod checkpoint;
mod deliver;
mod engine;
mod error;
mod image;
mod keywords;
mod libraries;
mod making;
mod process;
mod programs;
mod progress;
mod settings;
mod stream;
mod warnings;

use mimalloc::MiMalloc;
use pyo3::prelude::*;

// As in the program eqim-train, which this library holds.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// The native part of the package.
#[pymodule]
mod _eqim {
    #[pymodule_export]
    use super::checkpoint::{export, load_checkpoint};
    #[pymodule_export]
    use super::engine::Engine;
    #[pymodule_export]
    use super::image::{Image, Strip};
    #[pymodule_export]
    use super::programs::main;
    #[pymodule_export]
    use super::stream::Stream;

    #[pymodule_export]
    #[allow(non_upper_case_globals, missing_docs)]
    pub const __version__: &str = env!("CARGO_PKG_VERSION");
}
