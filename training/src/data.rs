//! Batches of photographs: their order, decoding ahead of time, and crops.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use eqim::{Error, Result, ResultExt};
use image::RgbImage;
use image::imageops::{self, FilterType};
use ndarray::{Array3, Array4, Axis};
use rand::Rng;
use rand::seq::SliceRandom;
use rayon::prelude::*;

use crate::photos::Photos;
use crate::random::{Purpose, randomness};

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

/// The order of photographs in batches. Successive batches run through epochs, and each epoch is a permutation of all
/// photographs.
#[derive(Clone, Debug)]
pub struct Order {
    seed: u64,
    count: usize,
    /// The last epoch that was needed, and its permutation.
    epoch: Option<(usize, Vec<usize>)>,
}

impl Order {
    /// The order of `count` photographs.
    pub fn new(seed: u64, count: usize) -> Self {
        Self { seed, count, epoch: None }
    }

    /// Indices of the photographs in the batch of `step`, which has `size` photographs.
    pub fn batch(&mut self, size: usize, step: usize) -> Vec<usize> {
        (step * size..(step + 1) * size).map(|place| self.at(place)).collect()
    }

    fn at(&mut self, place: usize) -> usize {
        let Self { seed, count, epoch } = self;
        let number = place / *count;
        if epoch.as_ref().is_none_or(|(known, _)| *known != number) {
            let mut permutation: Vec<usize> = (0..*count).collect();
            permutation.shuffle(&mut randomness(*seed, Purpose::Order, number));
            *epoch = Some((number, permutation));
        }
        epoch.as_ref().map_or(0, |(_, permutation)| permutation[place % *count])
    }
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

/// Prepares batches a few steps ahead, on one thread per core.
#[derive(Debug)]
pub struct Ahead {
    batches: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
}

impl Ahead {
    /// Starts preparing the batches of `steps`.
    ///
    /// # Errors
    /// [`Error::run`] if the threads cannot be started.
    pub fn start(photos: Photos, crops: Crops, batches: Batches, steps: Range<usize>) -> Result<Self> {
        let (sender, receiver) = sync_channel(AHEAD);
        let pool = rayon::ThreadPoolBuilder::new().thread_name(|index| format!("decode-{index}"));
        let pool = pool.build().or_run("decoding")?;
        let work = move || {
            let mut order = Order::new(batches.seed, photos.len());
            let decoded = Decoded::new(photos);
            for step in steps {
                let chosen = order.batch(batches.size, step);
                let made = pool.install(|| make(&decoded, crops, &batches, step, &chosen));
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
    /// [`Error::input`] or [`Error::run`] if a photograph can no longer be read, or if too many cannot be used; [`Error::run`]
    /// if all steps are done.
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

/// Makes the batch of `step`, which has the photographs `chosen`.
fn make(decoded: &Decoded, crops: Crops, batches: &Batches, step: usize, chosen: &[usize]) -> Result<Batch> {
    let Batches { size, seed, rows } = batches;
    let crop = |row: usize| {
        let sample = step * size + row;
        let (class, picture) = decoded.usable(chosen[row], *seed, sample)?;
        Ok((crops.draw(&picture, &mut randomness(*seed, Purpose::Crop, sample)), class))
    };
    let made: Vec<(Array3<f32>, usize)> = rows.clone().into_par_iter().map(crop).collect::<Result<_>>()?;
    let mut images = Array4::zeros((rows.len(), 3, crops.height, crops.width));
    for ((crop, _), mut image) in made.iter().zip(images.axis_iter_mut(Axis(0))) {
        image.assign(crop);
    }
    Ok(Batch { images, labels: made.into_iter().map(|(_, class)| class).collect() })
}

// Photographs that are drawn in the place of one that cannot be used.
const DRAWS: usize = 100;

/// Photographs, with a cache of decoded pictures, up to `KEPT` bytes.
#[derive(Debug)]
struct Decoded {
    photos: Photos,
    cache: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    /// By the index of the photograph.
    pictures: HashMap<usize, Arc<RgbImage>>,
    bytes: usize,
}

impl Decoded {
    fn new(photos: Photos) -> Self {
        Self { photos, cache: Mutex::default() }
    }

    /// The class and the pixels of the photograph at `index`, or of one that is drawn in its place for this sample.
    fn usable(&self, index: usize, seed: u64, sample: usize) -> Result<(usize, Arc<RgbImage>)> {
        let mut random = randomness(seed, Purpose::Replacement, sample);
        let mut index = index;
        for _ in 0..=DRAWS {
            let photo = &self.photos.photos[index];
            if let Some(picture) = self.picture(index)? {
                return Ok((photo.class, picture));
            }
            index = random.random_range(0..self.photos.len());
        }
        let problem = format!("of {DRAWS} that were drawn at random, none can be used: look at the messages above");
        Err(Error::input("photographs", problem))
    }

    /// The pixels of a photograph; `None` if it cannot be used.
    fn picture(&self, index: usize) -> Result<Option<Arc<RgbImage>>> {
        let cache = || self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(picture) = cache().pictures.get(&index) {
            return Ok(Some(picture.clone()));
        }
        let Some(picture) = self.photos.load(&self.photos.photos[index])? else { return Ok(None) };
        let picture = Arc::new(picture);
        let mut cache = cache();
        if cache.bytes + picture.len() <= KEPT && !cache.pictures.contains_key(&index) {
            cache.bytes += picture.len();
            cache.pictures.insert(index, picture.clone());
        }
        Ok(Some(picture))
    }
}

#[cfg(test)]
mod tests {
    use image::Rgb;
    use ndarray::s;

    use super::*;
    use crate::photos::tests::photos;

    const CROPS: Crops = Crops { height: 32, width: 32, largest_scale: 1.5, flip: true };

    #[test]
    fn an_epoch_has_every_photograph_once() {
        for seed in 0..20 {
            let mut seen: Vec<usize> = (0..5).flat_map(|step| Order::new(seed, 10).batch(4, step)).collect();
            let mut first = seen.split_off(10);
            std::mem::swap(&mut first, &mut seen);
            for epoch in [&mut first, &mut seen] {
                epoch.sort_unstable();
                assert_eq!(*epoch, (0..10).collect::<Vec<_>>());
            }
        }
        let mut order = Order::new(1, 10);
        let first = order.batch(10, 0);
        assert_ne!(first, Order::new(2, 10).batch(10, 0));
        assert_ne!(first, order.batch(10, 1));
        assert_eq!(first, order.batch(10, 0));
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
}
