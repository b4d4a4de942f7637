//! Latents of photographs, computed once and cached on disk in shards.

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
use eqim::{Error, Result, ResultExt};
use eqim_cli::Progress;
use ndarray::Axis;
use rand::Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::data::Crops;
use crate::photos::{Photo, Photos};
use crate::random::{Purpose, randomness};
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
    files: Vec<PathBuf>,
    /// The photographs that can be used.
    photos: Vec<PhotoViews>,
    sums: Sums,
}

/// The latents of a photograph.
#[derive(Debug)]
struct PhotoViews {
    /// Index of the file.
    file: usize,
    class: usize,
    /// First row of each view in the file, and the end of the last.
    rows: Vec<u32>,
}

/// Photographs whose latents are in one file.
const PHOTOS: usize = 32;

/// Sums over latents.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    count: f64,
    values: f64,
    squares: f64,
}

impl Latents {
    /// Encodes `views` views of every photograph into `folder`, or reuses the files that an earlier run wrote there.
    /// Files that do not hold what they should are written again. Photographs that cannot be used are left out. Each of the
    /// ranks encodes its share.
    ///
    /// # Errors
    /// [`Error::input`] or [`Error::run`] if a photograph can no longer be read; [`Error::input`] if the tokenizer gives
    /// latents that are not finite, or if no photograph can be used; [`Error::run`] if the folder cannot be written, or if a
    /// rank does not answer.
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
        let source = Source { encoder, photos, crops, views, seed };
        let open = |part: &[Photo]| {
            let file = folder.join(format!("{}.safetensors", source.key(part)));
            let read = || Shard::read(&file, part.len() * views, (tokens, embed));
            if file.exists() {
                match read() {
                    Ok(kept) => return Ok((file.clone(), kept)),
                    Err(error) => {
                        let many = part.len();
                        eqim_cli::note(format_args!("{error}; its {many} photographs are encoded again"));
                    }
                }
            }
            source.encode(&file, part)?;
            read().map(|shard| (file.clone(), shard))
        };
        let parts: Vec<&[Photo]> = photos.photos.chunks(PHOTOS).collect();
        // Each rank encodes its share, and then reads all.
        if ranks.size() > 1 {
            parts[ranks.share(parts.len())].iter().try_for_each(|part| open(part).map(drop))?;
            ranks.meet()?;
        }
        let mut progress = Progress::new("encoded", photos.len(), "photographs");
        let mut latents = Self { files: vec![], photos: vec![], sums: Sums::default() };
        for part in parts {
            let (file, shard) = open(part)?;
            latents.add(file, shard, part, views);
            progress.at(photos.len().min(latents.files.len() * PHOTOS));
        }
        match latents.photos.is_empty() && !photos.is_empty() {
            true => Err(Error::input("photographs", "none can be used: look at the messages above")),
            false => Ok(latents),
        }
    }

    fn add(&mut self, file: PathBuf, shard: Shard, part: &[Photo], views: usize) {
        let number = self.files.len();
        for (photo, rows) in part.iter().zip(shard.starts.windows(views + 1).step_by(views)) {
            // A photograph that could not be used has no rows.
            if rows[0] < rows[views] {
                self.photos.push(PhotoViews { file: number, class: photo.class, rows: rows.to_vec() });
            }
        }
        self.files.push(file);
        self.sums.count += shard.sums.count;
        self.sums.values += shard.sums.values;
        self.sums.squares += shard.sums.squares;
    }

    /// Standard deviation of all latents if they are sampled from posteriors with the standard deviation `posterior`.
    pub fn deviation(&self, posterior: f64) -> f64 {
        let all = self.sums;
        let mean = all.values / all.count;
        (all.squares / all.count - mean * mean + posterior * posterior).sqrt()
    }

    /// Number of photographs that can be used.
    pub fn len(&self) -> usize {
        self.photos.len()
    }

    /// Whether there are no photographs.
    pub fn is_empty(&self) -> bool {
        self.photos.is_empty()
    }

    /// Index of the class of a photograph.
    pub fn class(&self, photo: usize) -> usize {
        self.photos[photo].class
    }

    /// Draws `tokens` adjacent tokens, `[tokens, E]`, from a random view of a photograph.
    ///
    /// # Errors
    /// [`Error::input`] if the file can no longer be read.
    pub fn draw(&self, photo: usize, tokens: usize, random: &mut impl Rng) -> Result<Tensor> {
        let PhotoViews { file, rows, .. } = &self.photos[photo];
        let view = random.random_range(0..rows.len() - 1);
        let (first, end) = (rows[view] as usize, rows[view + 1] as usize);
        let start = first + random.random_range(0..=end - first - tokens);
        TensorFile::open(&self.files[*file])?.read_rows(TOKENS, start..start + tokens)
    }
}

/// The content of a file of latents, without the latents.
struct Shard {
    /// First row of each view, and the end of the last.
    starts: Vec<u32>,
    sums: Sums,
}

impl Shard {
    /// Reads a file and checks it: there are this many `views`, which have at least `tokens` tokens of width `embed` or none, and
    /// all values are finite and those that were written.
    fn read(path: &Path, views: usize, (tokens, embed): (usize, usize)) -> Result<Self> {
        let bad = |problem: String| Error::input(path.display(), problem);
        let mut file = TensorFile::open(path)?;
        let latents = file.read(TOKENS)?;
        let content: Option<Content> = file.text(CONTENT).and_then(|text| serde_json::from_str(text).ok());
        let content = content.filter(|content| content.lengths.len() == views);
        let content = content.ok_or_else(|| bad(format!("does not have the lengths of {views} views")))?;
        let mut starts = vec![0];
        for length in &content.lengths {
            let end = u32::checked_add(starts[starts.len() - 1], *length);
            starts.push(end.ok_or_else(|| bad("has lengths that are too large".into()))?);
        }
        let rows = starts[views] as usize;
        let fits = latents.dtype() == DType::F32 && latents.dims() == [rows, embed];
        if !fits || content.lengths.iter().any(|&length| length > 0 && (length as usize) < tokens) {
            let found = (latents.dtype(), latents.dims());
            let problem = format!(
                "tensor {TOKENS} is {found:?}, expected F32 and [{rows}, {embed}] with views of at least {tokens}"
            );
            return Err(bad(problem));
        }
        let values: Vec<f32> = latents.flatten_all()?.to_vec1()?;
        let sum = |of: fn(f64) -> f64| values.iter().map(|value| of(f64::from(*value))).sum::<f64>();
        let sums = Sums { count: values.len() as f64, values: sum(|value| value), squares: sum(|value| value * value) };
        if !sums.squares.is_finite() {
            return Err(bad(format!("tensor {TOKENS} has a value that is not finite")));
        }
        if content != Content::new(content.lengths.clone(), &values) {
            return Err(bad("its latents do not have their hash".into()));
        }
        Ok(Self { starts, sums })
    }
}

/// Name of the tensor of the latents of all views, one after the other, `[rows, E]`.
const TOKENS: &str = "tokens";
/// Metadata key for the [`Content`].
const CONTENT: &str = "latents";

/// What a file of latents has. It is one text, so that equal latents give equal files.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Content {
    /// Number of tokens of each view.
    lengths: Vec<u32>,
    /// Hash of the lengths and of all latents.
    sha256: String,
}

impl Content {
    fn new(lengths: Vec<u32>, values: &[f32]) -> Self {
        let mut hash = Hash::default();
        hash.add(format!("{lengths:?}"));
        hash.add_values(values);
        Self { lengths, sha256: hash.hex() }
    }
}

/// What latents are made of.
struct Source<'a> {
    encoder: &'a Encoder,
    photos: &'a Photos,
    crops: Crops,
    views: usize,
    seed: u64,
}

impl Source<'_> {
    /// Name of the cache file of `part` of the photographs: a hash of everything that the latents depend on.
    fn key(&self, part: &[Photo]) -> String {
        let Self { encoder, photos, crops, views, seed } = self;
        let mut hash = Hash::default();
        hash.add(format!("{} {crops:?} {views} {seed}\n", encoder.hash));
        part.iter().for_each(|photo| hash.add(photos.identity(photo)));
        hash.hex()[..32].to_string()
    }

    /// Encodes `part` of the photographs into `file`: on a CPU one photograph per core, on a GPU one after the other.
    fn encode(&self, file: &Path, part: &[Photo]) -> Result<()> {
        let encoded: Vec<(Vec<u32>, Vec<f32>)> = match self.encoder.weights.device().is_cpu() {
            true => part.par_iter().map(|photo| self.encoded(photo)).collect::<Result<_>>()?,
            false => part.iter().map(|photo| self.encoded(photo)).collect::<Result<_>>()?,
        };
        let (lengths, values): (Vec<_>, Vec<_>) = encoded.into_iter().unzip();
        let (lengths, values) = (lengths.concat(), values.concat());
        let content = serde_json::to_string(&Content::new(lengths, &values)).or_run("latents")?;
        let embed = self.encoder.config.embed;
        let shape = (values.len() / embed, embed);
        let tokens = Tensor::from_vec(values, shape, &Device::Cpu)?;
        tensors::write(file, &[(TOKENS, tokens)], HashMap::from([(CONTENT.into(), content)]))
    }

    /// The number of tokens of each view of a photograph, and the latents of all views. A photograph that cannot be used has
    /// none.
    fn encoded(&self, photo: &Photo) -> Result<(Vec<u32>, Vec<f32>)> {
        let Encoder { config, weights, .. } = self.encoder;
        let (mut lengths, mut values) = (vec![0; self.views], vec![]);
        let Some(picture) = self.photos.load(photo)? else { return Ok((lengths, values)) };
        let mut random = randomness(self.seed, Purpose::Crop, 0);
        for length in &mut lengths {
            let image = self.crops.draw_wide(&picture, config.token_width(), &mut random);
            let image = candle::to_tensor(image.view().insert_axis(Axis(0)))?.to_device(&weights.device())?;
            let latent = tokenizer::encode(&mut Eager::new(weights), config, &image)?.squeeze(0)?;
            *length = latent.dim(0)? as u32;
            values.extend(latent.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok((lengths, values))
    }
}
