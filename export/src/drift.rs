//! Measures how far graphs in another precision drift from FP32 over whole rollouts, in the tokens and in the bytes of
//! the images.
//!
//! On a CPU, ONNX Runtime computes most FP16 nodes in FP32 and removes the casts between them. A value beyond the FP16
//! range then overflows only where it is stored, as keys and values are. A GPU would overflow at once. Therefore the
//! range of the activations is also measured on Candle.

use std::path::Path;

use candle_core::{Device, Tensor};
use eqim::Result;
use eqim::bundle::{Bundle, Precision};
use eqim::close::{self, Measure};
use eqim::engine::Engine;
use eqim::engine::candle::tableau_tensors;
use eqim::engine::candle::{CandleEngine, to_tensor};
use eqim::generate::generate;
use eqim::model::{flow, tokenizer, transformer};
use eqim::picture::quality::psnr;
use eqim::picture::to_byte;
use eqim::request::solver::{Solver, Tableau};
use eqim::request::{Generated, GuidanceSchedule, Noise, Request};
use eqim_calibration::Ranges;
use eqim_engines::onnxruntime::{OrtEngine, Providers};
use ndarray::{Array3, Array4, ArrayView3, Axis, concatenate, s};
use serde::{Deserialize, Serialize};

use crate::validate::MOST_FP16;

/// Drift of the graphs in one precision from FP32.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drift {
    /// Precision of the graphs.
    pub precision: Precision,
    /// Tolerance: the largest drift of a token that passes.
    pub atol: f32,
    /// Classifier-free guidance. It is the same at every token, so that a shorter rollout is the beginning of a longer
    /// one.
    pub cfg: f32,
    /// Euler steps per token.
    pub steps: usize,
    /// Seed of the noise.
    pub seed: u64,
    /// Drift of the rollouts, one rollout per length.
    pub rollouts: Vec<RolloutDrift>,
    /// Scope and value of the largest activation in FP32 over the longest rollout; only for FP16 graphs.
    pub largest_activation: Option<(String, f32)>,
}

/// Drift of the rollout of one length.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutDrift {
    /// Length in tokens.
    pub tokens: usize,
    /// The first token with a value that is not finite. The rollout is then not compared, and the next fields are
    /// `null`.
    pub first_not_finite: Option<usize>,
    /// Largest `|found - expected| / max(1, |expected|)` of the tokens' values.
    pub largest: Option<f32>,
    /// Mean of `|found - expected| / max(1, |expected|)`.
    pub mean: Option<f32>,
    /// Drift of the image; `null` if one of the two images has a value that is not finite.
    pub image: Option<ImageDrift>,
    /// Whether all values are finite, the tokens are within the tolerance, and the PSNR of the image is at least
    /// [`LEAST_PSNR`].
    pub passed: bool,
}

/// Difference between two images, in 8-bit levels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageDrift {
    /// Largest difference.
    pub largest: u8,
    /// Mean difference.
    pub mean: f32,
    /// Peak signal-to-noise ratio, dB; `null` if the images are equal and the ratio is infinite.
    pub psnr: Option<f32>,
}

/// Lengths that are compared, in tokens: the shortest that the decoder supports, the length of a published image, and
/// four times that length, far beyond the published window of 3.
pub const LENGTHS: [usize; 3] = [2, 16, 64];

/// Minimum PSNR of images that pass, dB. Above it, two images look the same.
pub const LEAST_PSNR: f32 = 40.0;

const SEED: u64 = 21;
const CFG: f32 = 3.0;
/// Maximum number of Euler steps per token: enough for rounding errors to accumulate, and few enough that Candle takes
/// less than a second per token with the largest model.
const MOST_STEPS: usize = 8;

/// Compares a bundle on ONNX Runtime with `reference` in FP32, over guided rollouts from the same noise. `lengths` are
/// in tokens. `progress` receives a line of text for every length, and for FP16 one for the largest activation.
///
/// # Errors
/// [`eqim::Error::input`] if a length is below 2 or there are no lengths. Other errors if an engine fails or a token of
/// the reference is not finite. Drift and overflow of the bundle are not errors. They are recorded in the report.
pub fn measure(
    bundle: &Bundle,
    reference: &CandleEngine,
    library: &Path,
    lengths: &[usize],
    atol: f32,
    mut progress: impl FnMut(&str),
) -> Result<Drift> {
    let steps = reference.config().generator.steps.min(MOST_STEPS);
    let request = |tokens| Request {
        cfg: CFG,
        cfg_schedule: GuidanceSchedule::Constant,
        steps,
        noise: Noise::Seed(SEED),
        ..Request::new(reference.config(), [Some(0)], tokens)
    };
    lengths.iter().try_for_each(|&length| request(length).check(reference.config()))?;
    let longest = lengths.iter().copied().max().unwrap_or_default();
    let expected = generate(reference, &request(longest), |_| {})?;
    let engine = OrtEngine::new(bundle, library, None, &Providers::default())?;
    let found = finite_tokens(&engine, &expected.noise, &Tableau::new(Solver::Euler, steps))?;

    let mut rollouts = vec![];
    for &length in lengths {
        let expected = expected.tokens.slice(s![.., ..length, ..]);
        let rollout = compare(&engine, reference, found.view(), expected, atol)?;
        progress(&rollout.line(atol));
        rollouts.push(rollout);
    }
    let precision = bundle.manifest.precision;
    let largest_activation =
        if precision == Precision::Fp16 { largest_activation(reference, &expected, steps)? } else { None };
    let drift = Drift { precision, atol, cfg: CFG, steps, seed: SEED, rollouts, largest_activation };
    drift.range_line().iter().for_each(|line| progress(line));
    Ok(drift)
}

/// Tokens `[1, n, E]` of a guided rollout from `noise [1, N, E]`. The rollout ends before the first token that is not
/// finite; `generate` would fail there and return no tokens.
fn finite_tokens(engine: &dyn Engine, noise: &Array3<f32>, tableau: &Tableau) -> Result<Array3<f32>> {
    let mut tokens = Array3::zeros(noise.dim());
    let (mut session, mut z) = engine.start(&[0, engine.config().generator.unconditional() as i64])?;
    for index in 0..noise.dim().1 {
        if index > 0 {
            let last = tokens.index_axis(Axis(1), index - 1);
            z = session.step(concatenate![Axis(0), last, last].view(), &[index as i64 - 1; 2])?;
        }
        let token = engine.sample(z.view(), noise.index_axis(Axis(1), index), &[CFG], tableau)?;
        if token.iter().any(|value| !value.is_finite()) {
            return Ok(tokens.slice_move(s![.., ..index, ..]));
        }
        tokens.index_axis_mut(Axis(1), index).assign(&token);
    }
    Ok(tokens)
}

/// Scope and value of the largest activation of a rollout in FP32. The tokens are known, so every stage runs on all of
/// them at once.
fn largest_activation(reference: &CandleEngine, rollout: &Generated, steps: usize) -> Result<Option<(String, f32)>> {
    let config = reference.config();
    let generator = &config.generator;
    let n = rollout.tokens.dim().1;
    let latents = to_tensor((&rollout.tokens / generator.vae_norm as f32).view())?;
    let [tokens, noise] = [&rollout.tokens, &rollout.noise].map(|array| to_tensor(array.index_axis(Axis(0), 0)));
    let (tokens, noise) = (tokens?, noise?);
    let both = Tensor::cat(&[&tokens, &tokens], 0)?;
    let labels = Tensor::new(&[0, generator.unconditional() as i64], &Device::Cpu)?;
    let guidance = Tensor::full(CFG, n, &Device::Cpu)?;
    let [times, updates] = tableau_tensors(&Tableau::new(Solver::Euler, steps))?;
    let mut ranges = Ranges::default();
    ranges.observe(reference.weights(), |o| {
        let z = transformer::teacher_forced(o, generator, &labels, &both, n, 0)?;
        flow::sample(o, generator, &z, &noise, &guidance, &times, &updates)?;
        tokenizer::decode(o, &config.tokenizer, &latents)
    })?;
    Ok(ranges.largest().map(|(scope, largest)| (scope.to_string(), largest)))
}

/// Compares `found`, the finite tokens of a rollout, with `expected [1, N, E]`, which can be shorter.
fn compare(
    engine: &dyn Engine,
    reference: &dyn Engine,
    found: ArrayView3<f32>,
    expected: ArrayView3<f32>,
    atol: f32,
) -> Result<RolloutDrift> {
    let (finite, tokens) = (found.dim().1, expected.dim().1);
    if finite < tokens {
        let first_not_finite = Some(finite);
        return Ok(RolloutDrift { tokens, first_not_finite, largest: None, mean: None, image: None, passed: false });
    }
    let found = found.slice_move(s![.., ..tokens, ..]);
    let relative = |(found, expected): (&f32, &f32)| (found - expected).abs() / expected.abs().max(1.0);
    let differences: Vec<f32> = found.iter().zip(&expected).map(relative).collect();
    let largest = close::difference(found, expected, Measure::Scaled);
    let mean = differences.iter().sum::<f32>() / differences.len() as f32;

    let norm = reference.config().generator.vae_norm as f32;
    let image = image_drift(&engine.decode((&found / norm).view())?, &reference.decode((&expected / norm).view())?);
    let alike = image.as_ref().is_some_and(|image| image.psnr.is_none_or(|psnr| psnr >= LEAST_PSNR));
    let passed = largest <= atol && alike;
    Ok(RolloutDrift { tokens, first_not_finite: None, largest: Some(largest), mean: Some(mean), image, passed })
}

/// Compares images `[1, 3, height, width]` as they would be written to a file, in 8 bits; `None` if a value of either
/// image is not finite.
fn image_drift(found: &Array4<f32>, expected: &Array4<f32>) -> Option<ImageDrift> {
    if found.iter().chain(expected).any(|value| !value.is_finite()) {
        return None;
    }
    let levels = |(found, expected): (&f32, &f32)| to_byte(*found).abs_diff(to_byte(*expected));
    let levels: Vec<u8> = found.iter().zip(expected).map(levels).collect();
    let sum: u64 = levels.iter().map(|&level| u64::from(level)).sum();
    Some(ImageDrift {
        mean: (sum as f64 / levels.len() as f64) as f32,
        largest: levels.into_iter().max().unwrap_or_default(),
        psnr: psnr(found.view(), expected.view()),
    })
}

impl Drift {
    /// Whether every length passed, and the largest activation is well below the maximum of FP16.
    pub fn passed(&self) -> bool {
        self.rollouts.iter().all(|rollout| rollout.passed) && self.within_range()
    }

    fn within_range(&self) -> bool {
        self.largest_activation.as_ref().is_none_or(|(_, largest)| *largest <= MOST_FP16)
    }

    fn range_line(&self) -> Option<String> {
        let (scope, largest) = self.largest_activation.as_ref()?;
        let mark = if self.within_range() { '✓' } else { 'x' };
        Some(format!(
            "\t-[{mark}] largest activation {largest:.1} in {scope}, the maximum of FP16 is {}",
            half::f16::MAX
        ))
    }
}

impl RolloutDrift {
    /// The result as a line of text, in the format of optimum.
    fn line(&self, atol: f32) -> String {
        let mark = if self.passed { '✓' } else { 'x' };
        let what = format!("\t-[{mark}] rollout of {} tokens", self.tokens);
        if let Some(token) = self.first_not_finite {
            return format!("{what}: token {token} is not finite (overflow)");
        }
        let (largest, mean) = (self.largest.unwrap_or_default(), self.mean.unwrap_or_default());
        let tokens = format!("tokens within {largest:.1e} (mean {mean:.1e}, atol: {atol:.0e})");
        let Some(image) = &self.image else {
            return format!("{what}: {tokens}, image not finite (overflow)");
        };
        let (levels, plural) = (image.largest, if image.largest == 1 { "" } else { "s" });
        let psnr = image.psnr.map_or("equal".into(), |psnr| format!("PSNR {psnr:.1} dB"));
        format!("{what}: {tokens}, image bytes within {levels} level{plural} (mean {:.1e}, {psnr})", image.mean)
    }
}
