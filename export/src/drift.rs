//! How far graphs of another precision drift from FP32 along whole rollouts: tokens, and bytes of the images.

use std::path::Path;

use eqim::Result;
use eqim::candle::CandleEngine;
use eqim::engine::Engine;
use eqim::generate::timesteps;
use eqim::picture::to_byte;
use eqim::random::TorchRng;
use eqim_engines::bundle::{Bundle, Precision};
use eqim_engines::onnxruntime::OrtEngine;
use ndarray::{Array2, Array3, ArrayView3, Axis, concatenate, s};
use serde::{Deserialize, Serialize};

/// How far the graphs of one precision drift from FP32.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drift {
    /// Of the graphs.
    pub precision: Precision,
    /// Largest drift of a token that passes.
    pub atol: f32,
    /// Guidance, the same at every token: so a shorter rollout is the beginning of a longer one.
    pub cfg: f32,
    /// Euler steps a token.
    pub steps: usize,
    /// Seed of the noise.
    pub seed: u64,
    /// By length, shortest first.
    pub rollouts: Vec<Rollout>,
}

/// One length.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollout {
    /// Length.
    pub tokens: usize,
    /// The first token that is not finite: nothing after it is compared.
    pub first_not_finite: Option<usize>,
    /// Largest `|found - expected| / max(1, |expected|)` of the tokens' values; `null` when one is not finite.
    pub largest: Option<f32>,
    /// Mean of the same.
    pub mean: Option<f32>,
    /// The images, when all tokens are finite.
    pub image: Option<ImageDrift>,
    /// Whether tokens and image are finite, and the tokens within the tolerance.
    pub passed: bool,
}

/// Difference of two images, in levels of 8 bits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageDrift {
    /// Largest.
    pub largest: u8,
    /// Mean.
    pub mean: f32,
    /// Peak signal-to-noise ratio, dB; `null` for equal images.
    pub psnr: Option<f32>,
}

const SEED: u64 = 21;
const CFG: f32 = 3.0;
/// Enough for rounding to add up, few enough that Candle takes seconds a token on the largest model.
const MOST_STEPS: usize = 8;

/// Lengths that are compared: the least, a published image, and four of them side by side.
pub const LENGTHS: [usize; 3] = [2, 16, 64];

/// Compares a bundle on ONNX Runtime with `reference` in FP32, over guided rollouts from the same noise, and shows a
/// line for every length to `progress`.
///
/// # Errors
/// When an engine fails; drift and overflow are no errors but stand in the report.
pub fn measure(
    bundle: &Bundle,
    reference: &CandleEngine,
    library: &Path,
    lengths: &[usize],
    atol: f32,
    mut progress: impl FnMut(&str),
) -> Result<Drift> {
    let engine = OrtEngine::new(bundle, library, None)?;
    let longest = lengths.iter().copied().max().unwrap_or_default();
    let steps = reference.config().generator.steps.min(MOST_STEPS);
    let found = rollout(&engine, longest, steps)?;
    let expected = rollout(reference, longest, steps)?;
    let mut drift = Drift { precision: bundle.manifest.precision, atol, cfg: CFG, steps, seed: SEED, rollouts: vec![] };
    for &length in lengths {
        let part = |tokens: &Array3<f32>| tokens.slice(s![.., ..length, ..]).to_owned();
        let mut rollout = compare(&part(&found), &part(&expected), atol);
        if rollout.first_not_finite.is_none() {
            rollout.image = images(&engine, reference, &part(&found), &part(&expected))?;
            rollout.passed &= rollout.image.is_some();
        }
        progress(&rollout.line(atol));
        drift.rollouts.push(rollout);
    }
    Ok(drift)
}

/// Tokens `[1, N, E]` of a guided rollout; those after one that is not finite stay 0.
fn rollout(engine: &dyn Engine, length: usize, steps: usize) -> Result<Array3<f32>> {
    let generator = &engine.config().generator;
    let timesteps = timesteps(steps);
    let mut random = TorchRng::new(SEED);
    let mut tokens = Array3::zeros((1, length, generator.embed));
    let (mut session, mut z) = engine.start(&[0, generator.unconditional() as i64])?;
    for index in 0..length {
        if index > 0 {
            let last = tokens.index_axis(Axis(1), index - 1);
            z = session.step(concatenate![Axis(0), last, last].view(), &[index as i64 - 1; 2])?;
        }
        let noise = ndarray::Array1::from(random.randn(generator.embed));
        let token: Array2<f32> = engine.sample(z.view(), noise.insert_axis(Axis(0)).view(), &[CFG], &timesteps)?;
        tokens.index_axis_mut(Axis(1), index).assign(&token);
        if token.iter().any(|value| !value.is_finite()) {
            break;
        }
    }
    Ok(tokens)
}

fn compare(found: &Array3<f32>, expected: &Array3<f32>, atol: f32) -> Rollout {
    let tokens = found.dim().1;
    let finite = |index: &usize| found.index_axis(Axis(1), *index).iter().all(|value| value.is_finite());
    let first_not_finite = (0..tokens).find(|index| !finite(index));
    let relative = |(found, expected): (&f32, &f32)| (found - expected).abs() / expected.abs().max(1.0);
    let differences: Vec<f32> = found.iter().zip(expected).map(relative).collect();
    let largest = differences.iter().copied().fold(0.0, f32::max);
    let mean = differences.iter().sum::<f32>() / differences.len() as f32;
    let all = first_not_finite.is_none();
    Rollout {
        tokens,
        first_not_finite,
        largest: all.then_some(largest),
        mean: all.then_some(mean),
        image: None,
        passed: all && largest <= atol,
    }
}

/// Decodes both, each with its own engine; `None` when a pixel is not finite.
fn images(
    engine: &dyn Engine,
    reference: &dyn Engine,
    found: &Array3<f32>,
    expected: &Array3<f32>,
) -> Result<Option<ImageDrift>> {
    let norm = reference.config().generator.vae_norm as f32;
    let decode = |engine: &dyn Engine, tokens: ArrayView3<f32>| engine.decode((&tokens / norm).view());
    let (found, expected) = (decode(engine, found.view())?, decode(reference, expected.view())?);
    if found.iter().any(|value| !value.is_finite()) {
        return Ok(None);
    }
    let levels = |(found, expected): (&f32, &f32)| to_byte(*found).abs_diff(to_byte(*expected));
    let levels: Vec<u8> = found.iter().zip(&expected).map(levels).collect();
    let count = levels.len() as f64;
    let sum: u64 = levels.iter().map(|&level| u64::from(level)).sum();
    let squares: u64 = levels.iter().map(|&level| u64::from(level).pow(2)).sum();
    let psnr = (squares > 0).then(|| 10.0 * (255.0f64.powi(2) * count / squares as f64).log10());
    Ok(Some(ImageDrift {
        largest: levels.into_iter().max().unwrap_or_default(),
        mean: (sum as f64 / count) as f32,
        psnr: psnr.map(|psnr| psnr as f32),
    }))
}

impl Drift {
    /// Whether every length passed.
    pub fn passed(&self) -> bool {
        self.rollouts.iter().all(|rollout| rollout.passed)
    }
}

impl Rollout {
    /// The line that says it, as optimum does.
    pub fn line(&self, atol: f32) -> String {
        let mark = if self.passed { '✓' } else { 'x' };
        let what = format!("\t-[{mark}] rollout of {} tokens", self.tokens);
        if let Some(token) = self.first_not_finite {
            return format!("{what}: token {token} is not finite (overflow)");
        }
        let (largest, mean) = (self.largest.unwrap_or_default(), self.mean.unwrap_or_default());
        let tokens = format!("tokens within {largest:.1e} (mean {mean:.1e}, atol: {atol:.0e})");
        let Some(image) = &self.image else {
            return format!("{what}: {tokens}; its image has values that are not finite (overflow)");
        };
        let psnr = image.psnr.map_or("equal".into(), |psnr| format!("PSNR {psnr:.1} dB"));
        format!("{what}: {tokens}, image within {} of 255 (mean {:.4}, {psnr})", image.largest, image.mean)
    }
}
