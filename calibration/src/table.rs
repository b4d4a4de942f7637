//! The calibration table: ranges of activations by scope, as sorted JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use eqim::bundle::Int8Target;
use eqim::digest::{Hash, short};
use eqim::weights::Weights;
use eqim::{Config, Error, Result, ResultExt, files};
use serde::{Deserialize, Serialize};

use crate::estimate::{Estimator, LEVELS};
use crate::histogram::Histogram;
use crate::int8::{Affine, representable};

/// Version of the format that this code writes and reads.
pub const FORMAT: u32 = 1;

/// What calibration found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Version of the format.
    pub format: u32,
    /// Program and version that wrote it.
    pub producer: String,
    /// [Fingerprint](fingerprint) of the model that was watched.
    pub model: String,
    /// What the ranges come from.
    pub samples: Samples,
    /// How the ranges were chosen.
    pub estimator: Estimator,
    /// Scopes of products and convolutions with weights.
    pub scopes: BTreeMap<String, Entry>,
    /// What quantizing costs, scope by scope, where it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<Sensitivity>,
}

/// What a sensitivity search found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sensitivity {
    /// What the scopes were quantized for.
    #[serde(alias = "flavour")]
    pub target: Int8Target,
    /// Least PSNR that was asked for, dB.
    pub min_psnr: f32,
    /// The worst image's PSNR with everything in INT8 but `exclude`, dB; `null` for equal images.
    pub psnr: Option<f32>,
    /// Scopes to leave out of INT8, the worst.
    #[serde(alias = "keep")]
    pub exclude: BTreeSet<String>,
    /// Every scope quantized alone, the worst first.
    pub scopes: Vec<Ranked>,
}

/// One scope of the ranking.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranked {
    /// The scope.
    pub scope: String,
    /// What quantizing it alone does.
    #[serde(flatten)]
    pub damage: Damage,
}

/// What quantizing does to a few images, the worst of them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Damage {
    /// Relative error of the tokens.
    pub token_error: f32,
    /// PSNR, dB; `null` for equal images.
    pub psnr: Option<f32>,
}

impl Damage {
    /// A key that grows with the damage: the image first, then the tokens.
    pub fn severity(self) -> (f32, f32) {
        (-self.psnr.unwrap_or(f32::INFINITY), self.token_error)
    }
}

/// What the model was watched on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Samples {
    /// SHA-256 of every image's file by name.
    pub images: BTreeMap<String, String>,
    /// Whether images of other heights were scaled.
    pub resized: bool,
    /// Guided rollouts, each of its own class and seed.
    pub rollouts: usize,
    /// Tokens of a rollout, and at most of an image.
    pub tokens: usize,
    /// Euler steps of a token.
    pub steps: usize,
    /// Guidance at the last token.
    pub cfg: f32,
    /// Seed of the first rollout; the others' follow.
    pub seed: u64,
}

/// What calibration found at one scope.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Of the input, symmetric: value = level · scale, levels from -127 to 127.
    pub scale: f32,
    /// Range of the input.
    pub input: Range,
    /// Range of the output.
    pub output: Range,
    /// Values of the input that were seen.
    pub samples: u64,
}

/// Activations that are covered; those beyond are cut.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// Smallest, at most 0.
    pub low: f32,
    /// Largest, at least 0.
    pub high: f32,
}

impl Range {
    /// The range that an estimator chooses.
    pub fn of(histogram: &Histogram, estimator: Estimator) -> Self {
        let threshold = estimator.threshold(histogram);
        Self { low: histogram.low().max(-threshold), high: histogram.high().min(threshold) }
    }

    /// Scale of symmetric levels.
    ///
    /// # Errors
    /// [`Error::run`] for a range beyond FP16's scales.
    pub fn scale(self) -> Result<f32> {
        let largest = self.high.max(-self.low);
        // Constant zeros: any scale represents them.
        if largest == 0.0 { Ok(1.0) } else { representable(largest / LEVELS as f32) }
    }

    /// Unsigned levels.
    ///
    /// # Errors
    /// [`Error::run`] for a range beyond FP16's scales.
    pub fn affine(self) -> Result<Affine> {
        Affine::covering(self.low, self.high)
    }

    fn is_valid(self) -> bool {
        self.low.is_finite() && self.high.is_finite() && self.low <= 0.0 && self.high >= 0.0
    }
}

/// SHA-256 of a model: its configuration, and names and values in FP32 of its weights. The default number of steps of a run
/// is not part of it, and labels for people are not, such as the names of classes.
///
/// # Errors
/// When a tensor cannot be read.
pub fn fingerprint(config: &Config, weights: &Weights) -> Result<String> {
    fingerprint_with_labels(&config.without_labels(), weights)
}

/// The fingerprint that versions before 0.2 wrote: the names of classes were part of it.
fn fingerprint_with_labels(config: &Config, weights: &Weights) -> Result<String> {
    let mut config = config.clone();
    config.generator.steps = 0;
    let mut hash = Hash::default();
    hash.add(serde_json::to_vec(&config).or_run("configuration")?);
    for (name, tensor) in weights.iter() {
        hash.add(name);
        hash.add_values(&tensor.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(hash.hex())
}

impl Table {
    /// Reads a table.
    ///
    /// # Errors
    /// [`Error::input`] for a file that is none, or holds a range or scale that is not possible.
    pub fn read(path: &Path) -> Result<Self> {
        let bad = |problem: String| Error::input(path.display(), problem);
        let text = files::read(path)?;
        let table: Self = serde_json::from_slice(&text).map_err(|error| {
            bad("is not a calibration table, a file that eqim-export calibrate wrote".into()).because(error)
        })?;
        if table.format != FORMAT {
            return Err(bad(format!(
                "has format {}, expected {FORMAT}: calibrate the model again with this version",
                table.format
            )));
        }
        for (scope, entry) in &table.scopes {
            if !(entry.scale.is_finite() && entry.scale > 0.0) {
                return Err(bad(format!("{scope}: scale {} is not a positive number", entry.scale)));
            }
            if !(entry.input.is_valid() && entry.output.is_valid()) {
                return Err(bad(format!("{scope}: a range is not finite or does not contain 0")));
            }
        }
        Ok(table)
    }

    /// Writes the table, replacing an older one.
    ///
    /// # Errors
    /// [`Error::run`] when it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        files::write_json(path, self)
    }

    /// Checks that the table, read from `path`, is of this model.
    ///
    /// # Errors
    /// [`Error::input`] when it is of another.
    pub fn check_model(&self, path: &Path, config: &Config, weights: &Weights) -> Result<()> {
        let found = fingerprint(config, weights)?;
        if self.model == found || self.model == fingerprint_with_labels(config, weights)? {
            return Ok(());
        }
        let problem = format!(
            "was calibrated on another model ({}…, this one is {}…), or on the same weights rounded: run eqim-export \
             calibrate on a bundle of this model in FP32",
            short(&self.model),
            short(&found)
        );
        Err(Error::input(path.display(), problem))
    }

    /// What was found at a scope.
    ///
    /// # Errors
    /// [`Error::input`] when nothing was.
    pub fn entry(&self, scope: &str) -> Result<&Entry> {
        self.scopes
            .get(scope)
            .ok_or_else(|| Error::setting("calibration", format!("has no scope {scope}: calibrate the model again")))
    }
}
