//! Temporary folders next to results, which are later renamed to results. None stays behind: a folder is removed when it is
//! dropped or when the process is interrupted, and the folder of a process that was killed is removed by the next one.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tempfile::TempDir;

/// Beginning of the names of temporary folders.
const PREFIX: &str = ".eqim-";

/// Temporary folders and other files that an interrupt removes. Those that do not exist any more are removed from the list
/// at times.
static CREATED: Mutex<Vec<PathBuf>> = Mutex::new(vec![]);

/// A temporary folder. It is removed when it is dropped.
#[derive(Debug)]
pub struct Temporary {
    folder: TempDir,
    /// The folder itself, locked: nobody else removes it. `None` if the file system has no locks.
    _lock: Option<File>,
}

impl Temporary {
    /// Creates a folder in `parent`. Its permissions are `mode` without the bits of the process's umask, as if it were
    /// created under its final name.
    ///
    /// The first call for a parent removes the folders that processes left there when they were killed.
    ///
    /// # Errors
    /// If the parent cannot be written to.
    pub fn new(parent: &Path, mode: u32) -> io::Result<Self> {
        tidy(parent);
        let mut builder = tempfile::Builder::new();
        builder.prefix(PREFIX);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
        #[cfg(not(unix))]
        let _ = mode;
        loop {
            let folder = created(|| builder.tempdir_in(parent))?;
            match locked(folder.path()) {
                Lock::Taken(lock) => return Ok(Self { folder, _lock: Some(lock) }),
                Lock::Missing => return Ok(Self { folder, _lock: None }),
                // Another process found it before it was locked, and removes it.
                Lock::Lost => {}
            }
        }
    }

    /// Path of the folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Keeps the folder, for example because it was renamed. Returns its path.
    pub fn keep(self) -> PathBuf {
        self.folder.keep()
    }
}

/// Whether a name in a folder is that of a temporary folder.
pub fn is_temporary(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(PREFIX.as_bytes())
}

/// Result of taking the lock of a temporary folder.
enum Lock {
    Taken(File),
    /// The file system has no locks, or the system has none for folders.
    Missing,
    /// Another process has it, or has removed the folder.
    Lost,
}

fn locked(folder: &Path) -> Lock {
    let file = match File::open(folder) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Lock::Lost,
        Err(_) => return Lock::Missing,
    };
    match file.try_lock() {
        Ok(()) if folder.exists() => Lock::Taken(file),
        Ok(()) | Err(TryLockError::WouldBlock) => Lock::Lost,
        Err(TryLockError::Error(_)) => Lock::Missing,
    }
}

/// Removes the temporary folders in `parent` whose process was killed: a lock ends with its process. Only the first call
/// for a parent does so.
pub fn tidy(parent: &Path) {
    static TIDY: LazyLock<Mutex<HashSet<PathBuf>>> = LazyLock::new(Mutex::default);
    if TIDY.lock().unwrap_or_else(PoisonError::into_inner).insert(parent.to_path_buf()) {
        remove_left(parent);
    }
}

/// Removes all temporary folders in a folder that becomes a result. A folder stays if it could not be removed when it was
/// dropped.
///
/// # Errors
/// If a folder cannot be removed.
pub fn remove_in(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if is_temporary(&entry.file_name()) {
            delete(&entry.path())?;
        }
    }
    Ok(())
}

fn remove_left(parent: &Path) {
    // What cannot be read or removed is no hindrance for the new result.
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        if !is_temporary(&entry.file_name()) || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if let Lock::Taken(_lock) = locked(&entry.path()) {
            tracing::info!("{}: is removed, since its process was killed", entry.path().display());
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn list() -> MutexGuard<'static, Vec<PathBuf>> {
    CREATED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds what `create` creates to the list of temporary folders.
fn created(create: impl FnOnce() -> io::Result<TempDir>) -> io::Result<TempDir> {
    // Locked before the creation, so that an interrupt cannot come between the two.
    let mut list = list();
    let created = create()?;
    list.retain(|path| path.symlink_metadata().is_ok());
    list.push(created.path().to_path_buf());
    Ok(created)
}

/// Adds a file to those that [`remove_all`] removes.
pub(crate) fn remove_on_interrupt(path: &Path) {
    list().push(path.to_path_buf());
}

/// Removes the temporary folders of this process, then calls `end`, which ends the process. Threads that create others
/// meanwhile wait for ever.
pub fn remove_all(end: impl FnOnce()) {
    let list = list();
    list.iter().for_each(|path| remove(path));
    end();
}

/// Removes a file, or a folder with everything in it.
pub(crate) fn delete(path: &Path) -> io::Result<()> {
    let is_folder = path.symlink_metadata().is_ok_and(|found| found.is_dir());
    if is_folder { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }
}

fn remove(path: &Path) {
    /// Other threads may still write files into a folder that is being removed.
    const ATTEMPTS: usize = 100;
    for _ in 0..ATTEMPTS {
        if delete(path).is_ok() || path.symlink_metadata().is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn folders_of_processes_that_were_killed_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let at = |name: &str| parent.path().join(name);
        let used = Temporary::new(parent.path(), 0o777).unwrap();
        // Nobody has locked this folder.
        std::fs::create_dir_all(at(".eqim-left/inside")).unwrap();
        std::fs::create_dir(at("eqim-other")).unwrap();
        std::fs::write(at(".eqim-file"), "").unwrap();
        std::os::unix::fs::symlink("eqim-other", at(".eqim-link")).unwrap();
        remove_left(parent.path());
        assert!(!at(".eqim-left").exists());
        for kept in [used.path(), &at("eqim-other"), &at(".eqim-file"), &at(".eqim-link")] {
            assert!(kept.exists(), "{}", kept.display());
        }
        let path = used.path().to_path_buf();
        drop(used);
        assert!(!path.exists());
    }

    #[test]
    fn a_result_has_no_temporary_folders() {
        let result = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(result.path().join(".eqim-left/inside")).unwrap();
        std::fs::write(result.path().join("model"), "").unwrap();
        remove_in(result.path()).unwrap();
        let names: Vec<_> = std::fs::read_dir(result.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["model"]);
    }

    #[test]
    fn a_folder_that_was_renamed_is_kept() {
        let parent = tempfile::tempdir().unwrap();
        let folder = Temporary::new(parent.path(), 0o777).unwrap();
        std::fs::rename(folder.path(), parent.path().join("result")).unwrap();
        folder.keep();
        remove_left(parent.path());
        assert!(parent.path().join("result").exists());
    }
}
