//! The readers of eqim.

mod bundle;
mod calibration;
mod checkpoint;
mod long;
mod picture;
mod request;
mod training;

use std::path::{Path, PathBuf};

use eqim::{Result, ResultExt};
use tempfile::TempDir;

use crate::target::Target;

/// All readers.
///
/// # Errors
/// If a file that a reader needs cannot be written.
pub fn all() -> Result<Vec<Box<dyn Target>>> {
    let mut all = checkpoint::all()?;
    all.extend(bundle::all()?);
    all.extend(calibration::all()?);
    all.extend(request::all()?);
    all.push(Box::new(picture::Pictures::new()?));
    all.push(Box::new(long::Unfinished::new()?));
    all.extend(training::all()?);
    Ok(all)
}

/// A folder for the files of a target.
#[derive(Debug)]
struct Place(TempDir);

impl Place {
    fn new() -> Result<Self> {
        tempfile::tempdir().or_run("a temporary folder").map(Self)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// Writes an input.
fn write(path: &Path, input: &[u8]) -> Result<()> {
    // Without the sync of the library: a million files are written.
    std::fs::write(path, input).or_run(path.display())
}
