//! Output paths, checked before any other work.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use eqim::files::{check_folder, folder};
use eqim::long::{is_begun, is_folder, remove_empty};
use eqim::{Error, Result, temporary};

use super::arguments::Arguments;

/// Files that a run writes.
#[derive(Debug)]
pub struct Outputs {
    /// Paths of the images, one per class.
    pub images: Vec<PathBuf>,
    /// File for tokens and noise.
    pub tokens: Option<PathBuf>,
    /// Folder for the trace of the tokens.
    pub trace: Option<PathBuf>,
}

impl Outputs {
    /// Checks that all outputs can be written.
    ///
    /// # Errors
    /// [`Error::setting`] naming the output that cannot be written, and its file or folder.
    pub fn check(arguments: &Arguments) -> Result<Self> {
        let images = numbered(arguments.output.as_deref().unwrap_or(Path::new("image.png")), arguments.images())?;
        let outputs = Self { images, tokens: arguments.save_tokens.clone(), trace: arguments.trace.clone() };
        for path in &outputs.images {
            remove_empty(path);
            writable("output", path)?;
        }
        let bundle = arguments.engine.canonicalize().ok();
        if let Some(path) = outputs.all().find(|path| bundle.is_some() && folder(path).canonicalize().ok() == bundle) {
            return Err(Error::input(
                path.display(),
                "would be written into the bundle of --engine: name another folder",
            ));
        }
        if let Some(path) = &outputs.tokens {
            writable("save_tokens", path)?;
            if outputs.images.iter().any(|image| place(image) == place(path)) {
                return Err(Error::input(format!("--save-tokens {}", path.display()), "is also the path of --output"));
            }
        }
        if let Some(path) = &outputs.trace {
            new_folder("trace", path)?;
        }
        Ok(outputs)
    }

    /// All output paths.
    pub fn all(&self) -> impl Iterator<Item = &PathBuf> {
        self.images.iter().chain(&self.tokens).chain(&self.trace)
    }
}

/// Creates the folder for many images if it does not exist.
///
/// # Errors
/// [`Error::input`] if the folder cannot be created or written to, or if it is the folder of the bundle.
pub fn prepare_folder(folder: &Path, bundle: &Path) -> Result<()> {
    let bad = |problem: String| Error::input(format!("--output {}", folder.display()), problem);
    std::fs::create_dir_all(folder).map_err(|error| bad("cannot be made".into()).because(error))?;
    if folder.canonicalize().ok() == bundle.canonicalize().ok() {
        return Err(bad("is the bundle of --engine: name another folder".into()));
    }
    // If all jobs are done, nothing else is written.
    temporary::tidy(folder);
    writable("output", &folder.join("image.png"))
}

/// Checks that an image of `width` pixels can be written in the format of its name. Logs a warning if the default limit
/// of libpng, a million pixels, is exceeded.
///
/// # Errors
/// [`Error::input`] if a PNG is wider than the format allows.
pub fn check_width(path: &Path, width: usize) -> Result<()> {
    if is_folder(path) {
        return Ok(());
    }
    let tiles = format!("name a folder, {}/, for tiles and an index", path.with_extension("").display());
    if width > WIDEST_PNG {
        let problem = format!("is {width} pixels wide, and a PNG holds at most {WIDEST_PNG}: {tiles}");
        return Err(Error::input(format!("--output {}", path.display()), problem));
    }
    if width > WIDEST_OPENED {
        let effect = format!("many programs open PNGs of at most {WIDEST_OPENED}");
        tracing::warn!("{}: the image is {width} pixels wide, and {effect}: {tiles}", path.display());
    }
    Ok(())
}

/// Maximum width of a PNG in the format.
const WIDEST_PNG: usize = i32::MAX as usize;
/// Maximum width of a PNG that libpng reads by default.
const WIDEST_OPENED: usize = 1_000_000;

/// Canonical path of a file, which does not need to exist.
fn place(path: &Path) -> Option<PathBuf> {
    Some(folder(path).canonicalize().ok()?.join(path.file_name()?))
}

/// Paths of `count` images: `path` itself for one image, otherwise with a number before the extension.
fn numbered(path: &Path, count: usize) -> Result<Vec<PathBuf>> {
    if is_folder(path) {
        let Some(name) = path.file_name() else { return Err(not_png(path)) };
        let numbered = |number| {
            let mut name = OsString::from(name);
            name.push(if count == 1 { "/".into() } else { format!("-{number}/") });
            path.with_file_name(name)
        };
        return Ok((0..count).map(numbered).collect());
    }
    let (Some(stem), Some(extension)) = (path.file_stem(), path.extension()) else {
        return Err(not_png(path));
    };
    if !extension.eq_ignore_ascii_case("png") {
        return Err(not_png(path));
    }
    if count == 1 {
        return Ok(vec![path.to_path_buf()]);
    }
    let name = |number| {
        let mut name = OsString::from(stem);
        name.push(format!("-{number}."));
        name.push(extension);
        path.with_file_name(name)
    };
    Ok((0..count).map(name).collect())
}

fn not_png(path: &Path) -> Error {
    Error::input(
        format!("--output {}", path.display()),
        "is written as a PNG or as tiles: expected a name that ends in .png, or in / for a folder",
    )
}

/// Checks that a file can be created at `path`.
fn writable(field: &'static str, path: &Path) -> Result<()> {
    if is_folder(path) {
        // A run that was interrupted at its very end can have published the folder.
        return if is_begun(path) { can_be_written(field, path) } else { new_folder(field, path) };
    }
    if path.file_name().is_none() || path.symlink_metadata().is_ok_and(|found| !found.is_file()) {
        return Err(Error::setting(field, format!("{}: is not a file", path.display())));
    }
    can_be_written(field, path)
}

/// Checks that a folder can be created at `path`.
fn new_folder(field: &'static str, path: &Path) -> Result<()> {
    is_new(field, path)?;
    can_be_written(field, path)
}

/// Checks that there is nothing at `path`.
///
/// # Errors
/// [`Error::input`] naming the setting and the path.
pub fn is_new(field: &'static str, path: &Path) -> Result<()> {
    // The slash at the end is removed: with it, an existing file would not be found.
    if path.components().as_path().symlink_metadata().is_ok() {
        let problem = format!("{}: exists: remove it first, or name another", path.display());
        return Err(Error::setting(field, problem));
    }
    Ok(())
}

/// Checks that the folder of `path` exists and can be written to.
fn can_be_written(field: &'static str, path: &Path) -> Result<()> {
    check_folder(path).map_err(|error| Error::setting(field, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_images() {
        let name = |path: &str, count| numbered(Path::new(path), count).unwrap();
        assert_eq!(name("out.png", 1), [Path::new("out.png")]);
        assert_eq!(name("a/b.c.PNG", 2), [Path::new("a/b.c-0.PNG"), Path::new("a/b.c-1.PNG")]);
        assert_eq!(name("a/long/", 1)[0].to_str(), Some("a/long/"));
        assert_eq!(
            name("long/", 2).iter().map(|path| path.to_str().unwrap()).collect::<Vec<_>>(),
            ["long-0/", "long-1/"]
        );
        for bad in ["out", "out.jpg", "", "/", ".png", "out.png.txt"] {
            assert!(numbered(Path::new(bad), 1).is_err(), "{bad}");
        }
    }

    #[test]
    fn places_that_cannot_be_written() {
        let folder = tempfile::tempdir().unwrap();
        let problem = |path: &Path| writable("output", path).unwrap_err().to_string();
        assert!(writable("output", &folder.path().join("new.png")).is_ok());
        assert!(problem(folder.path()).ends_with("is not a file"));
        assert!(problem(&folder.path().join("missing/a.png")).contains("create it first"));
        assert!(problem(Path::new("/dev/null")).ends_with("is not a file"));
    }
}
