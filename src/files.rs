//! Reads and writes files. A failed write leaves no incomplete file, and neither does a process that is interrupted.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use serde::Serialize;

use crate::temporary::{self, Temporary};
use crate::{Error, Result, ResultExt};

const LARGEST_READ: u64 = 256 << 20;

/// Opens an input file.
///
/// # Errors
/// [`Error::input`] if it cannot be opened or is not a regular file.
pub fn open(path: &Path) -> Result<File> {
    let bad = |error: io::Error| Error::input_caused(path.display(), error);
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

/// Opens a file of unfinished work for reading and writing, or creates it.
///
/// # Errors
/// [`Error::input`] if a folder, a link or a device is in its place; [`Error::run`] if it cannot be opened.
pub fn open_or_create(path: &Path) -> Result<File> {
    if path.symlink_metadata().is_ok_and(|found| !found.is_file()) {
        return Err(Error::input(path.display(), "is not a file: remove it"));
    }
    let opened = File::options().read(true).write(true).create(true).truncate(false).open(path);
    opened.map_err(|error| Error::run(path.display(), "cannot be opened").because(error))
}

/// The folder that contains `path`.
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

// Outputs.

/// Checks, before any work, that a result can be written to `path`: as a new file, or in the place of a file.
///
/// # Errors
/// [`Error::input`] if there is something other than a file, for example a device or a link, or if the folder of `path`
/// does not exist or cannot be written to.
pub fn check_output(path: &Path) -> Result<()> {
    check_replaced(path, "file", std::fs::Metadata::is_file)?;
    check_folder(path)
}

/// Checks, before any work, that a folder of results can be written to `path`: as a new folder, or in the place of a
/// folder.
///
/// # Errors
/// [`Error::input`] if there is something other than a folder, for example a link, or if the folder that contains `path`
/// does not exist or cannot be written to.
pub fn check_output_folder(path: &Path) -> Result<()> {
    check_replaced(path, "folder", std::fs::Metadata::is_dir)?;
    check_folder(path)
}

/// Checks that nothing is at `path`, or something that `is_kind`. Links are not followed, because a rename would replace
/// the link.
fn check_replaced(path: &Path, kind: &str, is_kind: impl Fn(&std::fs::Metadata) -> bool) -> Result<()> {
    // The slash at the end is removed: with it, the link would be followed.
    match path.components().as_path().symlink_metadata() {
        Ok(found) if is_kind(&found) => Ok(()),
        Ok(found) if found.is_symlink() => {
            Err(Error::input(path.display(), format!("is not a {kind}, but a link, which is not replaced")))
        }
        Ok(_) => Err(Error::input(path.display(), format!("is not a {kind}"))),
        Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => Ok(()),
        Err(error) => Err(Error::input_caused(path.display(), error)),
    }
}

/// Checks, before any work, that the folder that contains `path` exists and can be written to.
///
/// # Errors
/// [`Error::input`] if it does not exist or cannot be written to.
pub fn check_folder(path: &Path) -> Result<()> {
    let bad = |problem: String| Error::input(path.display(), problem);
    if path.file_name().is_none() {
        return Err(bad("expected the name of a result to write, inside a folder that exists".into()));
    }
    let folder = folder(path);
    if !folder.is_dir() {
        return Err(bad(format!("there is no folder {}: create it first", folder.display())));
    }
    // Results are renamed into place, so the folder must be writable.
    let trial = tempfile::tempfile_in(folder);
    trial.map_err(|error| bad(format!("the folder {} cannot be written to", folder.display())).because(error))?;
    Ok(())
}

/// Lets `write` fill a temporary file next to `path`, then renames it to `path`. The contents are on the disk before the
/// file has its name, so that a power failure leaves the older file or the new one.
///
/// # Errors
/// [`Error::input`] if there is something other than a file at `path`; [`Error::run`] if the file cannot be written;
/// errors of `write`.
pub fn write_beside(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let failed = |error: io::Error| Error::run(path.display(), "cannot be written").because(error);
    check_replaced(path, "file", std::fs::Metadata::is_file)?;
    // In a folder, so that the temporary files of other libraries are removed with it.
    let place = Temporary::new(folder(path), 0o700).map_err(failed)?;
    let beside = place.path().join("result");
    File::create(&beside).map_err(failed)?;
    write(&beside)?;
    sync(&beside).map_err(failed)?;
    std::fs::rename(&beside, path).map_err(failed)?;
    sync_folder(folder(path)).map_err(failed)
}

/// Replaces the contents of a file by `bytes`.
///
/// # Errors
/// Those of [`write_beside`].
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |error| Error::run(path.display(), "cannot be written").because(error);
    write_beside(path, |beside| std::fs::write(beside, bytes).map_err(failed))
}

/// The text that [`write_json`] writes.
///
/// # Errors
/// [`Error::run`] if the value cannot be written as JSON.
pub fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string_pretty(value).or_run("JSON")
}

/// Replaces the contents of a file by `value` as indented JSON.
///
/// # Errors
/// Those of [`write_beside`].
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write(path, json(value)?.as_bytes())
}

/// Gives a temporary folder, which is in the same folder as `path`, the name `path`, and removes the older folder there.
/// On Linux the two folders are exchanged, so that a complete folder has the name at any time.
///
/// # Errors
/// [`Error::input`] if there is something other than a folder at `path`; [`Error::run`] if the folder cannot be renamed.
/// The older folder is then still at `path`, or in the folder that the message names.
pub fn publish_folder(new: Temporary, path: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::run(path.display(), "cannot be written").because(error);
    check_replaced(path, "folder", std::fs::Metadata::is_dir)?;
    temporary::remove_in(new.path()).and_then(|()| sync_all(new.path())).map_err(failed)?;
    if !path.exists() {
        std::fs::rename(new.path(), path).map_err(failed)?;
        let _named = new.keep();
    } else if !exchange(new.path(), path).map_err(failed)? {
        replace_folder(new, path)?;
    }
    sync_folder(folder(path)).map_err(failed)
}

/// Replaces a folder in two steps: the older folder is set aside, then `new` gets its name.
fn replace_folder(new: Temporary, path: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::run(path.display(), "cannot be written").because(error);
    // Not one of the temporary folders that an interrupt or the next process removes: it holds the only complete folder for
    // a moment.
    let older = tempfile::Builder::new().prefix(".older-eqim-").tempdir_in(folder(path)).map_err(failed)?;
    let set_aside = older.path().join("older");
    std::fs::rename(path, &set_aside).map_err(failed)?;
    if let Err(error) = std::fs::rename(new.path(), path) {
        if std::fs::rename(&set_aside, path).is_err() {
            let kept = older.keep();
            let problem = format!("cannot be written: {error}; the previous contents are in {}", kept.display());
            return Err(Error::run(path.display(), problem));
        }
        return Err(failed(error));
    }
    let _named = new.keep();
    Ok(())
}

/// Exchanges the names of two folders. Returns `false` if the system or the file system cannot.
#[cfg(target_os = "linux")]
fn exchange(one: &Path, other: &Path) -> io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Exchanges the names of two folders. Returns `false` if the system cannot.
#[cfg(not(target_os = "linux"))]
fn exchange(_one: &Path, _other: &Path) -> io::Result<bool> {
    Ok(false)
}

/// Waits until the contents of a file are on the disk.
fn sync(path: &Path) -> io::Result<()> {
    // Windows flushes only files that are open for writing.
    File::options().read(true).append(cfg!(windows)).open(path)?.sync_all()
}

/// Waits until the names in a folder are on the disk, where the file system can.
fn sync_folder(path: &Path) -> io::Result<()> {
    if cfg!(not(unix)) {
        return Ok(());
    }
    match sync(path) {
        Err(error) if [ErrorKind::InvalidInput, ErrorKind::Unsupported].contains(&error.kind()) => Ok(()),
        result => result,
    }
}

/// Waits until a folder with everything in it is on the disk.
fn sync_all(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_all(&entry.path())?;
        } else if kind.is_file() {
            sync(&entry.path())?;
        }
    }
    sync_folder(folder)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tempfile::TempDir;

    use super::*;

    /// A temporary folder that is not on the list of the process.
    fn place() -> TempDir {
        tempfile::tempdir().unwrap()
    }

    #[cfg(unix)]
    #[test]
    fn only_files_are_replaced_by_files() {
        let place = place();
        let at = |name: &str| place.path().join(name);
        write(&at("file"), b"older").unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        std::os::unix::fs::symlink("nothing", at("dangling")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        for name in ["folder", "link", "dangling", "socket"] {
            let before = at(name).symlink_metadata().unwrap().file_type();
            for error in [check_output(&at(name)).unwrap_err(), write(&at(name), b"new").unwrap_err()] {
                assert!(error.is_input() && error.to_string().contains("is not a file"), "{error}");
            }
            assert_eq!(at(name).symlink_metadata().unwrap().file_type(), before, "{name}");
        }
        for name in ["file", "new"] {
            check_output(&at(name)).unwrap();
            write(&at(name), b"new").unwrap();
            assert_eq!(std::fs::read(at(name)).unwrap(), b"new");
        }
        let error = check_output(Path::new("/dev/null")).unwrap_err();
        assert!(error.is_input() && error.to_string().contains("is not a file"), "{error}");
        assert_eq!(hidden(place.path()), 0);
    }

    #[test]
    fn places_that_cannot_be_written_are_found() {
        let place = place();
        let at = |name: &str| place.path().join(name);
        std::fs::write(at("file"), "").unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        for (path, words) in [
            (at("missing/new"), "there is no folder"),
            (at("file/new"), "there is no folder"),
            (at("folder/.."), "name of a result"),
            ("/proc/new".into(), "cannot be written to"),
        ] {
            let error = check_output_folder(&path).unwrap_err();
            assert!(error.is_input() && error.to_string().contains(words), "{error}");
        }
        assert!(check_output_folder(&at("file")).unwrap_err().to_string().contains("is not a folder"));
        check_output_folder(&at("folder")).unwrap();
        check_output_folder(&at("folder/")).unwrap();
        check_output_folder(&at("new")).unwrap();
    }

    /// Number of hidden names in a folder.
    fn hidden(folder: &Path) -> usize {
        let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with('.')).count()
    }

    #[test]
    fn failed_writes_leave_nothing() {
        let place = place();
        let path = place.path().join("file");
        write(&path, b"older").unwrap();
        let failed = |beside: &Path| {
            std::fs::write(beside, "half").unwrap();
            std::fs::write(beside.with_file_name("of another library"), "").unwrap();
            Err(Error::run("test", "fails"))
        };
        assert_eq!(write_beside(&path, failed).unwrap_err().to_string(), "test: fails");
        assert_eq!((std::fs::read(&path).unwrap(), hidden(place.path())), (b"older".to_vec(), 0));
    }

    /// A folder is complete at any time: a second thread never finds it missing while it is replaced.
    #[cfg(target_os = "linux")]
    #[test]
    fn folders_are_exchanged() {
        let place = place();
        let path = place.path().join("bundle");
        let publish = |number: usize| {
            let new = Temporary::new(place.path(), 0o777).unwrap();
            std::fs::write(new.path().join("number"), number.to_string()).unwrap();
            publish_folder(new, &path).unwrap();
            assert_eq!(std::fs::read_to_string(path.join("number")).unwrap(), number.to_string());
        };
        publish(0);
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let missing = scope.spawn(|| {
                let absent = || usize::from(!path.join("number").exists());
                let mut missing = 0;
                while !ended.load(Ordering::Relaxed) {
                    missing += absent();
                }
                missing
            });
            (1..200).for_each(publish);
            ended.store(true, Ordering::Relaxed);
            assert_eq!(missing.join().unwrap(), 0);
        });
        assert_eq!(hidden(place.path()), 0);
    }

    #[test]
    fn folders_are_replaced_in_two_steps() {
        let place = place();
        let path = place.path().join("bundle");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("older"), "").unwrap();
        let new = Temporary::new(place.path(), 0o777).unwrap();
        std::fs::write(new.path().join("new"), "").unwrap();
        replace_folder(new, &path).unwrap();
        assert!(path.join("new").exists() && !path.join("older").exists());
        assert_eq!(hidden(place.path()), 0);
    }
}
