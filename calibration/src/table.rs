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

/// Result of a calibration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Version of the format.
    pub format: u32,
    /// Program and version that wrote the table.
    pub producer: String,
    /// [Fingerprint](fingerprint) of the calibrated model.
    pub model: String,
    /// Inputs that the ranges were measured on.
    pub samples: Samples,
    /// Method that chose the ranges.
    pub estimator: Estimator,
    /// Ranges by scope, for every product and convolution with a weight.
    pub scopes: BTreeMap<String, Entry>,
    /// Result of the sensitivity search, if one was requested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<Sensitivity>,
}

/// Result of a sensitivity search.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sensitivity {
    /// Target that the scopes were quantized for.
    #[serde(alias = "flavour")]
    pub target: Int8Target,
    /// Requested minimum PSNR, dB.
    pub min_psnr: f32,
    /// PSNR of the worst image with all scopes other than `exclude` in INT8, dB; `null` if the images are equal.
    pub psnr: Option<f32>,
    /// The worst scopes, which are excluded from INT8.
    #[serde(alias = "keep")]
    pub exclude: BTreeSet<String>,
    /// Damage of every scope quantized alone, the worst scope first.
    pub scopes: Vec<Ranked>,
}

/// One scope of the ranking.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranked {
    /// Name of the scope.
    pub scope: String,
    /// Damage if only this scope is quantized.
    #[serde(flatten)]
    pub damage: Damage,
}

/// Largest error that quantization causes in a few images.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Damage {
    /// Relative error of the tokens.
    pub token_error: f32,
    /// PSNR of the image, dB; `null` if the images are equal.
    pub psnr: Option<f32>,
}

impl Damage {
    /// Sort key that grows with the damage: by the image first, then by the tokens.
    pub fn severity(self) -> (f32, f32) {
        (-self.psnr.unwrap_or(f32::INFINITY), self.token_error)
    }
}

/// Inputs of a calibration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Samples {
    /// SHA-256 of every image file, by file name.
    pub images: BTreeMap<String, String>,
    /// Whether images of other heights were resized.
    pub resized: bool,
    /// Number of guided rollouts. Each has its own class and seed.
    pub rollouts: usize,
    /// Tokens per rollout, and maximum tokens per image.
    pub tokens: usize,
    /// Euler steps per token.
    pub steps: usize,
    /// Classifier-free guidance at the last token.
    pub cfg: f32,
    /// Seed of the first rollout. The seed grows by 1 with every rollout.
    pub seed: u64,
}

/// Ranges of one scope.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Scale of the symmetrically quantized input: value = level · scale, with levels from -127 to 127.
    pub scale: f32,
    /// Range of the input.
    pub input: Range,
    /// Range of the output.
    pub output: Range,
    /// Number of input values that were counted.
    pub samples: u64,
}

/// Range of activations that INT8 covers. Values outside are clipped.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// Smallest value, at most 0.
    pub low: f32,
    /// Largest value, at least 0.
    pub high: f32,
}

impl Range {
    /// The range that an estimator chooses.
    pub fn of(histogram: &Histogram, estimator: Estimator) -> Self {
        let threshold = estimator.threshold(histogram);
        Self { low: histogram.low().max(-threshold), high: histogram.high().min(threshold) }
    }

    /// Scale of the symmetric quantization of the range.
    ///
    /// # Errors
    /// [`Error::run`] if FP16 cannot represent the scale.
    pub fn scale(self) -> Result<f32> {
        let largest = self.high.max(-self.low);
        // All values are 0, which any scale represents.
        if largest == 0.0 { Ok(1.0) } else { representable(largest / LEVELS as f32) }
    }

    /// Unsigned quantization of the range.
    ///
    /// # Errors
    /// [`Error::run`] if FP16 cannot represent the scale.
    pub fn affine(self) -> Result<Affine> {
        Affine::covering(self.low, self.high)
    }

    fn is_valid(self) -> bool {
        self.low.is_finite() && self.high.is_finite() && self.low <= 0.0 && self.high >= 0.0
    }
}

/// SHA-256 of a model: of its configuration, and of the names and FP32 values of its weights. The default number of
/// steps and the class names are not part of it.
///
/// # Errors
/// If a tensor cannot be read.
pub fn fingerprint(config: &Config, weights: &Weights) -> Result<String> {
    fingerprint_with_labels(&config.without_labels(), weights)
}

/// The fingerprint of older tables, which included the class names.
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
    /// [`Error::input`] if the file cannot be read, is not a calibration table of this format, or holds an invalid
    /// range or scale.
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

    /// Writes the table and replaces an older one.
    ///
    /// # Errors
    /// [`Error::run`] if the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        files::write_json(path, self)
    }

    /// Checks that the table, which was read from `path`, belongs to this model.
    ///
    /// # Errors
    /// [`Error::input`] if it belongs to another model.
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

    /// Ranges of a scope.
    ///
    /// # Errors
    /// [`Error::input`] if the table does not have the scope.
    pub fn entry(&self, scope: &str) -> Result<&Entry> {
        self.scopes
            .get(scope)
            .ok_or_else(|| Error::setting("calibration", format!("has no scope {scope}: calibrate the model again")))
    }
}
