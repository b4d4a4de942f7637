//! Training photographs: finding them in folders, decoding them ahead of time, and cutting crops.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use eqim::digest::{Hash, sha256};
use eqim::picture::folder::{Entry, Folder};
use eqim::{Error, Result, ResultExt, picture};
use image::RgbImage;
use image::imageops::{self, FilterType};
use ndarray::{Array3, Array4, Axis};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Purpose of random numbers. Each purpose has its own stream, so that its numbers do not depend on how many numbers
/// are drawn for other purposes.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// Initial weights.
    Initial,
    /// Choice of the validation photographs.
    Split,
    /// Order of the photographs in an epoch.
    Order,
    /// Crops.
    Crop,
    /// Samples of the tokenizer's posterior.
    Posterior,
    /// Dropped labels.
    Labels,
    /// Noise and times of flow matching.
    Flow,
    /// Dropout.
    Dropout,
    /// Positions of the first token.
    Shift,
}

/// The random number generator of a sample, counted over all steps, or of a step. It depends on the arguments only, so that a
/// resumed run needs no saved state, and every rank draws the numbers of its own samples.
pub fn randomness(seed: u64, purpose: Purpose, number: usize) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(((purpose as u64) << 48) | number as u64);
    random
}

/// A usable photograph.
#[derive(Clone, Debug)]
pub struct Photo {
    /// Path of the file.
    pub path: PathBuf,
    /// Index of the class in [`Photos::classes`].
    pub class: usize,
    /// SHA-256 of the file.
    pub hash: String,
}

/// The photographs of a folder.
#[derive(Clone, Debug)]
pub struct Photos {
    /// Names of the subfolders, sorted; a single empty name if the photographs lie in the folder itself.
    pub classes: Vec<String>,
    /// The photographs, sorted by class and path.
    pub photos: Vec<Photo>,
    /// Why each of the pictures that cannot be used is skipped. The text begins with its path.
    pub skipped: Vec<String>,
}

impl Photos {
    /// Decodes all PNGs and JPEGs in `folder`, whose subfolders are the classes. A picture has to be at least `height`
    /// pixels high and, after scaling to that height, at least `width` pixels wide. Other pictures are skipped with a
    /// reason. Hidden files and files of other types are ignored.
    ///
    /// # Errors
    /// Those of [`Folder::open`]; [`Error::input`] if a picture lies next to the subfolders.
    pub fn open(folder: &Path, height: usize, width: usize) -> Result<Self> {
        let look = |path: &Path, bytes: &[u8]| {
            check(path, picture::decode(path, bytes)?.dimensions(), (height, width))?;
            Ok(sha256(bytes))
        };
        let Folder { classes, pictures, skipped } = Folder::open(folder, look)?;
        let loose = pictures.iter().find(|picture| picture.class.is_none());
        if let Some(Entry { path, .. }) = loose.filter(|_| !classes.is_empty()) {
            let problem = "lies next to the folders of classes: put it into one of them, or remove the folders";
            return Err(Error::input(path.display(), problem));
        }
        let classes = if classes.is_empty() { vec![String::new()] } else { classes };
        let photo = |Entry { path, class, content: hash }| Photo { path, class: class.unwrap_or(0), hash };
        Ok(Self { classes, photos: pictures.into_iter().map(photo).collect(), skipped })
    }

    /// Holds out `count` photographs, chosen at random from `seed`. Returns the photographs to train on and the
    /// held-out photographs.
    ///
    /// # Errors
    /// [`Error::input`] if no photograph would be left to train on.
    pub fn split(self, count: usize, seed: u64) -> Result<(Self, Self)> {
        if count >= self.photos.len() {
            let problem =
                format!("holds out {count} of {} photographs, so none is left for training", self.photos.len());
            return Err(Error::input("validation", problem));
        }
        let mut drawn: Vec<usize> = (0..self.photos.len()).collect();
        drawn.shuffle(&mut randomness(seed, Purpose::Split, 0));
        let part = |held_out: bool| {
            let chosen = |(index, _): &(usize, &Photo)| drawn[..count].contains(index) == held_out;
            self.photos.iter().enumerate().filter(chosen).map(|(_, photo)| photo.clone()).collect()
        };
        let with = |photos| Self { classes: self.classes.clone(), photos, skipped: vec![] };
        Ok((with(part(false)), with(part(true))))
    }

    /// Hash of the names, classes and contents of the photographs, in order.
    pub fn fingerprint(&self) -> String {
        let mut hash = Hash::default();
        for Photo { path, class, hash: contents } in &self.photos {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            hash.add(format!("{}/{name} {contents}\n", self.classes[*class]));
        }
        hash.hex()
    }
}

/// Checks that a picture of this width and height is large enough.
fn check(path: &Path, size: (u32, u32), (height, width): (usize, usize)) -> Result<()> {
    let (found_width, found_height) = size;
    let scaled = (f64::from(found_width) * height as f64 / f64::from(found_height)).round() as usize;
    if (found_height as usize) < height || scaled < width {
        let problem = format!(
            "is {found_width}×{found_height} pixels, expected a height of at least {height} and, scaled to that, a \
             width of at least {width}"
        );
        return Err(Error::input(path.display(), problem));
    }
    Ok(())
}

/// Settings of random crops.
#[derive(Clone, Copy, Debug)]
pub struct Crops {
    /// Height of a crop in pixels.
    pub height: usize,
    /// Width of a crop in pixels.
    pub width: usize,
    /// Before cropping, pictures are scaled to between 1 and this many times `height`, but not above their own height.
    pub largest_scale: f64,
    /// Whether crops are mirrored horizontally with a probability of 0.5.
    pub flip: bool,
}

impl Crops {
    /// Cuts a random crop of a picture, `[3, height, width]` in -1..1.
    pub fn draw(&self, picture: &RgbImage, random: &mut impl Rng) -> Array3<f32> {
        let height = self.window_height(picture, random);
        let width = self.width as f64 * height / self.height as f64;
        let width = (width.round() as u32).clamp(1, picture.width());
        let left = random.random_range(0..=picture.width() - width);
        self.cut(picture, (left, width), height as u32, self.width, random)
    }

    /// Cuts a random view that covers nearly the whole width of a picture, `[3, height, any width]` in -1..1. The width
    /// is a multiple of `multiple`, and the view starts within the first `multiple` pixels of the scaled picture.
    pub fn draw_wide(&self, picture: &RgbImage, multiple: usize, random: &mut impl Rng) -> Array3<f32> {
        let height = self.window_height(picture, random);
        let scale = height / self.height as f64;
        let most = (f64::from(picture.width()) / scale / multiple as f64).floor() as usize * multiple;
        let spare = f64::from(picture.width()) - most as f64 * scale;
        let width = if spare < multiple as f64 * scale / 2.0 { most - multiple } else { most }.max(self.width);
        let taken = ((width as f64 * scale).round() as u32).min(picture.width());
        let left = random.random_range(0..=(picture.width() - taken).min((multiple as f64 * scale) as u32));
        self.cut(picture, (left, taken), height as u32, width, random)
    }

    /// Random height of the window to cut, in pixels of the picture.
    fn window_height(&self, picture: &RgbImage, random: &mut impl Rng) -> f64 {
        let whole = f64::from(picture.height());
        let largest = self.largest_scale.min(whole / self.height as f64).max(1.0);
        (whole / largest.powf(random.random_range(0.0..=1.0))).round()
    }

    fn cut(
        &self,
        picture: &RgbImage,
        (left, taken): (u32, u32),
        height: u32,
        width: usize,
        random: &mut impl Rng,
    ) -> Array3<f32> {
        let top = random.random_range(0..=picture.height() - height);
        let mirrored = self.flip && random.random_bool(0.5);
        let window = imageops::crop_imm(picture, left, top, taken, height).to_image();
        let crop = imageops::resize(&window, width as u32, self.height as u32, FilterType::Lanczos3);
        Array3::from_shape_fn((3, self.height, width), |(channel, y, x)| {
            let x = if mirrored { width - 1 - x } else { x };
            f32::from(crop.get_pixel(x as u32, y as u32)[channel]) / 127.5 - 1.0
        })
    }
}

/// A batch of crops.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Images, `[batch, 3, height, width]` in -1..1.
    pub images: Array4<f32>,
    /// Class indices of the photographs, `[batch]`.
    pub labels: Vec<usize>,
}

/// Indices of the photographs in the batch of `step`, out of `count` photographs. Successive batches run through
/// epochs, and each epoch is a permutation of all photographs.
pub fn order(seed: u64, count: usize, batch: usize, step: usize) -> Vec<usize> {
    let mut epoch = (usize::MAX, vec![]);
    let mut at = |place: usize| {
        if epoch.0 != place / count {
            let mut permutation: Vec<usize> = (0..count).collect();
            permutation.shuffle(&mut randomness(seed, Purpose::Order, place / count));
            epoch = (place / count, permutation);
        }
        epoch.1[place % count]
    };
    (step * batch..(step + 1) * batch).map(&mut at).collect()
}

// Largest total size of the cached pictures, in bytes.
const KEPT: usize = 512 << 20;
// Largest number of batches in the queue.
const AHEAD: usize = 2;

/// Settings of the batches of a training.
#[derive(Clone, Debug)]
pub struct Batches {
    /// Crops per batch.
    pub size: usize,
    /// Random seed.
    pub seed: u64,
    /// The crops of a batch that are made.
    pub rows: Range<usize>,
}

/// Prepares batches on a separate thread, a few steps ahead.
#[derive(Debug)]
pub struct Ahead {
    batches: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
}

impl Ahead {
    /// Starts preparing the batches of `steps`.
    ///
    /// # Errors
    /// [`Error::run`] if the thread cannot be started.
    pub fn start(photos: Photos, crops: Crops, batches: Batches, steps: Range<usize>) -> Result<Self> {
        let (sender, receiver) = sync_channel(AHEAD);
        let work = move || {
            let mut decoded = Decoded::default();
            for step in steps {
                let made = make(&photos, &mut decoded, crops, &batches, step);
                let failed = made.is_err();
                if sender.send(made).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("decode-ahead".into()).spawn(work);
        let thread = thread.or_run("decoding")?;
        Ok(Self { batches: Some(receiver), thread: Some(thread) })
    }

    /// The batch of the next step.
    ///
    /// # Errors
    /// [`Error::input`] or [`Error::run`] if a photograph can no longer be read; [`Error::run`] if all steps are done.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let batch = self.batches.as_ref().and_then(|batches| batches.recv().ok());
        batch.unwrap_or_else(|| {
            let has_panicked = self.thread.take().is_some_and(|thread| thread.join().is_err());
            Err(Error::run("decoding", if has_panicked { "its thread has panicked" } else { "has no more batches" }))
        })
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        // The thread ends because it can no longer send.
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn make(photos: &Photos, decoded: &mut Decoded, crops: Crops, batches: &Batches, step: usize) -> Result<Batch> {
    let Batches { size, seed, rows } = batches;
    let mut images = Array4::zeros((rows.len(), 3, crops.height, crops.width));
    let mut labels = vec![];
    let order = order(*seed, photos.photos.len(), *size, step);
    for (row, mut image) in rows.clone().zip(images.axis_iter_mut(Axis(0))) {
        let photo = &photos.photos[order[row]];
        let mut random = randomness(*seed, Purpose::Crop, step * size + row);
        image.assign(&decoded.with(&photo.path, |picture| crops.draw(picture, &mut random))?);
        labels.push(photo.class);
    }
    Ok(Batch { images, labels })
}

/// Cache of decoded pictures, up to `KEPT` bytes.
#[derive(Debug, Default)]
struct Decoded {
    pictures: HashMap<PathBuf, RgbImage>,
    bytes: usize,
}

impl Decoded {
    fn with<R>(&mut self, path: &Path, work: impl FnOnce(&RgbImage) -> R) -> Result<R> {
        if let Some(picture) = self.pictures.get(path) {
            return Ok(work(picture));
        }
        let picture = picture::load(path)?;
        let result = work(&picture);
        if self.bytes + picture.len() <= KEPT {
            self.bytes += picture.len();
            self.pictures.insert(path.to_path_buf(), picture);
        }
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use image::Rgb;
    use ndarray::s;

    use super::*;

    /// A folder with one class of pictures that differ in their red channel.
    fn photos(count: u8) -> (tempfile::TempDir, Photos) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("class")).unwrap();
        for index in 0..count {
            let picture = RgbImage::from_fn(90, 50, |x, y| Rgb([20 * index, (2 * x) as u8, (5 * y) as u8]));
            picture.save(folder.path().join(format!("class/{index}.png"))).unwrap();
        }
        let photos = Photos::open(folder.path(), 32, 32).unwrap();
        (folder, photos)
    }

    const CROPS: Crops = Crops { height: 32, width: 32, largest_scale: 1.5, flip: true };

    #[test]
    fn an_epoch_has_every_photograph_once() {
        for seed in 0..20 {
            let mut seen: Vec<usize> = (0..5).flat_map(|step| order(seed, 10, 4, step)).collect();
            let mut first = seen.split_off(10);
            std::mem::swap(&mut first, &mut seen);
            for epoch in [&mut first, &mut seen] {
                epoch.sort_unstable();
                assert_eq!(*epoch, (0..10).collect::<Vec<_>>());
            }
        }
        assert_ne!(order(1, 10, 10, 0), order(2, 10, 10, 0));
        assert_ne!(order(1, 10, 10, 0), order(1, 10, 10, 1));
    }

    #[test]
    fn a_batch_depends_on_its_step_alone() {
        let (_folder, photos) = photos(5);
        let start =
            |rows, first| Ahead::start(photos.clone(), CROPS, Batches { size: 3, seed: 7, rows }, first..6).unwrap();
        let mut whole = start(0..3, 0);
        let batches: Vec<Batch> = (0..6).map(|_| whole.next_batch().unwrap()).collect();
        assert!(whole.next_batch().is_err());
        let mut later = start(0..3, 4);
        assert_eq!(later.next_batch().unwrap().images, batches[4].images);
        // A part of a batch is that part of the whole.
        let part = start(1..3, 4).next_batch().unwrap();
        assert_eq!(part.images, batches[4].images.slice(s![1.., .., .., ..]));
        assert_eq!(part.labels, batches[4].labels[1..]);
        assert_ne!(batches[4].images, batches[5].images);
        // Dropping it before the last batch does not hang.
        drop(start(0..3, 0));
    }

    #[test]
    fn a_photograph_that_is_gone_is_named() {
        let (folder, photos) = photos(1);
        std::fs::remove_file(folder.path().join("class/0.png")).unwrap();
        let batches = Batches { size: 1, seed: 1, rows: 0..1 };
        let error = Ahead::start(photos, CROPS, batches, 0..1).unwrap().next_batch().unwrap_err();
        assert!(error.is_input() && error.to_string().contains("0.png"), "{error}");
    }

    #[test]
    fn crops_have_their_size_and_range() {
        let picture = RgbImage::from_fn(75, 64, |x, y| if (x + y) % 2 == 0 { Rgb([0; 3]) } else { Rgb([255; 3]) });
        for step in 0..50 {
            let random = &mut randomness(1, Purpose::Crop, step);
            let crop = CROPS.draw(&picture, random);
            assert_eq!(crop.dim(), (3, 32, 32));
            let view = CROPS.draw_wide(&picture, 4, random);
            assert!(view.dim().2.is_multiple_of(4) && (32..=60).contains(&view.dim().2), "{:?}", view.dim());
            assert!(crop.iter().chain(&view).all(|value| (-1.0..=1.0).contains(value)));
        }
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
