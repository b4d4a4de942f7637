//! The version of an ONNX Runtime library, read before anything else of the library is used.

use std::error::Error as _;
use std::ffi::CStr;
use std::path::Path;

use eqim::{Error, Result};
use libloading::Library;
use ort::sys::OrtApiBase;

/// Oldest version that has API version 24, which names the execution provider of every node.
const NEEDED: (u32, u32) = (1, 24);

/// Checks that a shared library is ONNX Runtime in a version that can be used.
///
/// The two functions that this calls, `OrtGetApiBase` and `GetVersionString`, are the same in all versions.
///
/// # Errors
/// [`Error::run`] if the file is not ONNX Runtime, or if its version is too old. The message says what to do.
pub(super) fn check(path: &Path) -> Result<()> {
    let bad = |problem: String| Error::run(path.display(), format!("{problem}: {}", advice()));
    // SAFETY: the user names this file as a library to run in this process.
    let library = unsafe { Library::new(path) }.map_err(|error| {
        // The cause is in the source of this error.
        let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        bad(format!("cannot be loaded as ONNX Runtime: {cause}"))
    })?;
    let version = version(&library).ok_or_else(|| bad("is not ONNX Runtime".into()));
    // Never unloaded: the next load would run its initializers again.
    std::mem::forget(library);
    let version = version?;
    if numbers(&version).is_some_and(|found| found >= NEEDED) {
        return Ok(());
    }
    Err(bad(format!("is ONNX Runtime {version}, version {}.{} or newer is needed", NEEDED.0, NEEDED.1)))
}

fn advice() -> String {
    format!("run `cargo xtask setup`, which installs one, and unset {}", crate::native::ORT_VARIABLE)
}

/// The version that a library states, for example `1.23.2`. `None` if the library is not ONNX Runtime.
fn version(library: &Library) -> Option<String> {
    // SAFETY: this is the type of the function in every version of the C API. A library of another kind has no function
    // of this name.
    let base = unsafe { library.get::<unsafe extern "C" fn() -> *const OrtApiBase>(b"OrtGetApiBase") }.ok()?;
    // SAFETY: the function has no preconditions. It returns null or a pointer to a static structure, which has been the
    // same since version 1.0.
    let base = unsafe { base().as_ref() }?;
    // SAFETY: the function has no preconditions and returns a static text that ends with a zero, or null.
    let text = unsafe { (base.GetVersionString)().as_ref().map(|text| CStr::from_ptr(text)) }?;
    Some(text.to_string_lossy().into_owned())
}

/// The first two numbers of a version.
fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        assert_eq!(numbers("1.23.2"), Some((1, 23)));
        assert_eq!(numbers("1.32"), Some((1, 32)));
        assert!(numbers("1.9.0") < Some(NEEDED) && numbers("1.22.1") < Some(NEEDED) && numbers("2.0.0") > Some(NEEDED));
        for text in ["", "1", "one.two", "1.-2"] {
            assert_eq!(numbers(text), None, "{text}");
        }
    }
}
