//! Validates that a bundle computes the same as the model: compares ONNX Runtime with Candle in FP32, for each graph
//! alone and for whole rollouts.

use std::path::Path;

use candle_core::{Device, Tensor};
use eqim::bundle::{Bundle, Precision};
use eqim::close::{Measure, Tolerance, difference, largest, relative_error};
use eqim::engine::Engine;
use eqim::engine::candle::{CandleEngine, StageEngine, tableau_tensors, to_array};
use eqim::generate::generate;
use eqim::model::{Sizes, Stage, ValueInfo, ValueKind, transformer};
use eqim::ops::eager::Eager;
use eqim::request::random::TorchRng;
use eqim::request::solver::{Solver, Tableau};
use eqim::request::{Noise, Request};
use eqim::{Config, Result, ResultExt};
use eqim_calibration::{Preview, Ranges};
use eqim_engines::onnxruntime::{
    DynValue, GraphOptions, OrtEngine, Providers, Runtime, float_input, float_output, integer_input,
};
use half::f16;
use ndarray::{Array2, Array3, ArrayD, Axis as ArrayAxis, IxDyn, s};
use serde::Serialize;

/// Default tolerance of the differences between values.
pub fn default_tolerance(precision: Precision) -> f32 {
    match precision {
        Precision::Fp32 => Tolerance::FP32.limit,
        Precision::Fp16 | Precision::Bf16 => Tolerance::FP16.limit,
    }
}

/// Tolerance of graphs in INT8 against their preview, as a multiple of the error of the preview against FP32.
///
/// Two sums that differ in the last place can round to neighbouring levels. A difference of one level changes the
/// inputs of the next product. After about ten products in sequence, the two results are as far apart as two
/// independent roundings, which is √2 times the error of INT8 itself. Tests compare every product by itself, where
/// differences cannot accumulate.
const PREVIEW_TOLERANCE: f32 = 2.0;

/// Result of one comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Name of the compared value, as the subject of a sentence.
    pub what: String,
    /// Largest difference, `|found - expected| / max(1, |expected|)`; infinite if a value is not finite.
    pub largest: f32,
    /// The first token whose difference exceeds the tolerance, for rollouts that fail.
    pub first_token: Option<usize>,
    /// Whether the difference is within the tolerance.
    pub passed: bool,
}

/// Results of all comparisons of a bundle.
#[derive(Clone, Debug, Serialize)]
pub struct ValidationReport {
    /// Tolerance of the comparisons.
    pub atol: f32,
    /// Comparisons in the order in which they were made.
    pub checks: Vec<Check>,
    /// Scope and value of the largest activation in FP32; only for FP16 graphs.
    pub largest_activation: Option<(String, f32)>,
}

impl ValidationReport {
    /// Whether every comparison passed, and the largest activation is well below the maximum of FP16.
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.passed) && self.within_range()
    }

    fn within_range(&self) -> bool {
        self.largest_activation.as_ref().is_none_or(|(_, largest)| *largest <= MOST_FP16)
    }

    fn range_line(&self) -> Option<String> {
        let (scope, largest) = self.largest_activation.as_ref()?;
        let mark = if self.within_range() { '✓' } else { 'x' };
        Some(format!("\t-[{mark}] largest activation {largest:.1} in {scope}, the maximum of FP16 is {}", f16::MAX))
    }
}

impl Check {
    /// The result as a line of text, in the format of optimum.
    pub fn line(&self, atol: f32) -> String {
        if self.passed {
            return format!(
                "\t-[✓] {}: all values close (max diff: {:.1e}, atol: {atol:.0e})",
                self.what, self.largest
            );
        }
        let token = self.first_token.map_or(String::new(), |token| format!(", first diverging token: {token}"));
        format!(
            "\t-[x] {}: values not close enough, max diff: {:.3e} (atol: {atol:.0e}{token})",
            self.what, self.largest
        )
    }
}

// Enough rows and tokens to run every code path, and small enough for the largest model.
const ROWS: usize = 2;
const IMAGE_TOKENS: usize = 3;
const MOST_STEPS: usize = 8;
const SEED: u64 = 20;

/// Largest activation that FP16 graphs may have on random inputs: a quarter of the FP16 range, because the inputs of a
/// real run can be larger.
pub(crate) const MOST_FP16: f32 = 16384.0;

/// Compares a bundle on ONNX Runtime with `reference`. `progress` receives a line of text after every comparison.
///
/// # Errors
/// If an engine fails. Differences are not errors. They are recorded in the report.
pub fn validate(
    bundle: &Bundle,
    reference: &CandleEngine,
    library: &Path,
    atol: f32,
    mut progress: impl FnMut(&str),
) -> Result<ValidationReport> {
    let runtime = Runtime::load(library, None)?;
    let mut checks = vec![];
    let mut add = |progress: &mut dyn FnMut(&str), check: Check| {
        progress(&check.line(atol));
        checks.push(check);
    };
    let mut random = TorchRng::new(SEED);
    let mut ranges = Ranges::default();
    for stage in Stage::ALL {
        for check in graph_alone(bundle, reference, runtime, stage, atol, &mut random, &mut ranges)? {
            add(&mut progress, check);
        }
    }
    let engine = OrtEngine::new(bundle, library, None, &Providers::default())?;
    let (rollout, tokens) = guided_rollout(&engine, reference, atol)?;
    add(&mut progress, rollout);
    add(&mut progress, cache_is_no_cache(&engine, reference, &tokens, atol)?);
    let largest = ranges.largest().map(|(scope, largest)| (scope.to_string(), largest));
    let largest_activation = largest.filter(|_| bundle.manifest.precision == Precision::Fp16);
    let report = ValidationReport { atol, checks, largest_activation };
    report.range_line().iter().for_each(|line| progress(line));
    Ok(report)
}

fn check(what: String, found: &ArrayD<f32>, expected: &ArrayD<f32>, atol: f32) -> Check {
    let largest =
        if found.shape() == expected.shape() { difference(found, expected, Measure::Scaled) } else { f32::INFINITY };
    Check { what, largest, first_token: None, passed: largest <= atol }
}

/// Compares whole rollouts `[B, N, width]`, token by token.
fn check_rollout(what: String, found: &Array3<f32>, expected: &Array3<f32>, atol: f32) -> Check {
    let token = |i| {
        let [found, expected] = [found, expected].map(|tokens| tokens.index_axis(ArrayAxis(1), i));
        difference(found, expected, Measure::Scaled)
    };
    let first_token = (0..expected.dim().1).find(|&i| token(i) > atol);
    let largest = difference(found, expected, Measure::Scaled);
    Check { what, largest, first_token, passed: first_token.is_none() }
}

/// Random values for an input of a stage.
fn random_input(config: &Config, stage: Stage, info: &ValueInfo, random: &mut TorchRng) -> Result<Tensor> {
    let (width, _) = config.image_size(IMAGE_TOKENS);
    let sizes = Sizes { batch: ROWS, rows: 2 * ROWS, evaluations: MOST_STEPS, tokens: IMAGE_TOKENS, width };
    let shape = info.shape(&sizes);
    let count = shape.iter().product();
    let window = config.generator.window as i64;
    Ok(match (stage, info.name.as_str()) {
        // One row's window is not full yet, the other row's is. One row has a class, the other has none.
        (Stage::Step, "position") => Tensor::new(&[1, window + 2], &Device::Cpu)?,
        (Stage::Prefill, _) => Tensor::new(&[0, config.generator.unconditional() as i64], &Device::Cpu)?,
        // The updates of this solver use `x`, `p` and `v`.
        (_, "times") => tableau_tensors(&Tableau::new(Solver::Ab2, MOST_STEPS))?[0].clone(),
        (_, "updates") => tableau_tensors(&Tableau::new(Solver::Ab2, MOST_STEPS))?[1].clone(),
        _ => Tensor::from_vec(random.randn(count), shape, &Device::Cpu)?,
    })
}

fn graph_alone(
    bundle: &Bundle,
    reference: &CandleEngine,
    runtime: Runtime,
    stage: Stage,
    atol: f32,
    random: &mut TorchRng,
    ranges: &mut Ranges,
) -> Result<Vec<Check>> {
    let config = &bundle.manifest.model;
    let infos = stage.inputs(config);
    let inputs = infos.iter().map(|info| random_input(config, stage, info, random)).collect::<Result<Vec<_>>>()?;
    let expected = ranges.observe(reference.weights(), |o| stage.run(o, config, &inputs))?;
    let found = on_runtime(bundle, runtime, stage, &inputs)?;

    let mut checks = vec![];
    let mut caches: Option<Check> = None;
    for ((info, expected), found) in stage.outputs(config).iter().zip(&expected).zip(&found) {
        let subject = format!("{}.onnx {}", stage.name(), info.name);
        let check = check(subject, &float_output(found)?, &to_array(expected)?, atol);
        if info.kind != ValueKind::Cache || !check.passed {
            checks.push(check);
        } else if caches.as_ref().is_none_or(|worst| check.largest > worst.largest) {
            let what = format!("{}.onnx, all keys and values", stage.name());
            caches = Some(Check { what, ..check });
        }
    }
    checks.extend(caches);
    Ok(checks)
}

/// Runs a stage's graph on ONNX Runtime. The inputs are Candle tensors.
fn on_runtime(bundle: &Bundle, runtime: Runtime, stage: Stage, inputs: &[Tensor]) -> Result<Vec<DynValue>> {
    let graph = runtime.graph(&bundle.graph_path(stage)?, GraphOptions::default())?;
    let values = stage
        .inputs(&bundle.manifest.model)
        .iter()
        .zip(inputs)
        .map(|(info, input)| match (info.kind, bundle.manifest.precision) {
            (ValueKind::Integer, _) => Ok(integer_input(&input.to_vec1::<i64>()?)?.into()),
            (ValueKind::Cache, Precision::Fp16) => {
                let array: ArrayD<f32> = to_array(input)?;
                Ok(eqim_engines::onnxruntime::half_input(array.mapv(f16::from_f32))?.into())
            }
            _ => Ok(float_input::<ndarray::IxDyn>(to_array(input)?.view())?.into()),
        })
        .collect::<Result<Vec<_>>>()?;
    graph.run(&values)
}

/// Comparison of a graph in INT8 with its preview.
#[derive(Clone, Copy, Debug)]
pub struct PreviewCheck {
    /// Stage of the graph.
    pub stage: Stage,
    /// Relative error of the graph's outputs against the preview's outputs.
    pub error: f32,
    /// Relative error of the FP32 outputs against the preview's outputs: the error of INT8 itself.
    pub own: f32,
    /// Whether the graph's outputs are within the tolerance of the preview's outputs.
    pub passed: bool,
}

impl PreviewCheck {
    fn line(&self) -> String {
        let (mark, name) = (if self.passed { '✓' } else { 'x' }, self.stage.name());
        format!("\t-[{mark}] {name}.onnx: {:.1e} from the preview, which is {:.1e} from FP32", self.error, self.own)
    }
}

/// Compares every graph of a bundle in INT8 with the preview, on the same inputs. `progress` receives a line of text
/// after every comparison.
///
/// # Errors
/// If an engine fails. Differences are not errors. They are recorded in the checks.
pub fn validate_preview(
    bundle: &Bundle,
    preview: &StageEngine<Preview>,
    reference: &CandleEngine,
    library: &Path,
    mut progress: impl FnMut(&str),
) -> Result<Vec<PreviewCheck>> {
    let runtime = Runtime::load(library, None)?;
    let config = &bundle.manifest.model;
    let floor = default_tolerance(bundle.manifest.precision);
    let mut random = TorchRng::new(SEED);
    let mut checks = vec![];
    for stage in Stage::ALL {
        let infos = stage.inputs(config);
        let inputs = infos.iter().map(|info| random_input(config, stage, info, &mut random));
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let arrays = |outputs: Vec<Tensor>| outputs.iter().map(to_array::<IxDyn>).collect::<Result<Vec<_>>>();
        let expected = arrays(preview.run(stage, &inputs)?)?;
        let exact = arrays(reference.run(stage, &inputs)?)?;
        let found = on_runtime(bundle, runtime, stage, &inputs)?;
        let found = found.iter().map(float_output::<IxDyn>).collect::<Result<Vec<_>>>()?;
        let (error, own) = (worst(&found, &expected), worst(&exact, &expected));
        let check = PreviewCheck { stage, error, own, passed: error <= floor.max(PREVIEW_TOLERANCE * own) };
        progress(&check.line());
        checks.push(check);
    }
    Ok(checks)
}

/// Largest relative error of a stage's outputs; infinite if a value is not finite.
fn worst(found: &[ArrayD<f32>], expected: &[ArrayD<f32>]) -> f32 {
    let error = |(found, expected): (&ArrayD<f32>, &ArrayD<f32>)| {
        if found.shape() == expected.shape() { relative_error(found, expected) } else { f32::INFINITY }
    };
    largest(&found.iter().zip(expected).map(error).collect::<Vec<_>>())
}

/// Compares a rollout of a guided batch on both engines, from the same seed. It is longer than the window, so that
/// tokens leave the cache.
fn guided_rollout(engine: &dyn Engine, reference: &CandleEngine, atol: f32) -> Result<(Check, Array3<f32>)> {
    let generator = &reference.config().generator;
    let request = Request {
        cfg: 3.0,
        steps: generator.steps.min(MOST_STEPS),
        noise: Noise::Seed(SEED),
        ..Request::new(reference.config(), [Some(0), None], 2 * generator.window + 3)
    };
    let expected = generate(reference, &request, |_| {})?.tokens;
    let found = generate(engine, &request, |_| {})?.tokens;
    let what = format!("rollout of {} tokens, window {}, cfg {}", request.tokens, generator.window, request.cfg);
    Ok((check_rollout(what, &found, &expected, atol), expected))
}

/// Compares the bundle's steps, which use the cache, with Candle on the whole sequence at once, without a cache.
fn cache_is_no_cache(engine: &dyn Engine, reference: &CandleEngine, tokens: &Array3<f32>, atol: f32) -> Result<Check> {
    let generator = &reference.config().generator;
    let (rows, n, embed) = tokens.dim();
    let labels = vec![0, generator.unconditional() as i64];
    let whole = {
        let flat = Tensor::from_vec(tokens.iter().copied().collect::<Vec<f32>>(), (rows * n, embed), &Device::Cpu)?;
        let labels = Tensor::from_slice(&labels, rows, &Device::Cpu)?;
        let o = &mut Eager::new(reference.weights());
        let z: Array2<f32> = to_array(&transformer::teacher_forced(o, generator, &labels, &flat, n, 0)?)?;
        z.into_shape_with_order((rows, n, generator.dim)).or_run("z")?
    };
    let mut cached = Array3::zeros(whole.dim());
    let (mut session, z) = engine.start(&labels)?;
    cached.slice_mut(s![.., 0, ..]).assign(&z);
    for i in 1..n {
        let z = session.step(tokens.index_axis(ArrayAxis(1), i - 1), &vec![i as i64 - 1; rows])?;
        cached.slice_mut(s![.., i, ..]).assign(&z);
    }
    Ok(check_rollout(format!("cache of {} against no cache, {n} tokens", generator.window), &cached, &whole, atol))
}
