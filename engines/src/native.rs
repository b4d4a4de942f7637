//! Where native libraries are.

use std::path::{Path, PathBuf};

/// Names the file of ONNX Runtime's library, as `ort` itself reads it.
pub const ORT_VARIABLE: &str = "ORT_DYLIB_PATH";

const INSTALLED: &str = ".native/onnxruntime";

/// The shared library of ONNX Runtime: the file that `ORT_DYLIB_PATH` names, or what `cargo xtask setup` installed
/// in the repository that the program or the working directory belongs to.
///
/// # Errors
/// A sentence that says what to do.
pub fn find_onnxruntime() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os(ORT_VARIABLE) {
        let path = PathBuf::from(path);
        let missing = || {
            let path = path.display();
            format!(
                "{ORT_VARIABLE} names {path}, which is no file: correct it, or unset it and run `cargo xtask setup`"
            )
        };
        return if path.is_file() { Ok(path) } else { Err(missing()) };
    }
    let starts = [std::env::current_exe().ok(), std::env::current_dir().ok()];
    let folders = starts.iter().flatten().flat_map(|start| start.ancestors());
    folders.filter_map(|folder| library_in(&folder.join(INSTALLED))).next().ok_or_else(|| {
        format!("ONNX Runtime was not found: run `cargo xtask setup`, or set {ORT_VARIABLE} to its shared library")
    })
}

fn library_in(folder: &Path) -> Option<PathBuf> {
    let is_library = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("libonnxruntime.") && !name.contains("providers")
    };
    std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).find(is_library)
}
