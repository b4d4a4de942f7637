//! Native libraries that pip installed.

use std::path::PathBuf;

use eqim_engines::native::{Packaged, library_in, use_packaged};
use pyo3::prelude::*;

/// Tells the engines where pip put ONNX Runtime and TensorRT. The packages are not imported.
///
/// # Errors
/// Those of Python.
pub fn find(py: Python<'_>) -> PyResult<()> {
    let onnxruntime = folder(py, "onnxruntime")?.and_then(|folder| library_in(&folder.join("capi")));
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
