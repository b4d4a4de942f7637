//! NVIDIA's libraries, loaded once per process, and their log messages.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use eqim::{Error, Result, ResultExt};
use trtx::{LogHandler, Logger, Severity};

use super::edition;
use crate::native;

/// TensorRT and its ONNX parser.
pub struct Library {
    logger: Logger,
    folder: PathBuf,
    version: String,
}

impl Library {
    /// The libraries that [`native::find_tensorrt`] finds. The first call loads them.
    ///
    /// # Errors
    /// [`Error::run`] if the libraries are not found, cannot be loaded, or have another version than the headers of
    /// this program.
    pub fn load() -> Result<&'static Self> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        let library = LIBRARY.get_or_init(|| Self::loaded().map_err(|error| error.to_string()));
        library.as_ref().map_err(|problem| Error::run("TensorRT", problem))
    }

    fn loaded() -> Result<Self> {
        let folder = native::find_tensorrt()?;
        let (tensorrt, parser) = (folder.join(edition::LIBRARY), folder.join(edition::PARSER));
        let failed = |error: trtx::Error| Error::run_caused(folder.display(), error);
        for path in [&tensorrt, &parser] {
            open(path)?;
        }
        trtx::dynamically_load_tensorrt(Some(&tensorrt)).map_err(failed)?;
        trtx::dynamically_load_tensorrt_onnxparser(Some(&parser)).map_err(failed)?;
        let version = version_of(&tensorrt)?;
        // SAFETY: the function returns a constant of the headers that this program was compiled with.
        let expected = unsafe { trtx::trtx_sys::get_tensorrt_version() };
        if version / 100 != expected / 100 {
            let (found, expected) = (numbers(version), numbers(expected));
            let problem = format!("is version {found}, expected {expected}: install that version");
            return Err(Error::run(tensorrt.display(), problem));
        }
        let logger = Logger::new(Log).map_err(failed)?;
        Ok(Self { logger, folder, version: format!("{} {}", edition::NAME, numbers(version)) })
    }

    /// Name and version, for example `TensorRT-RTX 1.7.1`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Logger that receives the messages of TensorRT.
    pub fn logger(&self) -> &Logger {
        &self.logger
    }

    /// Path of the ONNX parser library.
    pub fn parser(&self) -> PathBuf {
        self.folder.join(edition::PARSER)
    }

    /// Path of the TensorRT library.
    pub fn tensorrt(&self) -> PathBuf {
        self.folder.join(edition::LIBRARY)
    }
}

/// Opens a library. It is loaded if it is not loaded yet.
///
/// # Errors
/// [`Error::run`] if the library cannot be loaded. The message says what to do.
pub fn open(path: &Path) -> Result<libloading::Library> {
    // SAFETY: the initializers of NVIDIA's libraries may run in any process. They also run if a library is loaded by
    // name.
    unsafe { libloading::Library::new(path) }.map_err(|error| {
        // The source of libloading's error is the message of the dynamic loader.
        let reason = std::error::Error::source(&error).map_or(error.to_string(), |source| source.to_string());
        Error::run(path.display(), format!("cannot be loaded: {reason}; `cargo xtask setup` installs it"))
    })
}

fn version_of(path: &Path) -> Result<u32> {
    let library = open(path)?;
    // SAFETY: NvInferRuntime.h declares the function with this signature: no arguments, and an integer result.
    let version = unsafe {
        let get: libloading::Symbol<unsafe extern "C" fn() -> i32> =
            library.get(b"getInferLibVersion").or_run(path.display())?;
        get()
    };
    Ok(version.unsigned_abs())
}

/// A version number as text: 10701 is 1.7.1.
fn numbers(version: u32) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

static ERRORS: Mutex<Vec<String>> = Mutex::new(vec![]);

/// Returns and clears the errors that TensorRT has logged. The calls of TensorRT report that they failed, but not why.
pub fn take_errors() -> Vec<String> {
    ERRORS.lock().map(|mut errors| std::mem::take(&mut *errors)).unwrap_or_default()
}

struct Log;

impl LogHandler for Log {
    fn log(&self, severity: Severity, message: &str) {
        match severity {
            Severity::InternalError | Severity::Error => {
                tracing::debug!(target: "tensorrt", "{message}");
                if let Ok(mut errors) = ERRORS.lock() {
                    errors.push(message.trim().to_string());
                }
            }
            Severity::Warning => tracing::warn!(target: "tensorrt", "{message}"),
            Severity::Info => tracing::debug!(target: "tensorrt", "{message}"),
            Severity::Verbose => tracing::trace!(target: "tensorrt", "{message}"),
        }
    }
}
