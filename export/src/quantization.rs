//! Measures the quality and speed of a model in INT8 against FP32, from the same noise.

use std::path::Path;
use std::time::{Duration, Instant};

use eqim::bundle::{Bundle, Int8Target, Precision};
use eqim::close::{largest, largest_difference, relative_error};
use eqim::engine::Engine;
use eqim::generate::generate;
use eqim::model::Stage;
use eqim::picture::quality::{cosine, psnr, ssim};
use eqim::request::solver::{Solver, Tableau};
use eqim::request::timing::median;
use eqim::request::{Generated, GuidanceSchedule, Noise, Request};
use eqim::{Config, Error, Result};
use eqim_engines::onnxruntime::{OrtEngine, Providers};
use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView3, Axis, concatenate, s};
use serde::{Deserialize, Serialize};

/// Number of images that must reach the minimum PSNR, each with its own class and seed, and their length in tokens (the
/// length of a published image).
const IMAGES: usize = 4;
const TOKENS: usize = 16;
/// Lengths that drift is measured over, in tokens.
const LENGTHS: [usize; 3] = [16, 64, LONGEST];
const LONGEST: usize = 256;
/// Classifier-free guidance: at the last token of the images, and at every token of the long rollout, so that a shorter
/// rollout is the beginning of a longer one.
const CFG: f32 = 3.0;
/// Seed of the first image. Calibration does not use it by default.
const SEED: u64 = 1_000_003;

/// Quality and speed of a bundle in INT8.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizationReport {
    /// Whether the images reach the minimum PSNR, a stage is in INT8, and nothing in INT8 is slower than in FP32.
    pub passed: bool,
    /// The result as a sentence, which begins the text of the report.
    pub verdict: String,
    /// Target of the graphs.
    #[serde(alias = "flavour")]
    pub target: Int8Target,
    /// Precision of everything that is not in INT8.
    pub precision: Precision,
    /// Minimum PSNR of an image of 16 tokens that passes, dB.
    pub min_psnr: f32,
    /// Classifier-free guidance of the rollouts.
    pub cfg: f32,
    /// Euler steps per token.
    pub steps: usize,
    /// Quality of the images of 16 tokens.
    pub images: Vec<ImageQuality>,
    /// Quality of one long rollout, over its beginnings of several lengths.
    pub rollouts: Vec<RolloutQuality>,
    /// Quality of the tokens of the long rollout, by position.
    pub positions: Vec<TokenQuality>,
    /// Quality and speed of the stages, in the order in which they run.
    pub stages: Vec<StageQuality>,
    /// Median time of a guided image of 16 tokens, from labels to pixels; only if the target is a CPU, on which the
    /// times are measured.
    pub end_to_end: Option<SpeedPair>,
    /// Size of the graphs and weights.
    pub bytes: Sizes,
}

/// Quality of one image of 16 tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageQuality {
    /// Class of the image.
    pub class: usize,
    /// Seed of the noise.
    pub seed: u64,
    /// Relative error of the tokens.
    pub relative_error: f32,
    /// PSNR of the image, dB; `null` if the images are equal.
    pub psnr: Option<f32>,
    /// Structural similarity of the image.
    pub ssim: f32,
}

/// Quality of the beginning of the long rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutQuality {
    /// Length of the beginning in tokens.
    pub tokens: usize,
    /// Relative error of the tokens.
    pub relative_error: f32,
    /// Largest absolute difference of a token's value.
    pub largest_drift: f32,
    /// Largest absolute value of the tokens in FP32.
    pub largest_value: f32,
    /// PSNR of the image, dB; `null` if the images are equal.
    pub psnr: Option<f32>,
    /// Structural similarity of the image.
    pub ssim: f32,
}

/// Quality of one token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenQuality {
    /// Position of the token.
    pub token: usize,
    /// Cosine similarity to the token in FP32.
    pub cosine: f32,
    /// `‖int8 - fp32‖ / ‖fp32‖`.
    pub relative_error: f32,
}

/// Quality and speed of one stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageQuality {
    /// Name of the stage.
    pub stage: String,
    /// Whether any part of the stage is in INT8.
    pub int8: bool,
    /// Relative error of the outputs, on the inputs that the stage has in FP32 in an image of 16 tokens.
    pub relative_error: f32,
    /// Median time of one run for a guided image, if it was measured.
    pub times: Option<SpeedPair>,
    /// Times of the trial in INT8, if INT8 was requested but the speedup was below [`LEAST_SPEEDUP`].
    pub gained_nothing: Option<SpeedPair>,
}

/// Times of the same work, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpeedPair {
    /// Time in FP32.
    pub fp32: f64,
    /// Time in INT8.
    pub int8: f64,
}

impl SpeedPair {
    /// Speedup of INT8 over FP32.
    pub fn speedup(self) -> f64 {
        self.fp32 / self.int8
    }
}

/// Sizes of two bundles, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizes {
    /// Size in FP32.
    pub fp32: u64,
    /// Size in INT8.
    pub int8: u64,
}

/// Minimum speedup of a stage in INT8. A smaller speedup is measurement noise.
pub const LEAST_SPEEDUP: f64 = 1.05;

/// A bundle in FP32 and a bundle of the same model in INT8, on ONNX Runtime.
pub struct Pair {
    fp32: OrtEngine,
    int8: OrtEngine,
    bundles: [Bundle; 2],
}

impl Pair {
    /// Loads both bundles.
    ///
    /// # Errors
    /// [`Error::run`] if ONNX Runtime cannot load a bundle.
    pub fn load(fp32: &Bundle, int8: &Bundle, library: &Path) -> Result<Self> {
        Ok(Self {
            fp32: OrtEngine::new(fp32, library, None, &Providers::default())?,
            int8: OrtEngine::new(int8, library, None, &Providers::default())?,
            bundles: [fp32.clone(), int8.clone()],
        })
    }

    /// The bundle in INT8.
    fn bundle(&self) -> &Bundle {
        &self.bundles[1]
    }

    /// Whether any part of a stage is in INT8.
    fn is_int8(&self, stage: Stage) -> bool {
        let quantization = &self.bundle().manifest.quantization;
        quantization.as_ref().is_some_and(|found| found.stages.iter().any(|name| name == stage.name()))
    }

    /// Measures the time of every stage that is in INT8. Runs in FP32 and in INT8 alternate.
    ///
    /// # Errors
    /// If an engine fails.
    pub fn stage_times(&self) -> Result<Vec<(Stage, SpeedPair)>> {
        let stages = Stage::ALL.into_iter().filter(|&stage| self.is_int8(stage));
        stages.map(|stage| Ok((stage, self.times(|engine| work(engine, stage))?))).collect()
    }

    /// Median times of `work`. Runs in FP32 and in INT8 alternate.
    fn times(&self, work: impl Fn(&OrtEngine) -> Result<Duration>) -> Result<SpeedPair> {
        // The first runs allocate memory and are not timed.
        work(&self.fp32)?;
        work(&self.int8)?;
        let (mut fp32, mut int8) = (vec![], vec![]);
        let start = Instant::now();
        while fp32.len() < LEAST_RUNS || (fp32.len() < MOST_RUNS && start.elapsed() < TIMED) {
            fp32.push(work(&self.fp32)?.as_secs_f64());
            int8.push(work(&self.int8)?.as_secs_f64());
        }
        Ok(SpeedPair { fp32: median(&mut fp32), int8: median(&mut int8) })
    }
}

const LEAST_RUNS: usize = 3;
const MOST_RUNS: usize = 200;
const TIMED: Duration = Duration::from_secs(4);

/// Measures the time of one run of a stage, with the inputs of one guided image.
fn work(engine: &OrtEngine, stage: Stage) -> Result<Duration> {
    let config = engine.config();
    let g = &config.generator;
    let labels = [0, g.unconditional() as i64];
    let wave = |i: usize| (i as f32).sin();
    let tokens = Array3::from_shape_fn((1, TOKENS, g.embed), |(_, n, e)| wave(n * g.embed + e));
    let rows = |width: usize| Array2::from_shape_fn((2, width), |(row, i)| wave(row * width + i));
    match stage {
        Stage::Prefill => timed(|| engine.start(&labels)),
        Stage::Step => {
            let (mut session, _) = engine.start(&labels)?;
            timed(|| session.step(rows(g.embed).view(), &[g.window as i64; 2]))
        }
        Stage::Flow => {
            let tableau = Tableau::new(Solver::Euler, g.steps);
            let noise = rows(g.embed);
            timed(|| engine.sample(rows(g.dim).view(), noise.slice(s![..1, ..]), &[CFG], &tableau))
        }
        Stage::Decoder => timed(|| engine.decode((&tokens / g.vae_norm as f32).view())),
        Stage::Encoder => {
            let (width, height) = config.image_size(TOKENS);
            let shape = (1, config.tokenizer.image_channels, height, width);
            let image = Array4::from_shape_fn(shape, |(_, c, y, x)| wave(c + y + x));
            timed(|| engine.encode(image.view()))
        }
    }
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

fn request(config: &Config, class: usize, tokens: usize, cfg_schedule: GuidanceSchedule, seed: u64) -> Request {
    Request { cfg: CFG, cfg_schedule, noise: Noise::Seed(seed), ..Request::new(config, [Some(class)], tokens) }
}

fn decode(engine: &dyn Engine, tokens: ArrayView3<f32>) -> Result<Array4<f32>> {
    engine.decode_tokens(tokens)
}

/// Settings of a report.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Minimum PSNR of an image of 16 tokens that passes, dB.
    pub min_psnr: f32,
    /// Stages that were tried in INT8 and had a speedup below [`LEAST_SPEEDUP`], with the times of the trial.
    pub gained_nothing: Vec<(Stage, SpeedPair)>,
}

/// Measures the quality and speed of INT8. `progress` receives the name of every measurement before it begins.
///
/// # Errors
/// If an engine fails or a token is not finite.
pub fn measure(pair: &Pair, settings: &Settings, mut progress: impl FnMut(&str)) -> Result<QuantizationReport> {
    let manifest = &pair.bundle().manifest;
    let quantization = manifest.quantization.as_ref();
    let quantization = quantization.ok_or_else(|| Error::run("report", "the bundle is not in INT8"))?;
    let steps = manifest.model.generator.steps;
    progress("images of 16 tokens");
    let images = (0..IMAGES).map(|i| image(pair, i % manifest.model.generator.class_num, SEED + i as u64));
    let images = images.collect::<Result<Vec<_>>>()?;
    progress(&format!("a rollout of {LONGEST} tokens"));
    let (rollouts, positions) = long_rollout(pair)?;

    // The times on this CPU say nothing about graphs that a GPU will run.
    let is_timed = quantization.target == Int8Target::Cpu;
    if is_timed {
        progress("times");
    }
    let times = if is_timed { pair.stage_times()? } else { vec![] };
    let end_to_end = || {
        pair.times(|engine| {
            timed(|| {
                decode(
                    engine,
                    generate(engine, &request(engine.config(), 0, TOKENS, GuidanceSchedule::Linear, SEED), |_| {})?
                        .tokens
                        .view(),
                )
            })
        })
    };
    let end_to_end = if is_timed { Some(end_to_end()?) } else { None };
    let of = |times: &[(Stage, SpeedPair)], stage| times.iter().find(|(of, _)| *of == stage).map(|(_, times)| *times);
    let errors = stage_errors(pair, steps)?;
    let stage = |(stage, relative_error): (Stage, f32)| StageQuality {
        stage: stage.name().into(),
        int8: pair.is_int8(stage),
        relative_error,
        times: of(&times, stage),
        gained_nothing: of(&settings.gained_nothing, stage),
    };
    let mut report = QuantizationReport {
        passed: true,
        verdict: String::new(),
        target: quantization.target,
        precision: manifest.precision,
        min_psnr: settings.min_psnr,
        cfg: CFG,
        steps,
        images,
        rollouts,
        positions,
        stages: errors.into_iter().map(stage).collect(),
        end_to_end,
        bytes: Sizes { fp32: bytes(&pair.bundles[0]), int8: bytes(&pair.bundles[1]) },
    };
    (report.passed, report.verdict) = report.judge();
    Ok(report)
}

/// Relative error of every stage, on the inputs that it has in FP32, in the order in which the stages run.
fn stage_errors(pair: &Pair, steps: usize) -> Result<Vec<(Stage, f32)>> {
    let config = pair.fp32.config();
    let labels = [0, config.generator.unconditional() as i64];
    let request = request(config, 0, TOKENS, GuidanceSchedule::Constant, SEED);
    let Generated { tokens, noise, .. } = generate(&pair.fp32, &request, |_| {})?;
    let tableau = Tableau::new(Solver::Euler, steps);
    let conditions = |engine: &OrtEngine| {
        let (mut session, z) = engine.start(&labels)?;
        let mut all = vec![z];
        for (position, token) in tokens.axis_iter(Axis(1)).take(TOKENS - 1).enumerate() {
            all.push(session.step(concatenate![Axis(0), token, token].view(), &[position as i64; 2])?);
        }
        Ok::<_, Error>(all)
    };
    let (z_fp32, z_int8) = (conditions(&pair.fp32)?, conditions(&pair.int8)?);
    let sampled = |engine: &OrtEngine| {
        let sample = |(z, noise): (&Array2<f32>, ArrayView2<f32>)| engine.sample(z.view(), noise, &[CFG], &tableau);
        z_fp32.iter().zip(noise.axis_iter(Axis(1))).map(sample).collect::<Result<Vec<_>>>()
    };
    let image = decode(&pair.fp32, tokens.view())?;
    let joined = |arrays: &[Array2<f32>]| arrays.iter().flatten().copied().collect::<Vec<f32>>();
    let error = |found: &[Array2<f32>], expected: &[Array2<f32>]| relative_error(&joined(found), &joined(expected));
    Ok(vec![
        (Stage::Prefill, error(&z_int8[..1], &z_fp32[..1])),
        (Stage::Step, error(&z_int8[1..], &z_fp32[1..])),
        (Stage::Flow, error(&sampled(&pair.int8)?, &sampled(&pair.fp32)?)),
        (Stage::Decoder, relative_error(&decode(&pair.int8, tokens.view())?, &image)),
        (Stage::Encoder, relative_error(&pair.int8.encode(image.view())?, &pair.fp32.encode(image.view())?)),
    ])
}

fn image(pair: &Pair, class: usize, seed: u64) -> Result<ImageQuality> {
    let run = |engine: &OrtEngine| {
        let tokens =
            generate(engine, &request(engine.config(), class, TOKENS, GuidanceSchedule::Linear, seed), |_| {})?.tokens;
        let image = decode(engine, tokens.view())?;
        Ok::<_, Error>((tokens, image))
    };
    let ((expected, reference), (found, image)) = (run(&pair.fp32)?, run(&pair.int8)?);
    Ok(ImageQuality {
        class,
        seed,
        relative_error: relative_error(&found, &expected),
        psnr: psnr(image.view(), reference.view()),
        ssim: ssim(image.view(), reference.view()),
    })
}

fn long_rollout(pair: &Pair) -> Result<(Vec<RolloutQuality>, Vec<TokenQuality>)> {
    let request = request(pair.fp32.config(), 0, LONGEST, GuidanceSchedule::Constant, SEED);
    let expected = generate(&pair.fp32, &request, |_| {})?.tokens;
    let found = generate(&pair.int8, &request, |_| {})?.tokens;
    let rollout = |tokens: usize| {
        let [found, expected] = [&found, &expected].map(|all| all.slice(s![.., ..tokens, ..]));
        let (image, reference) = (decode(&pair.int8, found)?, decode(&pair.fp32, expected)?);
        Ok(RolloutQuality {
            tokens,
            relative_error: relative_error(found, expected),
            largest_drift: largest_difference(found, expected),
            largest_value: largest(expected),
            psnr: psnr(image.view(), reference.view()),
            ssim: ssim(image.view(), reference.view()),
        })
    };
    let position = |token: usize| {
        let [found, expected] = [&found, &expected].map(|all| all.slice(s![0, token, ..]));
        TokenQuality { token, cosine: cosine(found, expected), relative_error: relative_error(found, expected) }
    };
    let rollouts = LENGTHS.into_iter().map(rollout).collect::<Result<_>>()?;
    Ok((rollouts, (0..found.len_of(Axis(1))).map(position).collect()))
}

fn bytes(bundle: &Bundle) -> u64 {
    let graphs = bundle.manifest.graphs.values().map(|graph| graph.file.bytes);
    graphs.sum::<u64>() + bundle.manifest.weights.bytes
}

/// A PSNR as text. `None` means that the images are equal.
pub fn decibels(psnr: Option<f32>) -> String {
    psnr.map_or("equal".into(), |psnr| format!("{psnr:.1} dB"))
}

impl QuantizationReport {
    /// Lowest PSNR of the images of 16 tokens; `None` if all images are equal.
    pub fn worst_psnr(&self) -> Option<f32> {
        self.images.iter().filter_map(|image| image.psnr).min_by(f32::total_cmp)
    }

    fn judge(&self) -> (bool, String) {
        let mut faults = vec![];
        if let Some(psnr) = self.worst_psnr().filter(|psnr| *psnr < self.min_psnr) {
            faults.push(format!(
                "an image of 16 tokens is {psnr:.1} dB from FP32's, below the floor of {}",
                self.min_psnr
            ));
        }
        if !self.stages.iter().any(|stage| stage.int8) {
            faults.push("no stage is faster in INT8".into());
        }
        for stage in &self.stages {
            if let Some(times) = stage.times.filter(|times| times.speedup() < 1.0) {
                faults.push(format!("{} is slower, {:.2} times as fast as FP32", stage.stage, times.speedup()));
            }
        }
        if let Some(times) = self.end_to_end.filter(|times| times.speedup() < 1.0) {
            faults.push(format!("an image is slower, {:.2} times as fast as FP32", times.speedup()));
        }
        if !faults.is_empty() {
            return (false, format!("INT8 fails: {}", faults.join("; ")));
        }
        let quality = format!("images of 16 tokens within {} of FP32's", decibels(self.worst_psnr()));
        let speed =
            self.end_to_end.map_or("the speed was not measured, since this target needs a GPU".into(), |times| {
                format!("an image {:.2} times as fast", times.speedup())
            });
        (true, format!("INT8 passes: {quality}, {speed}"))
    }
}
