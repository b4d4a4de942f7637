//! Latents of photographs, computed once and cached on disk.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use eqim::checkpoint::tensors::{self, TensorFile};
use eqim::config::TokenizerConfig;
use eqim::digest::Hash;
use eqim::engine::candle;
use eqim::model::tokenizer;
use eqim::ops::eager::Eager;
use eqim::weights::Weights;
use eqim::{Error, Result, ResultExt, files, picture};
use eqim_cli::Progress;
use ndarray::Axis;
use rand::Rng;

use crate::data::{Crops, Photo, Photos, Purpose, randomness};

/// A trained tokenizer that encodes the photographs.
pub struct Encoder {
    /// Sizes of the tokenizer.
    pub config: TokenizerConfig,
    /// Weights of the tokenizer.
    pub weights: Weights,
    /// Hash of the file of the weights.
    pub hash: String,
}

/// The latents of several views of each photograph. A view is nearly as wide as the photograph.
#[derive(Debug)]
pub struct Latents {
    views: Vec<PhotoViews>,
}

#[derive(Debug)]
struct PhotoViews {
    file: PathBuf,
    class: usize,
    /// Number of tokens of each view.
    lengths: Vec<usize>,
}

impl Latents {
    /// Encodes `views` views of every photograph into `folder`, or reuses the files that an earlier run wrote there.
    ///
    /// # Errors
    /// [`Error::input`] if a photograph can no longer be read; [`Error::run`] if the folder cannot be written.
    pub fn open(
        folder: &Path,
        encoder: &Encoder,
        photos: &Photos,
        crops: Crops,
        views: usize,
        seed: u64,
    ) -> Result<Self> {
        std::fs::create_dir_all(folder).or_run(folder.display())?;
        let mut progress = Progress::new("encoded", photos.photos.len(), "photographs");
        let mut all = vec![];
        for (index, photo) in photos.photos.iter().enumerate() {
            let file = folder.join(format!("{}.safetensors", key(encoder, photo, crops, views, seed)?));
            if !file.exists() {
                encode(&file, encoder, photo, crops, views, seed)?;
            }
            let stored = TensorFile::open(&file)?;
            let tensors = stored.tensors();
            let length = |view: usize| {
                let info = tensors.get(&name(view));
                let info = info.ok_or_else(|| Error::input(file.display(), format!("has no {}", name(view))))?;
                Ok(info.shape[0])
            };
            let lengths = (0..views).map(length).collect::<Result<_>>()?;
            all.push(PhotoViews { file: file.clone(), class: photo.class, lengths });
            progress.at(index + 1);
        }
        Ok(Self { views: all })
    }

    /// Standard deviation of all latents if they are sampled from posteriors with the standard deviation `posterior`.
    ///
    /// # Errors
    /// [`Error::input`] if a file cannot be read.
    pub fn deviation(&self, posterior: f64) -> Result<f64> {
        let (mut count, mut sum, mut squares) = (0.0, 0.0, 0.0);
        for photo in &self.views {
            let mut file = TensorFile::open(&photo.file)?;
            for view in 0..photo.lengths.len() {
                let latents = file.read(&name(view))?;
                count += latents.elem_count() as f64;
                sum += f64::from(latents.sum_all()?.to_scalar::<f32>()?);
                squares += f64::from(latents.sqr()?.sum_all()?.to_scalar::<f32>()?);
            }
        }
        let mean = sum / count;
        Ok((squares / count - mean * mean + posterior * posterior).sqrt())
    }

    /// Number of photographs.
    pub fn len(&self) -> usize {
        self.views.len()
    }

    /// Whether there are no photographs.
    pub fn is_empty(&self) -> bool {
        self.views.is_empty()
    }

    /// Index of the class of a photograph.
    pub fn class(&self, photo: usize) -> usize {
        self.views[photo].class
    }

    /// Draws `tokens` adjacent tokens, `[tokens, E]`, from a random view of a photograph.
    ///
    /// # Errors
    /// [`Error::input`] if the file can no longer be read.
    pub fn draw(&self, photo: usize, tokens: usize, random: &mut impl Rng) -> Result<Tensor> {
        let PhotoViews { file, lengths, .. } = &self.views[photo];
        let view = random.random_range(0..lengths.len());
        let start = random.random_range(0..=lengths[view] - tokens);
        Ok(TensorFile::open(file)?.read(&name(view))?.narrow(0, start, tokens)?)
    }
}

fn name(view: usize) -> String {
    format!("view.{view}")
}

/// Name of the cache file: a hash of everything that the latents depend on.
fn key(encoder: &Encoder, photo: &Photo, crops: Crops, views: usize, seed: u64) -> Result<String> {
    let mut hash = Hash::default();
    hash.add(format!("{} {crops:?} {views} {seed} ", encoder.hash));
    hash.add(files::read(&photo.path)?);
    Ok(hash.hex()[..32].to_string())
}

fn encode(file: &Path, encoder: &Encoder, photo: &Photo, crops: Crops, views: usize, seed: u64) -> Result<()> {
    let picture = picture::load(&photo.path)?;
    let mut random = randomness(seed, Purpose::Crop, 0);
    let mut stored = vec![];
    for view in 0..views {
        let image = crops.draw_wide(&picture, encoder.config.token_width(), &mut random);
        let image = candle::to_tensor(image.view().insert_axis(Axis(0)))?;
        let latent = tokenizer::encode(&mut Eager::new(&encoder.weights), &encoder.config, &image)?;
        stored.push((name(view), latent.squeeze(0)?));
    }
    let stored: Vec<(&str, Tensor)> = stored.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
    tensors::write(file, &stored, HashMap::new())
}
