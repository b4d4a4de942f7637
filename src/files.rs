//! Reading and writing files so that a failure leaves nothing half done.

use std::fs::File;
use std::path::Path;

use crate::{Error, Result};

/// Opens a file of input.
///
/// # Errors
/// [`Error::Input`] when it cannot be opened or is no file.
pub fn open(path: &Path) -> Result<File> {
    let bad = |error: std::io::Error| Error::input(path.display(), error);
    // Asked first: opening a pipe would wait for its other end.
    if !std::fs::metadata(path).map_err(bad)?.is_file() {
        return Err(Error::input(path.display(), "is not a file"));
    }
    File::open(path).map_err(bad)
}

/// The folder that `path` is in.
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Lets `write` make a file beside its destination, and renames it when that is done.
///
/// # Errors
/// [`Error::Run`] when the file cannot be written; those of `write`.
pub fn write_beside(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let failed = |error: std::io::Error| Error::run(path.display(), format!("cannot be written: {error}"));
    let file = tempfile::Builder::new().prefix(".eqim-").tempfile_in(folder(path)).map_err(failed)?;
    write(file.path())?;
    set_default_permissions(file.path()).map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

/// Replaces a file by `bytes`.
///
/// # Errors
/// [`Error::Run`] when it cannot be written.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_beside(path, |beside| std::fs::write(beside, bytes).map_err(|error| Error::run(path.display(), error)))
}

/// Temporary files are private; results are not.
#[cfg(unix)]
fn set_default_permissions(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn set_default_permissions(_path: &Path) -> std::io::Result<()> {
    Ok(())
}
