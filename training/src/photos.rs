//! Photographs of a training, in folders or in tar shards.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use eqim::digest::{Hash, sha256};
use eqim::picture::folder::{Files, PICTURES, class_of, has_extension, sift};
use eqim::picture::{self, Side};
use eqim::{Error, Result, ResultExt};
use image::RgbImage;
use ndarray::Array3;
use rand::seq::SliceRandom;
use rayon::prelude::*;

use crate::random::{Purpose, randomness};
use crate::shards::{self, Label, Member, Names, Shown};

/// Photographs up to this number are decoded and hashed at the start. Of more, only names and lengths are read.
pub const LOOKED_AT: usize = 1000;

/// Extension of shards.
const SHARD: &str = "tar";
/// Extensions of compressed files. Shards among them are skipped, because the place of a member in them is not known.
const COMPRESSED: [&str; 5] = ["bz2", "gz", "tgz", "xz", "zst"];

/// A photograph.
#[derive(Clone, Debug)]
pub struct Photo {
    /// Path of the file; in a shard, path of the shard and name of the member.
    pub path: PathBuf,
    /// Index of the class in [`Photos::classes`].
    pub class: usize,
    /// SHA-256 of the file, or its length if it was not looked at.
    pub contents: String,
    /// Its place in a shard.
    member: Option<Member>,
}

/// Photographs, with the names of their classes.
#[derive(Clone, Debug)]
pub struct Photos {
    /// Names of the subfolders, sorted; numbers, if shards have numbers; a single empty name if there are no classes.
    pub classes: Vec<String>,
    /// The photographs, sorted by path, those of a shard in its order.
    pub photos: Arc<Vec<Photo>>,
    /// Why each of the pictures that were looked at and cannot be used is skipped. The text begins with its path.
    pub skipped: Vec<String>,
    /// Least height and width, in pixels.
    least: (usize, usize),
    /// Paths of those that could not be used later.
    refused: Arc<Mutex<HashSet<PathBuf>>>,
}

impl Photos {
    /// Finds all PNGs and JPEGs in `folder`, whose subfolders are the classes, or in its tar shards. `folder` may also be a
    /// shard. A picture has to be at least `height` pixels high and, after scaling to that height, at least `width` pixels wide.
    /// Up to [`LOOKED_AT`] pictures are decoded, and those that cannot be used are skipped with a reason. Hidden files and files
    /// of other types are ignored.
    ///
    /// # Errors
    /// [`Error::input`] if the folder or a shard cannot be read, if no picture can be used, or if only some have a class;
    /// [`Error::run`] if a file cannot be read.
    pub fn open(folder: &Path, height: usize, width: usize) -> Result<Self> {
        let least = (height, width);
        let (found, mut skipped) = find(folder)?;
        let found = if found.len() <= LOOKED_AT {
            sift(folder, found, &mut skipped, |found| {
                let bytes = contents(&found.path, found.member.as_ref())?;
                Ok(usable(&found.path, &bytes, least).map(|_| Found { contents: sha256(&bytes), ..found }))
            })?
        } else {
            let length = |found: Found| Ok(Found { contents: format!("{} bytes", found.length()?), ..found });
            found.into_par_iter().map(length).collect::<Result<Vec<_>>>()?
        };
        let classes = classes(&found)?;
        let photo = |Found { path, label, contents, member }| {
            let class = match label {
                Some(Label::Number(number)) => number,
                Some(Label::Name(name)) => classes.binary_search_by(|class| class.as_str().cmp(&name)).unwrap_or(0),
                None => 0,
            };
            Photo { path, class, contents, member }
        };
        let photos = Arc::new(found.into_iter().map(photo).collect());
        Ok(Self { classes, photos, skipped, least, refused: Arc::default() })
    }

    /// Number of photographs.
    pub fn len(&self) -> usize {
        self.photos.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.photos.is_empty()
    }

    /// Reads and decodes a photograph. `None` if it cannot be used: the reason is written to standard error, once for each
    /// photograph, also by ranks that write nothing else.
    ///
    /// # Errors
    /// [`Error::input`] or [`Error::run`] if it can no longer be read.
    pub fn load(&self, photo: &Photo) -> Result<Option<RgbImage>> {
        let error = match usable(&photo.path, &contents(&photo.path, photo.member.as_ref())?, self.least) {
            Ok(picture) => return Ok(Some(picture)),
            Err(error) if error.is_input() => error,
            Err(error) => return Err(error),
        };
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.insert(photo.path.clone()) {
            eqim_cli::note_error(format_args!("skipped, {} so far: {error}", refused.len()));
        }
        Ok(None)
    }

    /// A whole photograph, scaled to `height` and cut to a multiple of `multiple` pixels on its left, `[3, height, width]` in
    /// -1..1; `None` if it cannot be [loaded](Photos::load).
    ///
    /// # Errors
    /// Those of [`Photos::load`] and [`picture::scale`].
    pub fn whole(&self, photo: &Photo, height: usize, multiple: usize) -> Result<Option<Array3<f32>>> {
        let scale = |picture| picture::scale(&photo.path, picture, height, multiple, Side::Right);
        Ok(self.load(photo)?.map(scale).transpose()?.map(|picture| picture.pixels))
    }

    /// Holds out `count` photographs that can be used, chosen at random from `seed`. Returns the photographs to train on and
    /// the held-out photographs.
    ///
    /// # Errors
    /// [`Error::input`] if no photograph would be left to train on; those of [`Photos::load`].
    pub fn split(self, count: usize, seed: u64) -> Result<(Self, Self)> {
        if count >= self.len() {
            let problem = format!("holds out {count} of {} photographs, so none is left for training", self.len());
            return Err(Error::input("validation", problem));
        }
        let mut drawn: Vec<usize> = (0..self.len()).collect();
        drawn.shuffle(&mut randomness(seed, Purpose::Split, 0));
        let mut held_out = BTreeSet::new();
        for index in drawn {
            if held_out.len() < count && self.load(&self.photos[index])?.is_some() {
                held_out.insert(index);
            }
        }
        if held_out.len() < count {
            let problem =
                format!("holds out {count} photographs, but only {} of {} can be used", held_out.len(), self.len());
            return Err(Error::input("validation", problem));
        }
        let part = |is_held_out: bool| {
            let chosen = |(index, _): &(usize, &Photo)| held_out.contains(index) == is_held_out;
            let photos = self.photos.iter().enumerate().filter(chosen).map(|(_, photo)| photo.clone()).collect();
            Self { photos: Arc::new(photos), skipped: vec![], ..self.clone() }
        };
        Ok((part(false), part(true)))
    }

    /// Hash of the names, classes and contents of the photographs, in order. Of photographs that were not looked at, the
    /// lengths stand for the contents.
    pub fn fingerprint(&self) -> String {
        let mut hash = Hash::default();
        self.photos.iter().for_each(|photo| hash.add(self.identity(photo)));
        hash.hex()
    }

    /// Class, name and contents of a photograph, in one line.
    pub fn identity(&self, Photo { path, class, contents, .. }: &Photo) -> String {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        format!("{}/{name} {contents}\n", self.classes[*class])
    }
}

/// A photograph whose class has no index yet.
struct Found {
    path: PathBuf,
    label: Option<Label>,
    contents: String,
    member: Option<Member>,
}

impl Found {
    fn length(&self) -> Result<u64> {
        match &self.member {
            Some(member) => Ok(member.length),
            None => Ok(std::fs::metadata(&self.path).or_input(self.path.display())?.len()),
        }
    }
}

/// Whether this is a shard, by its name.
fn is_shard(path: &Path) -> bool {
    has_extension(path, &[SHARD])
}

/// Whether this is a compressed shard, by its name.
fn is_compressed_shard(path: &Path) -> bool {
    let inner = Path::new(path.file_stem().unwrap_or_default());
    has_extension(path, &["tgz"]) || has_extension(path, &COMPRESSED) && is_shard(inner)
}

/// Finds the shards and pictures of a folder, and why others are skipped. `folder` may also be a shard.
fn files(folder: &Path) -> Result<Files> {
    let found = match folder.is_file() && (is_shard(folder) || is_compressed_shard(folder)) {
        true => Files { paths: vec![folder.to_path_buf()], skipped: vec![] },
        false => Files::below(folder, &[&PICTURES[..], &[SHARD], &COMPRESSED].concat())?,
    };
    let (compressed, paths): (Vec<_>, Vec<_>) =
        found.paths.into_iter().partition(|path| has_extension(path, &COMPRESSED));
    let mut skipped = found.skipped;
    for path in compressed.iter().filter(|path| is_compressed_shard(path)) {
        skipped.push(format!("{}: is a compressed shard, expected a .tar: decompress it", path.display()));
    }
    Ok(Files { paths, skipped })
}

/// Finds all photographs of a folder or a shard, and why others are skipped.
fn find(folder: &Path) -> Result<(Vec<Found>, Vec<String>)> {
    let Files { paths, mut skipped } = files(folder)?;
    let (shards, pictures): (Vec<_>, Vec<_>) = paths.into_iter().partition(|path| is_shard(path));
    if let (Some(shard), Some(picture)) = (shards.first(), pictures.first()) {
        let problem = format!(
            "has shards and single pictures, expected one of them: {} and {}",
            shard.display(),
            picture.display()
        );
        return Err(Error::input(folder.display(), problem));
    }
    let mut names = Names::default();
    let single = |path: PathBuf| {
        let label = class_of(folder, &path).map(|name| names.label(&name));
        Found { path, label, contents: String::new(), member: None }
    };
    let found: Vec<Found> = match shards.is_empty() {
        true => pictures.into_iter().map(single).collect(),
        false => {
            let inside =
                |Shown { path, label, member }| Found { path, label, contents: String::new(), member: Some(member) };
            shards::photographs(&shards, &mut skipped)?.into_iter().map(inside).collect()
        }
    };
    match found.is_empty() {
        true if skipped.is_empty() => {
            Err(Error::input(folder.display(), "contains no PNG or JPEG, and no tar shard with one"))
        }
        true => {
            let problem = format!("no picture can be used, {} skipped, for example: {}", skipped.len(), skipped[0]);
            Err(Error::input(folder.display(), problem))
        }
        false => Ok((found, skipped)),
    }
}

/// Names of the classes: numbers up to the largest, or sorted names.
fn classes(found: &[Found]) -> Result<Vec<String>> {
    if let Some(largest) = found.iter().filter_map(|found| found.label.as_ref()?.number()).max() {
        return Ok((0..=largest).map(|number| number.to_string()).collect());
    }
    let names: BTreeSet<&str> = found.iter().filter_map(|found| found.label.as_ref()?.name()).collect();
    let loose = found.iter().find(|found| found.label.is_none());
    match (loose, names.is_empty()) {
        (_, true) => Ok(vec![String::new()]),
        (None, false) => Ok(names.into_iter().map(String::from).collect()),
        (Some(loose), false) => {
            let problem = "lies next to the folders of classes: put it into one of them, or remove the folders";
            Err(Error::input(loose.path.display(), problem))
        }
    }
}

/// Reads the bytes of a photograph.
fn contents(path: &Path, member: Option<&Member>) -> Result<Vec<u8>> {
    match member {
        Some(member) => member.contents(path),
        None => picture::contents(path),
    }
}

/// Decodes a photograph and checks that it is large enough.
fn usable(path: &Path, bytes: &[u8], (height, width): (usize, usize)) -> Result<RgbImage> {
    let picture = picture::decode(path, bytes)?;
    let (found_width, found_height) = picture.dimensions();
    let scaled = (f64::from(found_width) * height as f64 / f64::from(found_height)).round() as usize;
    if (found_height as usize) < height || scaled < width {
        let problem = format!(
            "is {found_width}×{found_height} pixels, expected a height of at least {height} and, scaled to that, a \
             width of at least {width}"
        );
        return Err(Error::input(path.display(), problem));
    }
    Ok(picture)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use image::Rgb;

    use super::*;

    /// A folder with one class of pictures that differ in their red channel.
    pub(crate) fn photos(count: u8) -> (tempfile::TempDir, Photos) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("class")).unwrap();
        for index in 0..count {
            let picture = RgbImage::from_fn(90, 50, |x, y| Rgb([20 * index, (2 * x) as u8, (5 * y) as u8]));
            picture.save(folder.path().join(format!("class/{index}.png"))).unwrap();
        }
        let photos = Photos::open(folder.path(), 32, 32).unwrap();
        (folder, photos)
    }

    #[test]
    fn validation_takes_what_training_leaves() {
        let (_folder, photos) = photos(6);
        let names = |photos: &Photos| photos.photos.iter().map(|photo| photo.path.clone()).collect::<Vec<_>>();
        let (training, held_out) = photos.clone().split(2, 3).unwrap();
        let mut all = [names(&training), names(&held_out)].concat();
        all.sort();
        assert_eq!((all, held_out.photos.len()), (names(&photos), 2));
        assert!(photos.split(6, 3).is_err());
    }

    #[test]
    fn photographs_beside_folders_are_an_error_and_alone_a_class() {
        let (folder, _) = photos(2);
        let class = folder.path().join("class");
        assert_eq!(Photos::open(&class, 32, 32).unwrap().classes, [""]);
        std::fs::copy(class.join("0.png"), folder.path().join("lost.png")).unwrap();
        let error = Photos::open(folder.path(), 32, 32).unwrap_err();
        assert!(error.is_input() && error.to_string().contains("lost.png"), "{error}");
    }
}
