//! Locations of native libraries.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use eqim::{Error, Result};

/// Name of the environment variable with the path of the ONNX Runtime library. `ort` reads the same variable.
pub const ORT_VARIABLE: &str = "ORT_DYLIB_PATH";

/// Name of the environment variable with the folder of the TensorRT libraries.
pub const TENSORRT_VARIABLE: &str = "EQIM_TENSORRT";

/// Libraries that a package manager installed, for the Python package.
static PACKAGED: OnceLock<Packaged> = OnceLock::new();

/// Native libraries that a package manager installed.
#[derive(Debug, Default)]
pub struct Packaged {
    /// The ONNX Runtime library.
    pub onnxruntime: Option<PathBuf>,
    /// Folder of the TensorRT libraries.
    pub tensorrt: Option<PathBuf>,
}

/// Uses these libraries unless environment variables name others. Only the first call has an effect.
pub fn use_packaged(libraries: Packaged) {
    let _ = PACKAGED.set(libraries);
}

const INSTALLED: &str = ".native/onnxruntime";
const EFFICIENTNET_INSTALLED: &str = ".native/efficientnet-lite0/efficientnet-lite0.pth";
const TENSORRT_INSTALLED: &str = ".native/tensorrt";

/// Path of the ONNX Runtime library: the file that `ORT_DYLIB_PATH` names, or the [packaged](use_packaged) one, or the library
/// that `cargo xtask setup` installed in the repository that contains the program or the working directory.
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
    let packaged = PACKAGED.get().and_then(|libraries| libraries.onnxruntime.clone());
    packaged.or_else(|| installed(|folder| library_in(&folder.join(INSTALLED)))).ok_or_else(|| {
        let install = if PACKAGED.get().is_some() { "pip install onnxruntime" } else { "cargo xtask setup" };
        let problem = format!("was not found: run `{install}`, or set {ORT_VARIABLE} to its shared library");
        Error::run("ONNX Runtime", problem)
    })
}

/// Folder of the TensorRT libraries: the folder that `EQIM_TENSORRT` names, or the [packaged](use_packaged) one, or the folder
/// that `cargo xtask setup` installed.
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
    let packaged = PACKAGED.get().and_then(|libraries| libraries.tensorrt.clone());
    let in_repository = || installed(|folder| Some(folder.join(TENSORRT_INSTALLED)).filter(|folder| folder.is_dir()));
    packaged.or_else(in_repository).ok_or_else(|| {
        let install = if PACKAGED.get().is_some() { "pip install eqim[trt]" } else { "cargo xtask setup" };
        let problem =
            format!("was not found: run `{install}`, or set {TENSORRT_VARIABLE} to the folder of its libraries");
        Error::run("TensorRT", problem)
    })
}

/// Path of the weights of EfficientNet-Lite0 that `cargo xtask setup --training` installed.
///
/// # Errors
/// [`Error::run`] if the file is not found. The message says how to install it.
pub fn find_efficientnet() -> Result<PathBuf> {
    let file = |folder: &Path| Some(folder.join(EFFICIENTNET_INSTALLED)).filter(|path| path.is_file());
    installed(file).ok_or_else(|| {
        let problem = "was not found: run `cargo xtask setup --training`, or name a network with --features";
        Error::run("EfficientNet-Lite0", problem)
    })
}

/// Calls `look` with each folder above the program and above the working directory, and returns the first result.
fn installed(look: impl Fn(&Path) -> Option<PathBuf>) -> Option<PathBuf> {
    let starts = [std::env::current_exe().ok(), std::env::current_dir().ok()];
    starts.iter().flatten().flat_map(|start| start.ancestors()).find_map(look)
}

/// The ONNX Runtime library in a folder.
pub fn library_in(folder: &Path) -> Option<PathBuf> {
    let is_library = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("libonnxruntime.") && !name.contains("providers")
    };
    std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).find(is_library)
}
