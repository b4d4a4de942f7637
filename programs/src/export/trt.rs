//! `eqim-export trt`: builds TensorRT engines from a bundle.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{ArgGroup, Args};
use eqim::bundle::{Bundle, Int8Target, Precision};
use eqim::engine::candle::CandleEngine;
use eqim::model::Stage;
use eqim::weights::Weights;
use eqim::{Error, Result, files};
use eqim_cli::flags::tolerance;
use eqim_cli::{say, table};
use eqim_engines::native;
use eqim_engines::trt::{EngineRecord, EngineSet, FOLDER, Target};
use eqim_export::drift::{self, Drift};
use eqim_export::quantization::Pair;
use eqim_export::trt::{self, Limits, Shapes, Support};
use eqim_export::validate::default_tolerance;

use super::int8::{self, Int8};
use super::report;

/// Build TensorRT engines from a bundle ahead of time, for GPUs that need not be in this machine.
///
/// The graphs are lowered in the selected precision and checked with TensorRT's parser. Whole rollouts on ONNX Runtime
/// are compared with Candle in FP32. Then the engines are built, and written to the folder `trt` of the bundle with a
/// file that describes them.
#[derive(Args)]
#[command(
    group = ArgGroup::new("precision").required(true),
    after_help = "Example:\n  eqim-export trt --engine bundle --fp16 --target ampere,ada --max-batch 4 --max-tokens 256"
)]
pub struct Trt {
    /// Bundle to build from: a folder written by eqim-export onnx
    #[arg(long, value_name = "BUNDLE")]
    engine: PathBuf,
    /// Weights, caches and matrix products in FP32
    #[arg(long, group = "precision")]
    fp32: bool,
    /// Weights, caches and matrix products in FP16; norms, softmax, the ODE's state and guidance in FP32
    #[arg(long, group = "precision")]
    fp16: bool,
    /// Like --fp16, but in BF16, which has a wider range and fewer digits
    #[arg(long, group = "precision")]
    bf16: bool,
    #[command(flatten)]
    int8: Int8,
    /// Target GPUs: turing, ampere, ada, blackwell, or compute capabilities such as sm86
    #[arg(long, value_name = "GPU", value_delimiter = ',', value_parser = Target::named, default_value = "ampere,ada,blackwell")]
    target: Vec<Vec<Target>>,
    /// Maximum number of images per batch; guidance doubles the rows automatically
    #[arg(long, value_name = "N", default_value_t = 8)]
    max_batch: usize,
    /// Maximum number of tokens per image in the decoder and encoder
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_tokens: usize,
    /// Minimum input shapes, in the format of trtexec: NAME:1x16,…
    #[arg(long = "minShapes", value_name = "SHAPES", default_value = "", hide_default_value = true, value_parser = shapes)]
    min: Shapes,
    /// Optimum input shapes, for which TensorRT chooses the kernels
    #[arg(long = "optShapes", value_name = "SHAPES", default_value = "", hide_default_value = true, value_parser = shapes)]
    opt: Shapes,
    /// Maximum input shapes
    #[arg(long = "maxShapes", value_name = "SHAPES", default_value = "", hide_default_value = true, value_parser = shapes)]
    max: Shapes,
    /// Only check whether TensorRT supports every graph on every target; write nothing
    #[arg(long)]
    check_only: bool,
    /// Tolerance of the tokens against Candle in FP32, |a-b| / max(1, |b|) [default: 1e-4 for fp32, 2e-2 for fp16]
    #[arg(long, value_parser = tolerance, conflicts_with_all = ["no_validate", "check_only", "bf16", "int8"])]
    atol: Option<f32>,
    /// Build the engines without validating the graphs on ONNX Runtime
    #[arg(long)]
    no_validate: bool,
}

fn shapes(text: &str) -> Result<Shapes> {
    if text.is_empty() { Ok(Shapes::default()) } else { text.parse() }
}

impl Trt {
    /// Precision of caches, and of the weights and products that are not in INT8.
    fn precision(&self) -> Precision {
        match (self.fp32, self.bf16) {
            (true, _) => Precision::Fp32,
            (_, true) => Precision::Bf16,
            _ => Precision::Fp16,
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            max_batch: self.max_batch,
            max_tokens: self.max_tokens,
            min: self.min.clone(),
            opt: self.opt.clone(),
            max: self.max.clone(),
        }
    }

    fn targets(&self) -> Vec<Target> {
        let mut targets = self.target.concat();
        targets.sort_unstable();
        targets.dedup();
        targets
    }

    /// Path of the ONNX Runtime library; `None` if the lowered graphs are not validated.
    fn validator(&self, precision: Precision) -> Result<Option<PathBuf>> {
        if self.check_only || self.no_validate {
            return Ok(None);
        }
        if precision == Precision::Bf16 {
            say("ONNX Runtime's CPU has no kernels for BF16: how far these engines drift from FP32 is not measured");
            return Ok(None);
        }
        let problem = |problem: Error| problem.advise(", or use --no-validate to build the engines without validation");
        native::find_onnxruntime().map(Some).map_err(problem)
    }
}

/// Builds the engines that the flags specify.
///
/// # Errors
/// [`Error::input`] if the bundle, targets or shapes do not fit; [`Error::run`] if TensorRT does not support the
/// graphs.
pub fn run(arguments: &Trt) -> Result<()> {
    let precision = arguments.precision();
    let targets = arguments.targets();
    trt::check_targets(&targets)?;
    let bundle = Bundle::open(&arguments.engine)?;
    if !arguments.check_only {
        files::check_output_folder(&bundle.folder.join(FOLDER))?;
    }
    let limits = arguments.limits();
    limits.check(&bundle.manifest.model)?;
    let version = trt::version()?;
    let library = arguments.validator(precision)?;

    let names: Vec<String> = targets.iter().map(Target::to_string).collect();
    let int8 = if arguments.int8.int8.is_some() { "int8 and " } else { "" };
    say(format_args!("{version}, {int8}{precision}, for {}", names.join(", ")));
    trt::check_weights(&bundle, precision)?;
    let (config, weights) = bundle.load_weights()?;
    let policy = arguments.int8.policy(&config, &weights, Int8Target::TensorRt)?;
    let draft = trt::lowered(&bundle, &weights, precision, policy.as_ref())?;
    supported(&draft.bundle, &limits, if arguments.check_only { &targets } else { &[] })?;
    if arguments.check_only {
        return Ok(());
    }
    let (drift, report) = match (library, &policy) {
        (Some(library), None) => {
            (Some(drifts(arguments, &draft.bundle, CandleEngine::new(config, weights), &library)?), None)
        }
        (Some(library), Some(policy)) => {
            int8::check_preview(&draft, &config, &weights, policy, &library)?;
            let pair = Pair::load(&bundle, &draft.bundle, &library)?;
            (None, Some(arguments.int8.judged(&pair, &arguments.int8.settings())?))
        }
        (None, _) => {
            // Frees the memory for the build.
            drop::<(eqim::Config, Weights)>((config, weights));
            (None, None)
        }
    };
    let spinner = Arc::new(eqim_cli::Spinner::new());
    let watch = Arc::clone(&spinner);
    let progress = move |stage: Stage, phase: &str| watch.show(format!("building {}: {phase}", stage.name()));
    let done = |stage: Stage, engine: &EngineRecord| {
        let (seconds, size) = (engine.seconds, megabytes(engine.file.bytes));
        let line = format!("{}: Engine built in {seconds:.2} sec., {size:.1} MB", stage.name());
        spinner.aside(|| say(line));
    };
    let built = trt::build(&bundle, &draft.bundle, &limits, &targets, progress, done)?;
    spinner.finish();
    let engines = engines(&built.set);
    if let Some(report) = report {
        report::write(&report, built.folder())?;
    }
    trt::publish(built, &bundle, drift.as_ref())?;
    say(engines);
    eqim_cli::print(format_args!("The engines were saved at: {}", bundle.folder.join(FOLDER).display()))
}

/// Prints the support report. Fails if a node is not supported.
fn supported(lowered: &Bundle, limits: &Limits, targets: &[Target]) -> Result<()> {
    say("Support by TensorRT:");
    let config = &lowered.manifest.model;
    let check = |stage: Stage| {
        let profiles = limits.profiles(stage, config)?;
        let support = trt::check(stage.name(), &lowered.graph_path(stage)?, &profiles, targets)?;
        say(support.text());
        Ok(support)
    };
    let reports = Stage::ALL.into_iter().map(check).collect::<Result<Vec<Support>>>()?;
    if reports.iter().all(Support::passed) {
        return Ok(());
    }
    Err(Error::run("support", "TensorRT does not support the graphs marked -[x]; nothing was written"))
}

/// Measures how far the lowered graphs drift from FP32. Fails if the drift exceeds the tolerance.
fn drifts(arguments: &Trt, lowered: &Bundle, reference: CandleEngine, library: &Path) -> Result<Drift> {
    let atol = arguments.atol.unwrap_or(default_tolerance(lowered.manifest.precision));
    say("Rollouts of the lowered graphs on ONNX Runtime against Candle in FP32:");
    let drift = drift::measure(lowered, &reference, library, &drift::LENGTHS, atol, |line| say(line))?;
    if drift.passed() {
        return Ok(drift);
    }
    Err(Error::run(
        "drift",
        format!(
            "the {} graphs do not pass where marked -[x], so no engine was built: --bf16 has a wider range, --fp32 more \
             digits; --atol accepts larger differences of tokens, --no-validate builds unseen",
            lowered.manifest.precision
        ),
    ))
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// A table with one row per engine.
fn engines(set: &EngineSet) -> String {
    let row = |stage: Stage| {
        let engine = set.engines.get(stage.name())?;
        let precision = engine.precision.to_string();
        let precision = if engine.int8 { format!("int8+{precision}") } else { precision };
        let (size, peak) = (megabytes(engine.file.bytes), megabytes(engine.peak_bytes));
        let layers: usize = engine.layers.iter().map(|layers| layers.count).sum();
        let mut row = vec![stage.name().into(), precision, format!("{:.2}", engine.seconds)];
        row.extend([format!("{size:.1}"), format!("{peak:.0}"), layers.to_string()]);
        Some(row)
    };
    let head = ["stage", "precision", "seconds", "MB", "peak MB", "layers"];
    table::text(&head, Stage::ALL.into_iter().filter_map(row))
}
