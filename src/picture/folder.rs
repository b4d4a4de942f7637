//! Folders of photographs: finds the pictures in a folder, and the classes that its sub-folders stand for.

use std::path::{Path, PathBuf};

use walkdir::{DirEntry, WalkDir};

use crate::{Error, Result};

/// File extensions of pictures.
const EXTENSIONS: [&str; 3] = ["jpg", "jpeg", "png"];

/// Paths of all pictures below `folder`, sorted. Hidden files and folders are skipped.
///
/// # Errors
/// [`Error::input`] for a folder that cannot be read or that holds no picture.
pub fn pictures(folder: &Path) -> Result<Vec<PathBuf>> {
    let found = walk(folder)?;
    if found.is_empty() { Err(none_in(folder)) } else { Ok(found) }
}

/// The error for a folder that holds no picture.
pub fn none_in(folder: &Path) -> Error {
    Error::input(folder.display(), "contains no PNG or JPEG")
}

/// Paths of all pictures below `folder`, sorted. There may be none.
fn walk(folder: &Path) -> Result<Vec<PathBuf>> {
    let is_hidden = |entry: &DirEntry| entry.depth() > 0 && entry.file_name().to_string_lossy().starts_with('.');
    let entries = WalkDir::new(folder).follow_links(true).sort_by_file_name().into_iter();
    let mut found = vec![];
    for entry in entries.filter_entry(|entry| !is_hidden(entry)) {
        let unreadable = |error| Error::input(folder.display(), "cannot be read as a folder").because(error);
        let entry = entry.map_err(unreadable)?;
        if is_picture(&entry) {
            found.push(entry.into_path());
        }
    }
    Ok(found)
}

/// The pictures of a folder, by class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Classes {
    /// Names of the sub-folders that hold pictures, sorted.
    pub names: Vec<String>,
    /// Pictures with the index of their class, sorted by path. Pictures directly in the folder have no index.
    pub pictures: Vec<(PathBuf, Option<usize>)>,
}

/// The pictures below `folder`; there may be none. Each sub-folder with pictures is a class. Hidden files and folders
/// are skipped.
///
/// # Errors
/// [`Error::input`] for a folder that cannot be read.
pub fn classes(folder: &Path) -> Result<Classes> {
    let mut found = Classes { names: vec![], pictures: vec![] };
    for path in walk(folder)? {
        let inside = path.strip_prefix(folder).unwrap_or(&path);
        let mut parts = inside.components();
        let (first, is_nested) = (parts.next(), parts.next().is_some());
        let class = first.filter(|_| is_nested).map(|name| name.as_os_str().to_string_lossy().into_owned());
        if let Some(name) = class
            && found.names.last() != Some(&name)
        {
            found.names.push(name);
        }
        found.pictures.push((path, is_nested.then(|| found.names.len() - 1)));
    }
    Ok(found)
}

fn is_picture(entry: &DirEntry) -> bool {
    let extension = entry.path().extension().unwrap_or_default().to_ascii_lowercase();
    entry.file_type().is_file() && EXTENSIONS.iter().any(|known| extension == *known)
}
