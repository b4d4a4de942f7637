//! Folders of photographs: finds the pictures in a folder, and the classes that its sub-folders stand for.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsStr;
use std::fs::{self, FileType};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::{Error, Result, ResultExt, picture};

/// File extensions of pictures.
pub const PICTURES: [&str; 3] = ["jpg", "jpeg", "png"];

/// Folders that systems put beside photographs: copies of metadata, previews and deleted files.
const FOREIGN: [&str; 5] = ["__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN"];

/// The pictures of a folder that can be used. All of them have been looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder<T> {
    /// Names of the sub-folders that hold such pictures, sorted.
    pub classes: Vec<String>,
    /// The pictures, sorted by path.
    pub pictures: Vec<Entry<T>>,
    /// Why each of the other pictures is skipped. The text begins with its path.
    pub skipped: Vec<String>,
}

/// A picture of a [`Folder`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<T> {
    /// Path of the file.
    pub path: PathBuf,
    /// Index of the class; `None` for a picture directly in the folder.
    pub class: Option<usize>,
    /// What was read of the picture.
    pub content: T,
}

impl<T: Send> Folder<T> {
    /// Reads all pictures below `folder`. `look` is called with the path and the bytes of each file, on several threads;
    /// a picture that it refuses with an [`Error::input`] is skipped.
    ///
    /// Hidden files and folders are left out, and so are the folders that systems put beside photographs, such as
    /// `__MACOSX`. Links are followed. A photograph that is reached on several ways counts once, under the path without
    /// links if there is one.
    ///
    /// # Errors
    /// [`Error::input`] if the folder cannot be read or no picture can be used; [`Error::run`] if a file cannot be read;
    /// other errors of `look`.
    pub fn open(folder: &Path, look: impl Fn(&Path, &[u8]) -> Result<T> + Sync) -> Result<Self> {
        let Files { paths, mut skipped } = Files::below(folder, &PICTURES)?;
        let read = |path: PathBuf| {
            let content = look(&path, &picture::contents(&path)?);
            Ok(content.map(|content| (path, content)))
        };
        let mut found = Self { classes: vec![], pictures: vec![], skipped: vec![] };
        for (path, content) in sift(folder, paths, &mut skipped, read)? {
            found.add(folder, path, content);
        }
        Ok(Self { skipped, ..found })
    }

    /// Adds the next picture in the order of the paths.
    fn add(&mut self, folder: &Path, path: PathBuf, content: T) {
        let name = class_of(folder, &path);
        let class = name.map(|name| {
            if self.classes.last() != Some(&name) {
                self.classes.push(name);
            }
            self.classes.len() - 1
        });
        self.pictures.push(Entry { path, class, content });
    }
}

/// Name of the sub-folder of `folder` that `path` lies in, directly or deeper.
pub fn class_of(folder: &Path, path: &Path) -> Option<String> {
    let mut parts = path.strip_prefix(folder).unwrap_or(path).components();
    let (first, is_nested) = (parts.next(), parts.next().is_some());
    first.filter(|_| is_nested).map(|name| name.as_os_str().to_string_lossy().into_owned())
}

/// Looks at pictures of `folder` on several threads. A picture for which `look` returns an inner [`Error::input`] is added to
/// `skipped`.
///
/// # Errors
/// [`Error::input`] if no picture can be used; other errors of `look`.
pub fn sift<P: Send, T: Send>(
    folder: &Path,
    pictures: Vec<P>,
    skipped: &mut Vec<String>,
    look: impl Fn(P) -> Result<Result<T>> + Sync,
) -> Result<Vec<T>> {
    let looked = pictures.into_par_iter().map(&look).collect::<Result<Vec<_>>>()?;
    let (mut usable, mut first) = (vec![], None);
    for content in looked {
        match content {
            Ok(content) => usable.push(content),
            Err(error) if error.is_input() => {
                skipped.push(error.to_string());
                first.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
    match (usable.is_empty(), first) {
        (false, _) => Ok(usable),
        (true, None) => Err(Error::input(folder.display(), "contains no PNG or JPEG")),
        (true, Some(error)) => {
            let skipped = skipped.len();
            Err(error.about(format!("{}: no picture can be used, {skipped} skipped, for example", folder.display())))
        }
    }
}

/// The files of a folder.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// Their paths, sorted.
    pub paths: Vec<PathBuf>,
    /// Why each of the links that lead nowhere is skipped. The text begins with its path.
    pub skipped: Vec<String>,
}

impl Files {
    /// Finds all files below `folder` with one of these `extensions`, which are in lower case. There may be none. Hidden files
    /// are left out and links are followed as by [`Folder::open`].
    ///
    /// # Errors
    /// [`Error::input`] if a folder cannot be read.
    pub fn below(folder: &Path, extensions: &[&str]) -> Result<Self> {
        let mut walk = Walk {
            seen: HashSet::new(),
            folders: BTreeSet::new(),
            links: BTreeSet::new(),
            extensions,
            files: Self::default(),
        };
        let real = fs::canonicalize(folder).map_err(unreadable(folder))?;
        walk.seen.insert(real.clone());
        walk.folders.insert(Place { shown: folder.to_path_buf(), real });
        loop {
            if let Some(folder) = walk.folders.pop_first() {
                walk.read(&folder)?;
            } else if let Some(link) = walk.links.pop_first() {
                walk.follow(link)?;
            } else {
                walk.files.paths.sort();
                return Ok(walk.files);
            }
        }
    }
}

/// A file or folder: the path that it was found by, and its canonical path.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    shown: PathBuf,
    real: PathBuf,
}

/// A search for files.
struct Walk<'a> {
    /// Canonical paths of the folders and files so far. Each counts once, so that loops of links end.
    seen: HashSet<PathBuf>,
    /// Folders to read.
    folders: BTreeSet<Place>,
    /// Links to follow, after all folders: a photograph is known by its own path rather than by that of a link.
    links: BTreeSet<PathBuf>,
    /// Extensions of the files to find.
    extensions: &'a [&'a str],
    files: Files,
}

impl Walk<'_> {
    fn read(&mut self, folder: &Place) -> Result<()> {
        for entry in fs::read_dir(&folder.shown).map_err(unreadable(&folder.shown))? {
            let entry = entry.map_err(unreadable(&folder.shown))?;
            let (name, kind) = (entry.file_name(), entry.file_type().map_err(unreadable(&folder.shown))?);
            if is_hidden(&name) {
                continue;
            }
            let shown = folder.shown.join(&name);
            if kind.is_symlink() {
                self.links.insert(shown);
            } else {
                self.add(Place { shown, real: folder.real.join(name) }, kind);
            }
        }
        Ok(())
    }

    fn follow(&mut self, link: PathBuf) -> Result<()> {
        let followed = fs::canonicalize(&link).and_then(|real| Ok((fs::metadata(&real)?.file_type(), real)));
        match followed {
            Ok((kind, real)) => self.add(Place { shown: link, real }, kind),
            Err(error) if leads_nowhere(&error) => {
                self.files.skipped.push(format!("{}: is a link to nothing", link.display()));
            }
            Err(error) => return Err(error).or_input(link.display()),
        }
        Ok(())
    }

    /// Adds a folder or file, unless it is known.
    fn add(&mut self, place: Place, kind: FileType) {
        let is_wanted = kind.is_dir() || kind.is_file() && has_extension(&place.shown, self.extensions);
        if !is_wanted || !self.seen.insert(place.real.clone()) {
            return;
        }
        if kind.is_dir() {
            self.folders.insert(place);
        } else {
            self.files.paths.push(place.shown);
        }
    }
}

fn unreadable(folder: &Path) -> impl Fn(io::Error) -> Error {
    move |error| Error::input(folder.display(), "cannot be read as a folder").because(error)
}

/// Whether a file or folder is hidden, as AppleDouble files `._name` are, or belongs to the system.
pub fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".") || FOREIGN.iter().any(|foreign| name == *foreign)
}

/// Whether a link could not be followed because it leads to a name that does not exist, or to itself.
fn leads_nowhere(error: &io::Error) -> bool {
    // ELOOP of Linux and of macOS; the standard library has no stable name for it.
    const LOOP: [i32; 2] = [40, 62];
    let is_loop = error.raw_os_error().is_some_and(|code| LOOP.contains(&code));
    is_loop || matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Whether the name of a file ends in one of these extensions, which are in lower case.
pub fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
    extensions.iter().any(|known| extension == *known)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// A folder with files of these names, which hold their name.
    fn folder(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
        folder
    }

    fn open(folder: &Path) -> Folder<String> {
        Folder::open(folder, |path, bytes| match bytes {
            b"" => Err(Error::input(path.display(), "is empty")),
            bytes => Ok(String::from_utf8(bytes.to_vec()).unwrap()),
        })
        .unwrap()
    }

    /// Names of the pictures inside the folder, with their classes.
    fn listed(folder: &Path) -> Vec<(String, Option<usize>)> {
        let inside = |path: &Path| path.strip_prefix(folder).unwrap().to_str().unwrap().to_string();
        open(folder).pictures.iter().map(|entry| (inside(&entry.path), entry.class)).collect()
    }

    #[test]
    fn hidden_files_and_those_of_systems_are_left_out() {
        let seen = ["b/2.PNG", "b/deep/1.jpeg", "c/1.jpg", "top.png"];
        let hidden = [
            "b/._2.PNG",
            ".b/1.jpg",
            "b/.ipynb_checkpoints/1.jpg",
            "__MACOSX/b/1.jpg",
            "b/@eaDir/1.jpg",
            "texts/notes.txt",
            "b/Thumbs.db",
        ];
        let folder = folder(&[&seen[..], &hidden].concat());
        fs::create_dir(folder.path().join("a")).unwrap();
        let expected = [Some(0), Some(0), Some(1), None];
        let expected: Vec<_> = seen.map(String::from).into_iter().zip(expected).collect();
        assert_eq!(listed(folder.path()), expected);
        assert_eq!(open(folder.path()).classes, ["b", "c"]);
    }

    #[test]
    fn what_is_refused_is_skipped_and_makes_no_class() {
        let folder = folder(&["a/1.png", "b/1.png", "c/1.png"]);
        for name in ["a/1.png", "c/1.png"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let found = open(folder.path());
        assert_eq!((found.classes.as_slice(), found.pictures.len()), (&["b".to_string()][..], 1));
        assert!(found.skipped.len() == 2 && found.skipped[0].ends_with("1.png: is empty"), "{:?}", found.skipped);
        let refused =
            |error: fn(&str, &str) -> Error| Folder::<()>::open(folder.path(), |_, _| Err(error("x", "is bad")));
        let error = refused(|path, problem| Error::input(path, problem)).unwrap_err();
        assert!(error.is_input() && error.to_string().ends_with("3 skipped, for example: x: is bad"), "{error}");
        assert!(!refused(|path, problem| Error::run(path, problem)).unwrap_err().is_input());
    }

    #[cfg(unix)]
    #[test]
    fn each_photograph_counts_once_and_loops_of_links_end() {
        use std::os::unix::fs::symlink;
        let (folder, other) = (folder(&["b/1.png", "b/2.png"]), folder(&["3.png", "4.png"]));
        let at = |name: &str| folder.path().join(name);
        for (target, link) in
            [(".", "a"), (".", "z"), ("..", "b/up"), ("b/1.png", "b.png"), ("b", "a-link"), ("self", "self")]
        {
            symlink(target, at(link)).unwrap();
        }
        symlink(other.path(), at("c")).unwrap();
        symlink(other.path().join("3.png"), at("3.png")).unwrap();
        symlink("missing.png", at("dangling.png")).unwrap();
        // Two links in each of these folders lead to the next one: 2^40 paths.
        for level in 0..40 {
            fs::create_dir(at(&format!("chain{level}"))).unwrap();
            for link in ["one", "two"] {
                symlink(format!("../chain{}", level + 1), at(&format!("chain{level}/{link}"))).unwrap();
            }
        }
        fs::create_dir(at("chain40")).unwrap();
        fs::write(at("chain40/5.png"), "5").unwrap();
        let found: BTreeMap<_, _> = listed(folder.path()).into_iter().collect();
        let names: Vec<&str> = found.keys().map(String::as_str).collect();
        assert_eq!(names, ["3.png", "b/1.png", "b/2.png", "c/4.png", "chain40/5.png"]);
        let skipped = open(folder.path()).skipped;
        assert!(skipped.len() == 2 && skipped.iter().all(|text| text.ends_with("is a link to nothing")), "{skipped:?}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_disk_that_fails_is_an_error() {
        let folder = folder(&["1.png"]);
        // Its first page is not mapped, so that reading gives EIO.
        std::os::unix::fs::symlink("/proc/self/mem", folder.path().join("2.png")).unwrap();
        let error = Folder::<()>::open(folder.path(), |_, _| Ok(())).unwrap_err();
        assert!(!error.is_input() && error.to_string().contains("2.png: cannot be read"), "{error}");
    }
}
