//! Reads and writes files. A failed write leaves no incomplete file.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;

use crate::{Error, Result, ResultExt};

const LARGEST_READ: u64 = 256 << 20;

/// Opens an input file.
///
/// # Errors
/// [`Error::input`] if it cannot be opened or is not a regular file.
pub fn open(path: &Path) -> Result<File> {
    let bad = |error: std::io::Error| Error::input_caused(path.display(), error);
    // Checked before opening, because opening a named pipe would wait for its other end.
    if !std::fs::metadata(path).map_err(bad)?.is_file() {
        return Err(Error::input(path.display(), "is not a file"));
    }
    File::open(path).map_err(bad)
}

/// Reads a small input file.
///
/// # Errors
/// [`Error::input`] if it cannot be read or has more than 256 MB.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let bad = |problem: String| Error::input(path.display(), problem);
    let mut bytes = vec![];
    let read = open(path)?.take(LARGEST_READ + 1).read_to_end(&mut bytes).or_input(path.display())?;
    if read as u64 > LARGEST_READ {
        return Err(bad(format!("has more than {LARGEST_READ} bytes")));
    }
    Ok(bytes)
}

/// The folder that contains `path`.
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Lets `write` create a temporary file next to `path`, then renames it to `path`.
///
/// # Errors
/// [`Error::run`] if the file cannot be written; errors of `write`.
pub fn write_beside(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let failed = |error: std::io::Error| Error::run(path.display(), "cannot be written").because(error);
    let file = temporary(0o666).tempfile_in(folder(path)).map_err(failed)?;
    write(file.path())?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

/// Replaces the contents of a file by `bytes`.
///
/// # Errors
/// [`Error::run`] if it cannot be written.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |error| Error::run(path.display(), "cannot be written").because(error);
    write_beside(path, |beside| std::fs::write(beside, bytes).map_err(failed))
}

/// Replaces the contents of a file by `value` as indented JSON.
///
/// # Errors
/// [`Error::run`] if it cannot be written.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).or_run(path.display())?;
    write(path, &text)
}

/// A builder of temporary files and folders that are later renamed to results. Their permissions are `mode` without the
/// bits of the process's umask, as if they were created under their final names.
#[cfg(unix)]
pub fn temporary(mode: u32) -> tempfile::Builder<'static, 'static> {
    use std::os::unix::fs::PermissionsExt;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".eqim-").permissions(std::fs::Permissions::from_mode(mode));
    builder
}

/// A builder of temporary files and folders that are later renamed to results.
#[cfg(not(unix))]
pub fn temporary(_mode: u32) -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".eqim-");
    builder
}
