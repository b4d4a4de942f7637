//! Calibration: runs the model on pictures and rollouts, and collects the ranges of its activations.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::path::Path;

use candle_core::Tensor;
use eqim::digest::sha256;
use eqim::engine::Engine;
use eqim::engine::candle::{Runner, StageEngine};
use eqim::generate::generate;
use eqim::model::Stage;
use eqim::ops::eager::Eager;
use eqim::picture::folder::Folder;
use eqim::picture::{self, Side};
use eqim::request::{Noise, Request};
use eqim::weights::Weights;
use eqim::{Config, Error, Result, ResultExt, files};
use ndarray::{Axis, s};
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
    /// Names of the pictures that the model has run on.
    pictures: BTreeSet<String>,
    /// Number of rollouts that the model has run.
    rollouts: usize,
    scopes: BTreeMap<String, ScopeHistograms>,
    /// Damage that the sensitivity search has measured, by the settings of the search and by scope.
    pub(crate) damages: BTreeMap<String, BTreeMap<String, Damage>>,
}

/// Histograms of one scope.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScopeHistograms {
    input: Histogram,
    output: Histogram,
}

/// Looks at all pictures below `folder`. Returns the SHA-256 of every picture that fits the model, by its path relative
/// to `folder`, and why each of the others is skipped. With `resize`, pictures of any height fit.
///
/// # Errors
/// Those of [`Folder::open`].
pub fn survey(folder: &Path, config: &Config, resize: bool) -> Result<(BTreeMap<String, String>, Vec<String>)> {
    let look = |path: &Path, bytes: &[u8]| {
        check_size(path, picture::decode(path, bytes)?.dimensions(), config, resize)?;
        let name = path.strip_prefix(folder).unwrap_or(path).to_str();
        let name = name.ok_or_else(|| Error::input(path.display(), "has a name that is not Unicode: rename it"))?;
        Ok((name.to_string(), sha256(bytes)))
    };
    let Folder { pictures, skipped, .. } = Folder::open(folder, look)?;
    Ok((pictures.into_iter().map(|picture| picture.content).collect(), skipped))
}

/// Checks that a picture of this width and height is an input of the tokenizer.
fn check_size(path: &Path, size: (u32, u32), config: &Config, resize: bool) -> Result<()> {
    let (height, token) = (config.tokenizer.image_height(), config.tokenizer.token_width());
    if size.1 as usize != height && !resize {
        let problem = format!(
            "is {} pixels high, expected {height}, the height of the model's images: scale it, or allow resizing",
            size.1
        );
        return Err(Error::input(path.display(), problem).with_field("resize"));
    }
    picture::scaled_width(path, size, height, token).map(drop)
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

/// Settings of a calibration by the names of their flags.
fn settings(samples: &Samples) -> [(&'static str, String); 6] {
    let Samples { images: _, resized, rollouts, tokens, steps, cfg, seed } = samples;
    [
        ("resize", resized.to_string()),
        ("rollouts", rollouts.to_string()),
        ("tokens", tokens.to_string()),
        ("steps", steps.to_string()),
        ("cfg", cfg.to_string()),
        ("seed", seed.to_string()),
    ]
}

impl Collection {
    /// Resumes the calibration whose state is in the file `path`, or begins a new one if the file does not exist. There
    /// may be more pictures than when the state was written, since the order of the samples does not matter.
    ///
    /// # Errors
    /// [`Error::input`] if the file is not the state of a calibration, if the model or a setting differs, or if a picture
    /// that the model has run on is another one now.
    pub fn open(path: &Path, model: &str, samples: &Samples) -> Result<Self> {
        if !path.exists() {
            let (model, samples) = (model.to_string(), samples.clone());
            let (pictures, scopes, damages) = Default::default();
            return Ok(Self { model, samples, pictures, rollouts: 0, scopes, damages });
        }
        let state = Self::read(path)?;
        state.check(model, samples).map_err(|problem| {
            let advice = "to go on, give the same ones; to begin anew, remove the file";
            Error::input(path.display(), format!("{problem}: {advice}"))
        })?;
        Ok(Self { samples: samples.clone(), ..state })
    }

    /// Reads a state: a line with the SHA-256 of the next line, which is the state as JSON.
    fn read(path: &Path) -> Result<Self> {
        let bad = |problem: &dyn Display| {
            Error::input(
                path.display(),
                format!("is not the state of a calibration: {problem}; remove it to start again"),
            )
        };
        let bytes = files::read(path)?;
        let text = std::str::from_utf8(&bytes).map_err(|error| bad(&error))?;
        let (hash, state) = text.split_once('\n').ok_or_else(|| bad(&"it has no hash"))?;
        if sha256(state) != hash {
            return Err(bad(&"its contents do not have its hash"));
        }
        let state: Self = serde_json::from_str(state).map_err(|error| bad(&error))?;
        let Self { pictures, rollouts, samples, damages, .. } = &state;
        let is_known = pictures.iter().all(|name| samples.images.contains_key(name)) && *rollouts <= samples.rollouts;
        let is_finite = |damage: &Damage| damage.token_error.is_finite() && damage.psnr.is_none_or(f32::is_finite);
        match is_known && damages.values().flat_map(BTreeMap::values).all(is_finite) {
            true => Ok(state),
            false => Err(bad(&"it has more samples than its calibration, or a damage that is not finite")),
        }
    }

    /// Says what prevents a calibration of `model` on `samples` from going on from this state.
    fn check(&self, model: &str, samples: &Samples) -> Result<(), String> {
        if self.model != model {
            return Err("is the state of a calibration of another model".into());
        }
        let pairs = settings(&self.samples).into_iter().zip(settings(samples));
        if let Some(((name, was), (_, is))) = pairs.into_iter().find(|(was, is)| was != is) {
            return Err(format!("is the state of a calibration with other settings: {name} was {was} and is {is}"));
        }
        for name in &self.pictures {
            match samples.images.get(name) {
                None => return Err(format!("is the state of a calibration with the picture {name}, which is missing")),
                Some(hash) if self.samples.images.get(name) != Some(hash) => {
                    return Err(format!("is the state of a calibration with the picture {name}, which was changed"));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Writes the state to a file.
    ///
    /// # Errors
    /// [`Error::run`] if the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string(self).or_run(path.display())?;
        files::write(path, format!("{}\n{text}", sha256(&text)).as_bytes())
    }

    /// Number of samples that the model has run on: pictures first, then rollouts.
    pub fn done(&self) -> usize {
        self.pictures.len() + self.rollouts
    }

    /// Total number of samples.
    pub fn total(&self) -> usize {
        self.samples.images.len() + self.samples.rollouts
    }

    /// Runs the model on the next sample. `folder` is the folder of the pictures.
    ///
    /// # Errors
    /// [`Error::input`] if a picture has changed; [`Error::run`] if an activation is not finite. The histograms then
    /// contain a part of the sample: open the saved state again.
    pub fn next(&mut self, config: &Config, weights: &Weights, folder: &Path) -> Result<()> {
        // They belong to a table without this sample.
        self.damages.clear();
        let scopes = RefCell::new(std::mem::take(&mut self.scopes));
        let engine = StageEngine::new(config.clone(), CalibrationRunner { weights, scopes: &scopes });
        let picture = self.samples.images.keys().find(|name| !self.pictures.contains(*name)).cloned();
        let ran = match &picture {
            Some(name) => self.run_picture(&engine, name, &folder.join(name)),
            None => self.run_rollout(&engine),
        };
        self.scopes = scopes.into_inner();
        ran?;
        match picture {
            Some(name) => drop(self.pictures.insert(name)),
            None => self.rollouts += 1,
        }
        Ok(())
    }

    /// Encodes and decodes a picture: at the model's height, and cropped to at most the tokens of a rollout.
    fn run_picture(&self, engine: &dyn Engine, name: &str, path: &Path) -> Result<()> {
        let (config, bytes) = (engine.config(), picture::contents(path)?);
        if self.samples.images.get(name) != Some(&sha256(&bytes)) {
            return Err(Error::input(path.display(), "was changed while the calibration ran"));
        }
        let image = picture::decode(path, &bytes)?;
        let (height, token) = (config.tokenizer.image_height(), config.tokenizer.token_width());
        let pixels = picture::scale(path, image, height, token, Side::Right)?.pixels;
        let width = pixels.dim().2.min(self.samples.tokens * token);
        let pixels = pixels.slice(s![.., .., ..width]).insert_axis(Axis(0));
        engine.decode(engine.encode(pixels)?.view()).map(drop)
    }

    fn run_rollout(&self, engine: &dyn Engine) -> Result<()> {
        let request = request(engine.config(), &self.samples, self.rollouts);
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
