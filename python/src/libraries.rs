//! Native libraries that pip installed.

use std::path::PathBuf;

use eqim_engines::native::{Packaged, use_packaged};
use pyo3::prelude::*;

/// Tells the engines where pip put ONNX Runtime and TensorRT. The packages are not imported.
///
/// # Errors
/// Those of Python.
pub fn find(py: Python<'_>) -> PyResult<()> {
    let onnxruntime = folder(py, "onnxruntime")?.and_then(|folder| library_in(folder.join("capi")));
    use_packaged(Packaged { onnxruntime, tensorrt: folder(py, "tensorrt_rtx_libs")? });
    Ok(())
}

/// Folder of an installed package.
fn folder(py: Python<'_>, package: &str) -> PyResult<Option<PathBuf>> {
    let spec = py.import("importlib.util")?.call_method1("find_spec", (package,))?;
    if spec.is_none() {
        return Ok(None);
    }
    let places = spec.getattr("submodule_search_locations")?;
    if places.is_none() { Ok(None) } else { places.get_item(0)?.extract().map(Some) }
}

/// The library of ONNX Runtime in a folder.
fn library_in(folder: PathBuf) -> Option<PathBuf> {
    let is_library = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("libonnxruntime.")
    };
    std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).find(is_library)
}
