//! Locks of folders in which one process works at a time.

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::Path;

use crate::{Error, Result, ResultExt, files};

/// Name of the file in a folder that is locked. It contains the number of the process that locked it.
pub const LOCK_FILE: &str = "lock";

/// The lock of a folder. It is released when this value is dropped, and when the process ends, in whatever way.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of a folder. Returns `None` if the folder does not exist, or if the process that had the lock
    /// removed it in this moment. If the file system has no locks, the lock is taken with a warning.
    ///
    /// # Errors
    /// [`Error::run`] with the number of the process that has the lock, or if the file cannot be written.
    pub fn take(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(LOCK_FILE);
        let mut file = match files::open_or_create(&path) {
            Err(_) if !folder.exists() => return Ok(None),
            opened => opened?,
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(taken(folder, &file)),
            Err(TryLockError::Error(error)) => {
                tracing::warn!("{}: cannot be locked ({error}): run one process at a time", folder.display());
            }
        }
        let number = std::process::id().to_string();
        file.set_len(0).and_then(|()| file.write_all(number.as_bytes())).or_run(path.display())?;
        // If the folder was removed after the file was opened, this file is not the one at its path.
        let is_there = std::fs::read_to_string(&path).is_ok_and(|found| found == number);
        Ok(is_there.then_some(Self { _file: file }))
    }
}

/// The error for a folder whose lock another process has.
fn taken(folder: &Path, lock: &File) -> Error {
    let mut number = String::new();
    let is_read = lock.take(20).read_to_string(&mut number).is_ok();
    let process = match number.parse::<u32>() {
        Ok(number) if is_read => format!("process {number}"),
        _ => "another process".into(),
    };
    Error::run(folder.display(), format!("is in use by {process}: wait until it ends"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_owner() {
        let folder = tempfile::tempdir().unwrap();
        let lock = Lock::take(folder.path()).unwrap().unwrap();
        let error = Lock::take(folder.path()).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains(&format!("in use by process {}: wait", std::process::id())), "{error}");
        drop(lock);
        assert!(Lock::take(folder.path()).unwrap().is_some());
        assert!(Lock::take(&folder.path().join("missing")).unwrap().is_none());
    }

    #[cfg(unix)]
    #[test]
    fn a_link_in_the_place_of_the_lock_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        std::os::unix::fs::symlink(&outside, folder.path().join(LOCK_FILE)).unwrap();
        let error = Lock::take(folder.path()).unwrap_err();
        assert!(error.is_input() && error.to_string().ends_with("is not a file: remove it"), "{error}");
        assert!(!outside.exists());
    }
}
