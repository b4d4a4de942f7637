//! Tar shards of photographs, as WebDataset writes them.
//!
//! A sample is the members that have the same name up to the first dot of their last component: `0001.jpg` and `0001.cls`. The
//! extension is what follows that dot.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use eqim::picture::folder::{PICTURES, has_extension, is_hidden};
use eqim::{Error, Result, ResultExt, files, picture};
use rayon::prelude::*;
use tar::{Archive, Entry};

/// Largest number of a class.
const MOST_CLASSES: usize = 1 << 16;
/// Most shards whose headers are read at the same time. Readers wait for the disk, so it does not depend on the cores.
const READERS: usize = 16;

/// Where the bytes of a photograph are in a shard.
#[derive(Clone, Debug)]
pub struct Member {
    shard: Arc<Path>,
    start: u64,
    /// Number of bytes.
    pub length: u64,
}

impl Member {
    /// Reads the bytes of the photograph, which is called `path`.
    ///
    /// # Errors
    /// [`Error::input`] if the shard cannot be opened; [`Error::run`] if it cannot be read or is shorter than it was.
    pub fn contents(&self, path: &Path) -> Result<Vec<u8>> {
        let mut file = files::open(&self.shard)?;
        if file.metadata().or_run(path.display())?.len() < self.start + self.length {
            return Err(Error::run(path.display(), "ends early: the shard has changed"));
        }
        file.seek(SeekFrom::Start(self.start)).or_run(path.display())?;
        picture::contents_of(path, file.take(self.length))
    }
}

/// The class of a photograph, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Label {
    /// Name of its folder.
    Name(Arc<str>),
    /// Number in a `.cls` member.
    Number(usize),
}

impl Label {
    /// The name, if it is one.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Name(name) => Some(name),
            Self::Number(_) => None,
        }
    }

    /// The number, if it is one.
    pub fn number(&self) -> Option<usize> {
        match self {
            Self::Name(_) => None,
            Self::Number(number) => Some(*number),
        }
    }
}

/// Names of folders, of which many are equal.
#[derive(Debug, Default)]
pub struct Names(BTreeSet<Arc<str>>);

impl Names {
    /// The label of this name. Labels of equal names share it.
    pub fn label(&mut self, name: &str) -> Label {
        let known = self.0.get(name).cloned();
        Label::Name(known.unwrap_or_else(|| {
            let new = Arc::<str>::from(name);
            self.0.insert(new.clone());
            new
        }))
    }
}

/// A photograph in a shard.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Path of the shard, followed by the name of the member.
    pub path: PathBuf,
    /// Its class, if it has one.
    pub label: Option<Label>,
    /// Its bytes.
    pub member: Member,
}

/// Finds the photographs of shards, in the order of the shards and of their members. The reasons why others cannot be used are
/// added to `skipped`. Photographs have the numbers of the `.cls` members if there are any, and otherwise the names of the folders
/// that they lie in.
///
/// # Errors
/// [`Error::input`] if a shard cannot be opened or is not a tar file; [`Error::run`] if threads cannot be started.
pub fn photographs(shards: &[PathBuf], skipped: &mut Vec<String>) -> Result<Vec<Shown>> {
    let threads = rayon::ThreadPoolBuilder::new().num_threads(shards.len().min(READERS));
    let threads = threads.thread_name(|index| format!("headers-{index}")).build().or_run("reading shards")?;
    let read: Vec<Shard> =
        threads.install(|| shards.par_iter().map(|shard| Shard::read(shard)).collect::<Result<_>>())?;
    let has_numbers = read.iter().any(|shard| !shard.classes.is_empty());
    let mut found = vec![];
    for shard in read {
        skipped.extend(shard.skipped);
        for (key, mut shown) in shard.pictures {
            if has_numbers {
                let path = shown.path.display();
                match shard.classes.get(&key) {
                    Some(Ok(number)) => shown.label = Some(Label::Number(*number)),
                    Some(Err(text)) => {
                        let most = MOST_CLASSES - 1;
                        skipped.push(format!("{path}: its class is {text:?}, expected a number from 0 to {most}"));
                        continue;
                    }
                    None => {
                        skipped.push(format!("{path}: has no class, expected the member {key}.cls"));
                        continue;
                    }
                }
            }
            found.push(shown);
        }
    }
    Ok(found)
}

/// What a shard has.
#[derive(Default)]
struct Shard {
    /// The photographs, with their names up to the first dot.
    pictures: Vec<(String, Shown)>,
    /// The numbers of the classes, by the names of the samples; the text of one that is not a number.
    classes: HashMap<String, Result<usize, String>>,
    skipped: Vec<String>,
}

impl Shard {
    /// Reads the headers of a shard, and its classes.
    fn read(path: &Path) -> Result<Self> {
        let file = files::open(path)?;
        let length = file.metadata().or_run(path.display())?.len();
        let (mut shard, mut archive, path) = (Self::default(), Archive::new(file), Arc::<Path>::from(path));
        let unreadable = |error| Error::input(path.display(), "is not a tar file that can be read").because(error);
        let (mut names, mut last) = (Names::default(), None);
        for entry in archive.entries_with_seek().map_err(unreadable)? {
            let mut entry = match (entry, &last) {
                (Ok(entry), _) => entry,
                (Err(error), None) => return Err(unreadable(error)),
                // The place of the next member is not known.
                (Err(error), Some(name)) => {
                    let left = format!("{}: its members after {name} are not read: {error}", path.display());
                    shard.skipped.push(left);
                    break;
                }
            };
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            shard.add(&path, length, &name, &mut entry, &mut names);
            last = Some(name);
        }
        Ok(shard)
    }

    fn add(&mut self, shard: &Arc<Path>, length: u64, name: &str, entry: &mut Entry<File>, names: &mut Names) {
        let inside = Path::new(name);
        let is_left_out = inside.iter().any(|part| part != OsStr::new(".") && is_hidden(part));
        let (folder, file) = name.rsplit_once('/').map_or(("", name), |(folder, file)| (folder, file));
        let (stem, extension) = file.split_once('.').unwrap_or((file, ""));
        let is_class = extension == "cls";
        if is_left_out || !entry.header().entry_type().is_file() || !(is_class || has_extension(inside, &PICTURES)) {
            return;
        }
        let key = if folder.is_empty() { stem.to_string() } else { format!("{folder}/{stem}") };
        let path = shard.join(inside.strip_prefix("/").unwrap_or(inside));
        if is_class {
            // More is not a number that fits.
            let mut text = String::new();
            let read = entry.take(32).read_to_string(&mut text);
            let number = text.trim().parse().ok().filter(|number| *number < MOST_CLASSES && read.is_ok());
            self.classes.insert(key, number.ok_or(text));
            return;
        }
        let member = Member { shard: shard.clone(), start: entry.raw_file_position(), length: entry.size() };
        let problem = if !PICTURES.contains(&extension.to_ascii_lowercase().as_str()) {
            Some(format!("its extension is {extension:?}, expected jpg, jpeg or png after the first dot"))
        } else if member.start.saturating_add(member.length) > length {
            Some("is cut off: the shard ends before it".to_string())
        } else {
            None
        };
        if let Some(problem) = problem {
            self.skipped.push(format!("{}: {problem}", path.display()));
            return;
        }
        let parent = folder.rsplit('/').next().filter(|name| !matches!(*name, "" | "."));
        let label = parent.map(|name| names.label(name));
        self.pictures.push((key, Shown { path, label, member }));
    }
}

#[cfg(test)]
mod tests {
    use tar::{Builder, Header};

    use super::*;

    /// A shard of members with these names and contents.
    fn shard(folder: &Path, name: &str, members: &[(&str, &[u8])]) -> PathBuf {
        let path = folder.join(name);
        let mut builder = Builder::new(File::create(&path).unwrap());
        for (name, contents) in members {
            let mut header = Header::new_gnu();
            header.set_size(contents.len() as u64);
            builder.append_data(&mut header, name, *contents).unwrap();
        }
        builder.into_inner().unwrap();
        path
    }

    /// Names, classes and contents of the photographs in shards.
    fn found(shards: &[PathBuf], skipped: &mut Vec<String>) -> Vec<(String, Option<Label>, Vec<u8>)> {
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_string();
        let all = photographs(shards, skipped).unwrap();
        all.iter()
            .map(|shown| (name(&shown.path), shown.label.clone(), shown.member.contents(&shown.path).unwrap()))
            .collect()
    }

    #[test]
    fn members_of_a_sample_belong_together() {
        let folder = tempfile::tempdir().unwrap();
        let members: [(&str, &[u8]); 9] = [
            ("b.cls", b"3\n"),
            ("b.jpg", b"b"),
            ("a.jpg", b"a"),
            ("a.json", b"{}"),
            ("a.cls", b"0"),
            ("no.jpg", b"no"),
            ("bad.PNG", b"bad"),
            ("bad.cls", b"cat"),
            ("a.mask.png", b"mask"),
        ];
        let mut skipped = vec![];
        let photos = found(&[shard(folder.path(), "0.tar", &members)], &mut skipped);
        let expected = [("b.jpg", 3), ("a.jpg", 0)];
        let expected = expected.map(|(name, class)| (name.to_string(), Some(Label::Number(class)), name[..1].into()));
        assert_eq!(photos, expected);
        let ends = ["expected jpg, jpeg or png after the first dot", "expected the member no.cls", "from 0 to 65535"];
        assert!(skipped.len() == 3 && skipped.iter().zip(ends).all(|(text, end)| text.ends_with(end)), "{skipped:?}");
    }

    #[test]
    fn without_classes_folders_are_classes() {
        let folder = tempfile::tempdir().unwrap();
        let long = format!("{}/1.jpg", "x".repeat(150));
        let members: [(&str, &[u8]); 6] = [
            ("./train/city/1.jpg", b"1"),
            ("sky/2.jpg", b"2"),
            (&long, b"3"),
            ("4.jpg", b"4"),
            ("sky/._2.jpg", b""),
            (".x/5.jpg", b""),
        ];
        let labels: Vec<_> = found(&[shard(folder.path(), "0.tar", &members)], &mut vec![])
            .into_iter()
            .map(|(_, label, _)| label)
            .collect();
        let name = |name: &str| Some(Label::Name(name.into()));
        assert_eq!(labels, [name("city"), name("sky"), name(&"x".repeat(150)), None]);
    }

    #[test]
    fn damaged_shards_keep_what_can_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let contents = [7; 2000];
        let path = shard(folder.path(), "0.tar", &[("1.jpg", &contents), ("2.jpg", &contents), ("3.jpg", &contents)]);
        let whole = std::fs::read(&path).unwrap();
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let mut skipped = vec![];
            let names: Vec<_> =
                found(std::slice::from_ref(&path), &mut skipped).into_iter().map(|(name, ..)| name).collect();
            (names, skipped)
        };
        // A member takes a header of 512 bytes and 2048 bytes.
        let (names, skipped) = read(&whole[..2560 + 1000]);
        assert_eq!((names, skipped.len()), (vec!["1.jpg".to_string()], 1));
        assert!(skipped[0].contains("2.jpg: is cut off"), "{skipped:?}");
        let mut damaged = whole.clone();
        damaged[2560..2600].fill(0xff);
        let (names, skipped) = read(&damaged);
        assert_eq!((names, skipped.len()), (vec!["1.jpg".to_string()], 1));
        assert!(skipped[0].contains("members after 1.jpg are not read"), "{skipped:?}");
        std::fs::write(&path, [1; 4000]).unwrap();
        let error = photographs(std::slice::from_ref(&path), &mut vec![]).unwrap_err();
        assert!(error.is_input() && error.to_string().contains("0.tar: is not a tar file"), "{error}");
    }

    #[test]
    fn a_shard_that_shrinks_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = shard(folder.path(), "0.tar", &[("1.jpg", &[7; 2000])]);
        let shown = photographs(std::slice::from_ref(&path), &mut vec![]).unwrap().remove(0);
        File::options().write(true).open(&path).unwrap().set_len(1000).unwrap();
        let error = shown.member.contents(&shown.path).unwrap_err();
        assert!(!error.is_input() && error.to_string().contains("the shard has changed"), "{error}");
    }
}
