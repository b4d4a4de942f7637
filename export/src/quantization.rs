//! What INT8 does to a model: quality and speed beside each other, against FP32 from the same noise.

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
use eqim_engines::onnxruntime::OrtEngine;
use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView3, Axis, concatenate, s};
use serde::{Deserialize, Serialize};

/// Images that the floor is asked of, each of its own class and seed, and their length: a published image.
const IMAGES: usize = 4;
const TOKENS: usize = 16;
/// Lengths that drift is measured over.
const LENGTHS: [usize; 3] = [16, 64, LONGEST];
const LONGEST: usize = 256;
/// Guidance: of the images at the last token, of the long rollout at every token, so that a shorter one is its beginning.
const CFG: f32 = 3.0;
/// Not among the seeds that calibration begins with.
const SEED: u64 = 1_000_003;

/// Quality and speed of a bundle in INT8.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizationReport {
    /// Whether quality is above the floor, and nothing in INT8 is slower.
    pub passed: bool,
    /// What is said first.
    pub verdict: String,
    /// What the graphs are for.
    #[serde(alias = "flavour")]
    pub target: Int8Target,
    /// Precision of what is not in INT8.
    pub precision: Precision,
    /// Least PSNR of an image of 16 tokens that passes, dB.
    pub min_psnr: f32,
    /// Guidance of the rollouts.
    pub cfg: f32,
    /// Euler steps a token.
    pub steps: usize,
    /// Images of 16 tokens.
    pub images: Vec<ImageQuality>,
    /// The beginnings of one long rollout.
    pub rollouts: Vec<RolloutQuality>,
    /// Its tokens, by position.
    pub positions: Vec<TokenQuality>,
    /// Stages, in the order of a run.
    pub stages: Vec<StageQuality>,
    /// A guided image of 16 tokens, from labels to pixels; where times are of the hardware that the target is for.
    pub end_to_end: Option<SpeedPair>,
    /// Bytes of graphs and weights.
    pub bytes: Sizes,
}

/// One image of 16 tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageQuality {
    /// Its class.
    pub class: usize,
    /// Seed of its noise.
    pub seed: u64,
    /// Relative error of its tokens.
    pub relative_error: f32,
    /// PSNR, dB; `null` for an equal image.
    pub psnr: Option<f32>,
    /// Structural similarity.
    pub ssim: f32,
}

/// The beginning of the long rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutQuality {
    /// Its length.
    pub tokens: usize,
    /// Relative error of all its tokens.
    pub relative_error: f32,
    /// Largest absolute difference of a token's value, and the largest value there is.
    pub largest_drift: f32,
    /// Largest absolute value of a token.
    pub largest_value: f32,
    /// PSNR of the image, dB; `null` for an equal image.
    pub psnr: Option<f32>,
    /// Structural similarity of the image.
    pub ssim: f32,
}

/// One token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenQuality {
    /// Its position.
    pub token: usize,
    /// Cosine to FP32's.
    pub cosine: f32,
    /// `‖int8 - fp32‖ / ‖fp32‖`.
    pub relative_error: f32,
}

/// One stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageQuality {
    /// Its name.
    pub stage: String,
    /// Whether anything of it is in INT8.
    pub int8: bool,
    /// Relative error of its outputs on the inputs that FP32 has in an image of 16 tokens.
    pub relative_error: f32,
    /// Median time of one run for a guided image, where it was measured.
    pub times: Option<SpeedPair>,
    /// Why it stayed as it was although INT8 was asked for: the times it was tried with.
    pub gained_nothing: Option<SpeedPair>,
}

/// Seconds of the same work.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpeedPair {
    /// In FP32.
    pub fp32: f64,
    /// In INT8.
    pub int8: f64,
}

impl SpeedPair {
    /// How many times as fast INT8 is.
    pub fn speedup(self) -> f64 {
        self.fp32 / self.int8
    }
}

/// Bytes of two bundles.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizes {
    /// In FP32.
    pub fp32: u64,
    /// In INT8.
    pub int8: u64,
}

/// A stage in INT8 has to be this many times as fast: less is noise.
pub const LEAST_SPEEDUP: f64 = 1.05;

/// A bundle in FP32 and one of the same model in INT8, on ONNX Runtime.
pub struct Pair {
    fp32: OrtEngine,
    int8: OrtEngine,
    bundles: [Bundle; 2],
}

impl Pair {
    /// Loads both.
    ///
    /// # Errors
    /// [`Error::run`] when ONNX Runtime refuses one.
    pub fn load(fp32: &Bundle, int8: &Bundle, library: &Path) -> Result<Self> {
        Ok(Self {
            fp32: OrtEngine::new(fp32, library, None)?,
            int8: OrtEngine::new(int8, library, None)?,
            bundles: [fp32.clone(), int8.clone()],
        })
    }

    /// The bundle in INT8.
    fn bundle(&self) -> &Bundle {
        &self.bundles[1]
    }

    /// Whether any of a stage is in INT8.
    fn is_int8(&self, stage: Stage) -> bool {
        let quantization = &self.bundle().manifest.quantization;
        quantization.as_ref().is_some_and(|found| found.stages.iter().any(|name| name == stage.name()))
    }

    /// SpeedPair every stage that is in INT8, alternately.
    ///
    /// # Errors
    /// When an engine fails.
    pub fn stage_times(&self) -> Result<Vec<(Stage, SpeedPair)>> {
        let stages = Stage::ALL.into_iter().filter(|&stage| self.is_int8(stage));
        stages.map(|stage| Ok((stage, self.times(|engine| work(engine, stage))?))).collect()
    }

    /// Median times of some work, alternately.
    fn times(&self, work: impl Fn(&OrtEngine) -> Result<Duration>) -> Result<SpeedPair> {
        // The first runs allocate.
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

/// SpeedPair one run of a stage as one guided image needs it.
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

/// How a report is made.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Least PSNR of an image of 16 tokens that passes, dB.
    pub min_psnr: f32,
    /// Stages that were tried in INT8 and left as they were, with the times of the trial.
    pub gained_nothing: Vec<(Stage, SpeedPair)>,
}

/// Measures what INT8 does, and shows what is being done to `progress`.
///
/// # Errors
/// When an engine fails, or a token is not finite.
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

    // SpeedPair of graphs that a GPU will run say nothing here.
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

/// What both engines' stages make of the inputs that they have in FP32: relative errors, in the order of a run.
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

/// A PSNR as text; images that are equal have none.
pub fn decibels(psnr: Option<f32>) -> String {
    psnr.map_or("equal".into(), |psnr| format!("{psnr:.1} dB"))
}

impl QuantizationReport {
    /// The least likeness of the images of 16 tokens; `None` when all are equal.
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
