//! Calibration: runs the model on pictures and rollouts, and collects the ranges of its activations.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use eqim::digest::sha256;
use eqim::engine::Engine;
use eqim::engine::candle::{Runner, StageEngine};
use eqim::generate::generate;
use eqim::model::Stage;
use eqim::ops::eager::Eager;
use eqim::picture::{self, Side};
use eqim::request::{Noise, Request};
use eqim::weights::Weights;
use eqim::{Config, Error, Result, ResultExt, files};
use ndarray::{Array4, Axis, s};
use serde::{Deserialize, Serialize};

use crate::estimate::Estimator;
use crate::histogram::Histogram;
use crate::observe::{Observe, Seen};
use crate::table::{Damage, Entry, FORMAT, Range, Samples, Table};

/// State of a calibration that can be incomplete. It is saved in the state file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Collection {
    model: String,
    samples: Samples,
    done: usize,
    scopes: BTreeMap<String, ScopeHistograms>,
    /// Damage that the sensitivity search has measured, by the settings of the search and by scope.
    #[serde(default)]
    pub(crate) damages: BTreeMap<String, BTreeMap<String, Damage>>,
}

/// Histograms of one scope.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScopeHistograms {
    input: Histogram,
    output: Histogram,
}

/// SHA-256 of every picture file, by its path relative to `folder`.
///
/// # Errors
/// [`Error::input`] if a file cannot be read.
pub fn hashes(folder: &Path, pictures: &[PathBuf]) -> Result<BTreeMap<String, String>> {
    let hash = |path: &PathBuf| {
        let name = path.strip_prefix(folder).unwrap_or(path).to_string_lossy().into_owned();
        Ok((name, sha256(files::read(path)?)))
    };
    pictures.iter().map(hash).collect()
}

/// Reads a picture as an input of the tokenizer, `[1, 3, height, width]`: at the model's height, and cropped to at most
/// `tokens` tokens.
///
/// # Errors
/// [`Error::input`] if the file is not a picture, or has another height and `resize` is false.
pub fn read_picture(path: &Path, config: &Config, tokens: usize, resize: bool) -> Result<Array4<f32>> {
    let (height, token) = (config.tokenizer.image_height(), config.tokenizer.token_width());
    let picture = picture::read(path, height, token, Side::Right)?;
    if picture.original.1 as usize != height && !resize {
        let problem = format!(
            "is {} pixels high, expected {height}, the height of the model's images: scale it, or allow resizing",
            picture.original.1
        );
        return Err(Error::input(path.display(), problem).with_field("resize"));
    }
    let width = picture.pixels.dim().2.min(tokens * token);
    Ok(picture.pixels.slice(s![.., .., ..width]).to_owned().insert_axis(Axis(0)))
}

/// Runs the model on Candle and adds its activations to histograms.
struct CalibrationRunner<'a> {
    weights: &'a Weights,
    scopes: &'a RefCell<BTreeMap<String, ScopeHistograms>>,
}

impl Runner for CalibrationRunner<'_> {
    fn name(&self) -> &str {
        "Candle"
    }

    fn run(&self, config: &Config, stage: Stage, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let probe = |scope: &str, seen: Seen, value: &Tensor| {
            let mut scopes = self.scopes.borrow_mut();
            let entry = scopes.entry(scope.to_string());
            let histogram = match seen {
                Seen::Input => &mut entry.or_default().input,
                Seen::Output => &mut entry.or_default().output,
                Seen::Other => return Ok(()),
            };
            let added = histogram.add(&value.flatten_all()?.to_vec1::<f32>()?);
            added.or_run(scope)
        };
        stage.run(&mut Observe::new(Eager::new(self.weights), probe), config, inputs)
    }
}

/// Request of the guided rollout with the number `index`.
fn request(config: &Config, samples: &Samples, index: usize) -> Request {
    Request {
        cfg: samples.cfg,
        steps: samples.steps,
        noise: Noise::Seed(samples.seed.wrapping_add(index as u64)),
        ..Request::new(config, [Some(index % config.generator.class_num)], samples.tokens)
    }
}

impl Collection {
    /// Resumes the calibration whose state is in the file `path`, or begins a new one if the file does not exist.
    ///
    /// # Errors
    /// [`Error::input`] if the file is not the state of a calibration, or the model, images or settings differ.
    pub fn open(path: &Path, model: &str, samples: &Samples) -> Result<Self> {
        if !path.exists() {
            let (model, samples) = (model.to_string(), samples.clone());
            return Ok(Self { model, samples, done: 0, scopes: BTreeMap::new(), damages: BTreeMap::new() });
        }
        let bad = |problem: String| Error::input(path.display(), problem);
        let state: Self = serde_json::from_slice(&files::read(path)?)
            .map_err(|error| bad(format!("is not the state of a calibration: {error}; remove it to start again")))?;
        if state.model != model || state.samples != *samples {
            return Err(bad(
                "is the state of a calibration of another model, or with other images or settings: give the same ones \
                 to go on, or remove it to begin anew"
                    .into(),
            ));
        }
        Ok(state)
    }

    /// Writes the state to a file.
    ///
    /// # Errors
    /// [`Error::run`] if the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).or_run(path.display())?;
        files::write(path, &text)
    }

    /// Number of samples that the model has run on: pictures first, then rollouts.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Total number of samples.
    pub fn total(&self) -> usize {
        self.samples.images.len() + self.samples.rollouts
    }

    /// Runs the model on the next sample. `pictures` are the picture files of the calibration, in the same order at
    /// every call.
    ///
    /// # Errors
    /// [`Error::input`] if a picture does not fit the model; [`Error::run`] if an activation is not finite. The histograms
    /// then contain a part of the sample: open the saved state again.
    pub fn next(&mut self, config: &Config, weights: &Weights, pictures: &[PathBuf]) -> Result<()> {
        let scopes = RefCell::new(std::mem::take(&mut self.scopes));
        let engine = StageEngine::new(config.clone(), CalibrationRunner { weights, scopes: &scopes });
        let ran = match pictures.get(self.done) {
            Some(path) => self.run_picture(&engine, path),
            None => self.run_rollout(&engine),
        };
        self.scopes = scopes.into_inner();
        ran?;
        self.done += 1;
        Ok(())
    }

    fn run_picture(&self, engine: &dyn Engine, path: &Path) -> Result<()> {
        let pixels = read_picture(path, engine.config(), self.samples.tokens, self.samples.resized)?;
        engine.decode(engine.encode(pixels.view())?.view()).map(drop)
    }

    fn run_rollout(&self, engine: &dyn Engine) -> Result<()> {
        let request = request(engine.config(), &self.samples, self.done - self.samples.images.len());
        let generated = generate(engine, &request, |_| {})?;
        engine.decode_tokens(generated.tokens.view()).map(drop)
    }

    /// The calibration table of a complete collection.
    ///
    /// # Errors
    /// [`Error::run`] if FP16 cannot represent the scale of a scope.
    pub fn table(&self, estimator: Estimator) -> Result<Table> {
        let entry = |(scope, histograms): (&String, &ScopeHistograms)| {
            let [input, output] =
                [&histograms.input, &histograms.output].map(|histogram| Range::of(histogram, estimator));
            let scale = input.scale().or_run(scope)?;
            Ok((scope.clone(), Entry { scale, input, output, samples: histograms.input.samples() }))
        };
        Ok(Table {
            format: FORMAT,
            producer: format!("eqim {}", env!("CARGO_PKG_VERSION")),
            model: self.model.clone(),
            samples: self.samples.clone(),
            estimator,
            scopes: self.scopes.iter().map(entry).collect::<Result<_>>()?,
            sensitivity: None,
        })
    }
}
