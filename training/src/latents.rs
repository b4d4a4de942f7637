//! Latents of photographs, computed once and cached on disk.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use eqim::checkpoint::tensors::{self, TensorFile};
use eqim::config::TokenizerConfig;
use eqim::digest::Hash;
use eqim::engine::candle;
use eqim::model::tokenizer;
use eqim::ops::eager::Eager;
use eqim::weights::Weights;
use eqim::{Error, Result, ResultExt, picture};
use eqim_cli::Progress;
use ndarray::Axis;
use rand::Rng;

use crate::data::{Crops, Photo, Photos, Purpose, randomness};
use crate::ranks::Ranks;

/// A trained tokenizer that encodes the photographs, on the device of its weights.
#[derive(Clone)]
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
    /// Width of a token.
    embed: usize,
}

#[derive(Debug)]
struct PhotoViews {
    file: PathBuf,
    class: usize,
    /// Number of tokens of each view.
    lengths: Vec<usize>,
    sums: Sums,
}

/// Sums over latents.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    count: f64,
    values: f64,
    squares: f64,
}

impl Latents {
    /// Encodes `views` views of every photograph into `folder`, or reuses the files that an earlier run wrote there.
    /// Files that do not hold what they should are written again. Each of the ranks encodes its share.
    ///
    /// # Errors
    /// [`Error::input`] or [`Error::run`] if a photograph can no longer be read; [`Error::input`] if the tokenizer gives
    /// latents that are not finite; [`Error::run`] if the folder cannot be written, or if a rank does not answer.
    pub fn open(
        folder: &Path,
        encoder: &Encoder,
        photos: &Photos,
        crops: Crops,
        views: usize,
        seed: u64,
        ranks: &Ranks,
    ) -> Result<Self> {
        std::fs::create_dir_all(folder).or_run(folder.display())?;
        let (embed, tokens) = (encoder.config.embed, crops.width / encoder.config.token_width());
        let open = |photo: &Photo| {
            let file = folder.join(format!("{}.safetensors", key(encoder, photo, crops, views, seed)));
            let read = || PhotoViews::read(&file, photo.class, views, (tokens, embed));
            if file.exists() {
                match read() {
                    Ok(kept) => return Ok(kept),
                    Err(error) => {
                        eqim_cli::note(format_args!("{error}; {} is encoded again", photo.path.display()));
                    }
                }
            }
            encode(&file, encoder, photo, crops, views, seed)?;
            read()
        };
        let photos = &photos.photos;
        // Each rank encodes its share, and then reads all.
        if ranks.size() > 1 {
            photos[ranks.share(photos.len())].iter().try_for_each(|photo| open(photo).map(drop))?;
            ranks.meet()?;
        }
        let mut progress = Progress::new("encoded", photos.len(), "photographs");
        let opened = photos.iter().enumerate().map(|(index, photo)| {
            let opened = open(photo);
            progress.at(index + 1);
            opened
        });
        Ok(Self { views: opened.collect::<Result<_>>()?, embed })
    }

    /// Standard deviation of all latents if they are sampled from posteriors with the standard deviation `posterior`.
    pub fn deviation(&self, posterior: f64) -> f64 {
        let mut all = Sums::default();
        for PhotoViews { sums, .. } in &self.views {
            all.count += sums.count;
            all.values += sums.values;
            all.squares += sums.squares;
        }
        let mean = all.values / all.count;
        (all.squares / all.count - mean * mean + posterior * posterior).sqrt()
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
        let latents = view_of(&mut TensorFile::open(file)?, view, (lengths[view], self.embed))?;
        let start = random.random_range(0..=lengths[view] - tokens);
        Ok(latents.narrow(0, start, tokens)?)
    }
}

impl PhotoViews {
    /// Reads the latents in a file and checks them: all values are finite and those that were written, and every view
    /// has at least `tokens` tokens of width `embed`.
    fn read(path: &Path, class: usize, views: usize, least: (usize, usize)) -> Result<Self> {
        let bad = |problem: String| Error::input(path.display(), problem);
        let mut file = TensorFile::open(path)?;
        let (mut lengths, mut sums, mut hash) = (vec![], Sums::default(), Hash::default());
        for view in 0..views {
            let latents = view_of(&mut file, view, least)?;
            let [value, square] = [latents.sum_all()?, latents.sqr()?.sum_all()?];
            let (value, square) = (value.to_scalar::<f32>()?, square.to_scalar::<f32>()?);
            if !value.is_finite() || !square.is_finite() {
                return Err(bad(format!("tensor {} has a value that is not finite, or too large", name(view))));
            }
            sums.count += latents.elem_count() as f64;
            sums.values += f64::from(value);
            sums.squares += f64::from(square);
            lengths.push(latents.dim(0)?);
            hash.add_values(&latents.flatten_all()?.to_vec1::<f32>()?);
        }
        if file.text(HASH) != Some(&hash.hex()) {
            return Err(bad("its latents do not have their hash".into()));
        }
        Ok(Self { file: path.to_path_buf(), class, lengths, sums })
    }
}

/// Metadata key for the hash of all latents of a file.
const HASH: &str = "sha256";

/// Reads a view of at least `tokens` tokens of width `embed`, `[tokens, E]`.
fn view_of(file: &mut TensorFile, view: usize, (tokens, embed): (usize, usize)) -> Result<Tensor> {
    let latents = file.read(&name(view))?;
    let fits = latents.dtype() == DType::F32 && latents.dims2().is_ok_and(|(n, e)| n >= tokens && e == embed);
    if !fits {
        let (name, path, found) = (name(view), file.path().display(), (latents.dtype(), latents.dims()));
        let problem = format!("tensor {name} is {found:?}, expected F32 and at least [{tokens}, {embed}]");
        return Err(Error::input(path, problem));
    }
    Ok(latents)
}

fn name(view: usize) -> String {
    format!("view.{view}")
}

/// Name of the cache file: a hash of everything that the latents depend on.
fn key(encoder: &Encoder, photo: &Photo, crops: Crops, views: usize, seed: u64) -> String {
    let mut hash = Hash::default();
    hash.add(format!("{} {crops:?} {views} {seed} {}", encoder.hash, photo.hash));
    hash.hex()[..32].to_string()
}

fn encode(file: &Path, encoder: &Encoder, photo: &Photo, crops: Crops, views: usize, seed: u64) -> Result<()> {
    let device = encoder.weights.device();
    let picture = picture::load(&photo.path)?;
    let mut random = randomness(seed, Purpose::Crop, 0);
    let (mut stored, mut hash) = (vec![], Hash::default());
    for view in 0..views {
        let image = crops.draw_wide(&picture, encoder.config.token_width(), &mut random);
        let image = candle::to_tensor(image.view().insert_axis(Axis(0)))?.to_device(&device)?;
        let latent = tokenizer::encode(&mut Eager::new(&encoder.weights), &encoder.config, &image)?;
        let latent = latent.squeeze(0)?.to_device(&Device::Cpu)?;
        hash.add_values(&latent.flatten_all()?.to_vec1::<f32>()?);
        stored.push((name(view), latent));
    }
    let stored: Vec<(&str, Tensor)> = stored.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
    tensors::write(file, &stored, HashMap::from([(HASH.into(), hash.hex())]))
}
