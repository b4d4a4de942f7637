//! Sets of pictures: whole, or square crops at random places or at the positions of tokens.

use std::path::{Path, PathBuf};

use eqim::picture::folder::{Entry, Folder};
use eqim::picture::{self, Side};
use eqim::{Error, Result};
use image::RgbImage;
use ndarray::{Array3, s};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::network::Network;
use crate::resize::Protocol;

/// Random square crops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Crops {
    /// Number of crops.
    pub count: usize,
    /// Height and width of a crop in pixels. Pictures are scaled to this height.
    pub size: usize,
    /// Random seed.
    pub seed: u64,
}

/// The usable pictures of a folder.
#[derive(Clone, Debug)]
pub struct Pictures {
    /// Pictures by class. A folder without sub-folders is one class.
    classes: Vec<Vec<File>>,
    /// Why each of the other pictures is skipped. The text begins with its path.
    pub skipped: Vec<String>,
}

/// A picture.
#[derive(Clone, Debug)]
struct File {
    path: PathBuf,
    width: usize,
    height: usize,
}

/// A part of a picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The file.
    pub path: PathBuf,
    /// The part.
    pub part: Part,
}

/// Which part of a picture is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// A square of the whole height, at a place drawn with this seed, after scaling to this height.
    Random(u64, usize),
    /// A square of this size at this column, of a picture of the same height.
    At(usize, usize),
}

impl Pictures {
    /// Finds the pictures of a folder. A picture that cannot be decoded or is lower than `height` is skipped.
    ///
    /// # Errors
    /// Those of [`Folder::open`].
    pub fn open(folder: &Path, height: usize) -> Result<Self> {
        let look = |path: &Path, bytes: &[u8]| {
            let size = picture::decode(path, bytes)?.dimensions();
            match size.1 as usize >= height && size.0 as usize >= 1 {
                true => Ok(size),
                false => {
                    let problem = format!("is {}×{} pixels, expected a height of at least {height}", size.0, size.1);
                    Err(Error::input(path.display(), problem))
                }
            }
        };
        let found = Folder::open(folder, look)?;
        let mut classes = vec![vec![]; found.classes.len() + 1];
        for Entry { path, class, content: (width, height) } in found.pictures {
            let file = File { path, width: width as usize, height: height as usize };
            classes[class.map_or(0, |class| class + 1)].push(file);
        }
        classes.retain(|class| !class.is_empty());
        Ok(Self { classes, skipped: found.skipped })
    }

    /// Number of pictures.
    pub fn len(&self) -> usize {
        self.classes.iter().map(Vec::len).sum()
    }

    /// Whether there are no pictures.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All pictures, sorted by class and path.
    fn all(&self) -> impl Iterator<Item = &File> {
        self.classes.iter().flatten()
    }

    /// All pictures as they are. They have the same size.
    ///
    /// # Errors
    /// [`Error::input`] naming two pictures of different sizes.
    pub fn whole(&self) -> Result<Vec<View>> {
        let mut first = None;
        let view = |file: &File| {
            let expected: &File = first.get_or_insert_with(|| file.clone());
            if (expected.width, expected.height) != (file.width, file.height) {
                let size = |file: &File| format!("{}×{} pixels", file.width, file.height);
                let problem = format!(
                    "is {}, but {} is {}: whole images have the same size; compare square crops instead",
                    size(file),
                    expected.path.display(),
                    size(expected)
                );
                return Err(Error::input(file.path.display(), problem).with_field("crops"));
            }
            Ok(View { path: file.path.clone(), part: Part::Whole })
        };
        self.all().map(view).collect()
    }

    /// Random crops, in equal shares of the classes and of the pictures of a class.
    pub fn crops(&self, crops: Crops) -> Vec<View> {
        let view = |index: usize| {
            let class = &self.classes[index % self.classes.len()];
            let path = class[index / self.classes.len() % class.len()].path.clone();
            View { path, part: Part::Random(crops.seed.wrapping_add(index as u64), crops.size) }
        };
        (0..crops.count).map(view).collect()
    }

    /// Number of pictures that have one square only, because they are not wider than high.
    pub fn squares(&self) -> usize {
        self.all().filter(|file| file.width <= file.height).count()
    }

    /// The square of every picture whose first column is `column`. Pictures that end before it are left out.
    pub fn at(&self, column: usize) -> Vec<View> {
        let reach = self.all().filter(|file| column + file.height <= file.width);
        reach.map(|file| View { path: file.path.clone(), part: Part::At(column, file.height) }).collect()
    }

    /// Width of the widest picture, and the height of the pictures.
    ///
    /// # Errors
    /// [`Error::input`] naming a picture of another height.
    pub fn size(&self) -> Result<(usize, usize)> {
        let (mut widest, mut expected) = (0, None);
        for File { path, width, height } in self.all() {
            widest = widest.max(*width);
            let expected = *expected.get_or_insert(*height);
            if *height != expected {
                let problem = format!("is {height} pixels high, but others are {expected}");
                return Err(Error::input(path.display(), problem));
            }
        }
        Ok((widest, expected.unwrap_or_default()))
    }
}

// Images that are prepared at a time.
const BATCH: usize = 32;

/// Prepares views for a network, in batches: decoded, cropped, and resized if the network takes one size only.
pub fn batches<'a>(
    views: &'a [View],
    network: &dyn Network,
    protocol: Protocol,
) -> impl Iterator<Item = Result<Vec<Array3<f32>>>> + use<'a> {
    let size = network.size();
    views.chunks(BATCH).map(move |views| {
        let prepare = |view: &View| -> Result<Array3<f32>> {
            let image = view.read()?;
            Ok(match size {
                Some(size) if size != (image.dim().1, image.dim().2) => protocol.resize(image.view(), size),
                _ => image,
            })
        };
        views.par_iter().map(prepare).collect()
    })
}

impl View {
    /// The pixels, `[3, height, width]`, from 0 to 255.
    ///
    /// # Errors
    /// [`Error::input`] if the file cannot be read.
    pub fn read(&self) -> Result<Array3<f32>> {
        let image = picture::load(&self.path)?;
        match self.part {
            Part::Whole => Ok(pixels(&image)),
            Part::Random(seed, size) => {
                let image = scaled(&self.path, image, size)?;
                let mut random = ChaCha8Rng::seed_from_u64(seed);
                let left = random.random_range(0..=image.dim().2.saturating_sub(size));
                Ok(image.slice(s![.., .., left..(left + size).min(image.dim().2)]).to_owned())
            }
            Part::At(column, size) => Ok(pixels(&image).slice(s![.., .., column..column + size]).to_owned()),
        }
    }
}

/// The picture scaled to `height`, rounded to whole levels as in a file.
fn scaled(path: &Path, image: RgbImage, height: usize) -> Result<Array3<f32>> {
    if image.height() as usize == height {
        return Ok(pixels(&image));
    }
    let scaled = picture::scale(path, image, height, 1, Side::Right)?;
    Ok(scaled.pixels.mapv(|value| f32::from(picture::to_byte(value))))
}

fn pixels(image: &RgbImage) -> Array3<f32> {
    let (width, height) = image.dimensions();
    let at = |(channel, y, x): (usize, usize, usize)| f32::from(image.get_pixel(x as u32, y as u32)[channel]);
    Array3::from_shape_fn((3, height as usize, width as usize), at)
}
