//! Locks of folders and files in which one process works at a time.

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Once;

use crate::{Error, Result, ResultExt, files, temporary};

/// Name of the file in a folder that is locked. It contains the number of the process that locked it.
pub const LOCK_FILE: &str = "lock";

/// The lock of a folder or file. It is released, and its file removed, when this value is dropped. It is also released when
/// the process ends in another way; its file then stays.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock of a folder, with a file in it. Returns `None` if the folder does not exist, or if the process that
    /// had the lock removed it in this moment. If the file system has no locks, the lock is taken with a warning.
    ///
    /// # Errors
    /// [`Error::run`] with the number of the process that has the lock, or if the file cannot be written.
    pub fn take(folder: &Path) -> Result<Option<Self>> {
        Self::at(folder.join(LOCK_FILE), folder)
    }

    /// Takes the lock of a file that does not need to exist, with a file `….lock` next to it.
    ///
    /// # Errors
    /// Those of [`Lock::take`]; [`Error::input`] if the folder does not exist.
    pub fn beside(path: &Path) -> Result<Self> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".lock");
        loop {
            if let Some(lock) = Self::at(path.with_file_name(&name), path)? {
                return Ok(lock);
            }
            std::fs::metadata(files::folder(path)).or_input(path.display())?;
        }
    }

    /// Takes a lock with the file `path`. `subject` is what is locked, for messages.
    fn at(path: PathBuf, subject: &Path) -> Result<Option<Self>> {
        let mut file = match files::open_or_create(&path) {
            Err(_) if !files::folder(&path).exists() => return Ok(None),
            opened => opened?,
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(taken(subject, &file)),
            Err(TryLockError::Error(error)) => {
                // Once is enough for a folder of many files.
                static WARNED: Once = Once::new();
                let warn =
                    || tracing::warn!("{}: cannot be locked ({error}): run one process at a time", subject.display());
                WARNED.call_once(warn);
            }
        }
        let number = std::process::id().to_string();
        file.set_len(0).and_then(|()| file.write_all(number.as_bytes())).or_run(path.display())?;
        // If the file was removed after it was opened, it is not the one at its path.
        let is_there = std::fs::read_to_string(&path).is_ok_and(|found| found == number);
        Ok(is_there.then(|| {
            temporary::remove_on_interrupt(&path);
            Self { _file: file, path }
        }))
    }
}

impl Drop for Lock {
    /// Removes the file. The lock is held until then: a process that opened the file cannot take it for the next one.
    fn drop(&mut self) {
        // A file that stays can be locked again.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The error for a folder or file whose lock another process has.
fn taken(subject: &Path, lock: &File) -> Error {
    let mut number = String::new();
    let is_read = lock.take(20).read_to_string(&mut number).is_ok();
    let process = match number.parse::<u32>() {
        Ok(number) if is_read => format!("process {number}"),
        _ => "another process".into(),
    };
    Error::run(subject.display(), format!("is in use by {process}: wait until it ends"))
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

    #[test]
    fn a_file_has_one_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.json.partial");
        let lock = Lock::beside(&path).unwrap();
        let error = Lock::beside(&path).unwrap_err();
        assert!(error.to_string().contains("table.json.partial: is in use by process"), "{error}");
        drop(lock);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        drop(Lock::beside(&path).unwrap());
        assert!(Lock::beside(&folder.path().join("missing/table.json")).is_err());
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
