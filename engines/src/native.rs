//! Locations of native libraries.

use std::path::{Path, PathBuf};

use eqim::{Error, Result};

/// Name of the environment variable with the path of the ONNX Runtime library. `ort` reads the same variable.
pub const ORT_VARIABLE: &str = "ORT_DYLIB_PATH";

/// Name of the environment variable with the folder of the TensorRT libraries.
pub const TENSORRT_VARIABLE: &str = "EQIM_TENSORRT";

const INSTALLED: &str = ".native/onnxruntime";
const TENSORRT_INSTALLED: &str = ".native/tensorrt";

/// Path of the ONNX Runtime library: the file that `ORT_DYLIB_PATH` names, or the library that `cargo xtask setup`
/// installed in the repository that contains the program or the working directory.
///
/// # Errors
/// [`Error::run`] if the library is not found. The message says how to install it.
pub fn find_onnxruntime() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(ORT_VARIABLE) {
        let path = PathBuf::from(path);
        let problem = "is not a file: correct it, or unset it and run `cargo xtask setup`";
        let missing = || Error::run(format!("{ORT_VARIABLE} names {}", path.display()), problem);
        return if path.is_file() { Ok(path) } else { Err(missing()) };
    }
    installed(|folder| library_in(&folder.join(INSTALLED))).ok_or_else(|| {
        let problem = format!("was not found: run `cargo xtask setup`, or set {ORT_VARIABLE} to its shared library");
        Error::run("ONNX Runtime", problem)
    })
}

/// Folder of the TensorRT libraries: the folder that `EQIM_TENSORRT` names, or the folder that `cargo xtask setup`
/// installed.
///
/// # Errors
/// [`Error::run`] if the folder is not found. The message says how to install the libraries.
pub fn find_tensorrt() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(TENSORRT_VARIABLE) {
        let path = PathBuf::from(path);
        let problem = "is not a folder: correct it, or unset it and run `cargo xtask setup`";
        let missing = || Error::run(format!("{TENSORRT_VARIABLE} names {}", path.display()), problem);
        return if path.is_dir() { Ok(path) } else { Err(missing()) };
    }
    installed(|folder| Some(folder.join(TENSORRT_INSTALLED)).filter(|folder| folder.is_dir())).ok_or_else(|| {
        let problem = format!(
            "was not found: run `cargo xtask setup`, or set {TENSORRT_VARIABLE} to the folder of its libraries"
        );
        Error::run("TensorRT", problem)
    })
}

/// Calls `look` with each folder above the program and above the working directory, and returns the first result.
fn installed(look: impl Fn(&Path) -> Option<PathBuf>) -> Option<PathBuf> {
    let starts = [std::env::current_exe().ok(), std::env::current_dir().ok()];
    starts.iter().flatten().flat_map(|start| start.ancestors()).find_map(look)
}

fn library_in(folder: &Path) -> Option<PathBuf> {
    let is_library = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("libonnxruntime.") && !name.contains("providers")
    };
    std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).find(is_library)
}
