//! Where native libraries are.

use std::path::{Path, PathBuf};

use eqim::{Error, Result};

/// Names the file of ONNX Runtime's library, as `ort` itself reads it.
pub const ORT_VARIABLE: &str = "ORT_DYLIB_PATH";

/// Names the folder that holds TensorRT's libraries.
pub const TENSORRT_VARIABLE: &str = "EQIM_TENSORRT";

const INSTALLED: &str = ".native/onnxruntime";
const TENSORRT_INSTALLED: &str = ".native/tensorrt";

/// The shared library of ONNX Runtime: the file that `ORT_DYLIB_PATH` names, or what `cargo xtask setup` installed
/// in the repository that the program or the working directory belongs to.
///
/// # Errors
/// [`Error::run`], which says what to do.
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

/// The folder of TensorRT's libraries: the one that `EQIM_TENSORRT` names, or what `cargo xtask setup` installed.
///
/// # Errors
/// [`Error::run`], which says what to do.
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

/// Looks in the repository that the program or the working directory belongs to.
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
