//! `eqim-export calibrate`: measures the ranges of activations on pictures and rollouts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use eqim::bundle::{Bundle, Int8Target};
use eqim::lock::Lock;
use eqim::model::Stage;
use eqim::weights::Weights;
use eqim::{Config, Error, Result, files};
use eqim_calibration::policy::default_stages;
use eqim_calibration::{
    Collection, Estimator, Policy, Ranked, Samples, Sensitivity, Table, fingerprint, quantized, search, survey,
};
use eqim_cli::flags::tolerance;
use eqim_cli::{say, table};
use eqim_export::quantization::decibels;

/// Calibrate INT8: measure the ranges of a model's activations on pictures and rollouts, and write them to a table.
///
/// Every picture is encoded and decoded by the tokenizer; one that cannot be used is named and skipped. Every rollout
/// generates an image with guidance, caches and all ODE steps, with its own class and seed. The state is saved next to
/// the table until the table is complete. A calibration that was stopped resumes from this state.
#[derive(Args)]
#[command(
    after_help = "Example:\n  eqim-export calibrate --engine bundle --images photos -o calibration.json --sensitivity --min-psnr 35"
)]
pub struct Calibrate {
    /// FP32 bundle to calibrate: a folder written by eqim-export onnx
    #[arg(long, value_name = "BUNDLE")]
    engine: PathBuf,
    /// Folder of PNG and JPEG pictures that are typical inputs of the model; subfolders are included
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// Calibration table to write
    #[arg(short, long, value_name = "TABLE.json")]
    output: PathBuf,
    /// Method that chooses the ranges: max, percentile, percentile:P, entropy or mse
    #[arg(long, default_value_t = Estimator::Mse)]
    estimator: Estimator,
    /// Resize pictures whose height is not the model's
    #[arg(long)]
    resize: bool,
    /// Number of rollouts, each with the next class and seed
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rollouts: u32,
    /// Tokens per rollout, and maximum tokens per picture
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=4096))]
    tokens: u32,
    /// Euler steps per token [default: the model's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: Option<u32>,
    /// Classifier-free guidance at the last token of a rollout
    #[arg(long, default_value_t = 3.0, value_parser = tolerance)]
    cfg: f32,
    /// Seed of the first rollout
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Rank the scopes by the damage of quantizing each alone, and exclude the worst from INT8
    #[arg(long)]
    sensitivity: bool,
    /// Minimum PSNR of the images against FP32, dB; as few scopes as possible are excluded to reach it
    #[arg(long, value_name = "DB", default_value_t = 30.0, requires = "sensitivity", value_parser = tolerance)]
    min_psnr: f32,
    /// Target that the scopes are quantized for
    #[arg(long, alias = "for", value_enum, default_value_t = Int8Target::TensorRt, requires = "sensitivity")]
    int8_target: Int8Target,
    /// Stages to quantize [default: step,flow,decoder for TensorRT, all for a CPU]
    #[arg(long = "int8", value_name = "STAGES", value_delimiter = ',', requires = "sensitivity")]
    stages: Vec<Stage>,
}

/// Calibrates a bundle's model.
///
/// # Errors
/// [`Error::input`] if the pictures or the bundle do not fit; [`Error::run`] if an activation is not finite.
pub fn run(arguments: &Calibrate) -> Result<()> {
    files::check_output(&arguments.output)?;
    let state = state_path(&arguments.output);
    let _lock = Lock::beside(&state)?;
    let bundle = Bundle::open(&arguments.engine)?;
    check_bundle(&bundle)?;
    let images = pictures(arguments, &bundle.manifest.model)?;
    let (config, weights) = bundle.load_weights()?;
    let samples = Samples {
        images,
        resized: arguments.resize,
        rollouts: arguments.rollouts as usize,
        tokens: arguments.tokens as usize,
        steps: arguments.steps.map_or(config.generator.steps, |steps| steps as usize),
        cfg: arguments.cfg,
        seed: arguments.seed,
    };
    let mut collection = Collection::open(&state, &fingerprint(&config, &weights)?, &samples)?;
    collect(&mut collection, &state, &config, &weights, &arguments.images)?;
    let mut table = collection.table(arguments.estimator)?;
    if arguments.sensitivity {
        table.sensitivity = Some(rank(arguments, &config, &weights, &table, (&mut collection, &state))?);
    }
    table.write(&arguments.output)?;
    // The table is complete, so the state is no longer needed.
    let _ = std::fs::remove_file(&state);
    eqim_cli::print(format_args!(
        "The ranges of {} scopes were saved at: {}",
        table.scopes.len(),
        arguments.output.display()
    ))
}

/// Looks at all pictures before the work. Returns their hashes by name, and names those that are skipped.
fn pictures(arguments: &Calibrate, config: &Config) -> Result<BTreeMap<String, String>> {
    let (images, skipped) = survey(&arguments.images, config, arguments.resize)?;
    skipped.iter().for_each(|problem| eqim_cli::note(format_args!("skipped: {problem}")));
    eqim_cli::note(format_args!("{} pictures ({} skipped)", images.len(), skipped.len()));
    Ok(images)
}

/// Checks that the bundle's weights are not rounded. Rounded weights are a different model.
fn check_bundle(bundle: &Bundle) -> Result<()> {
    let manifest = &bundle.manifest;
    if manifest.is_fp32() {
        return Ok(());
    }
    let held = if manifest.quantization.is_some() { "INT8".into() } else { manifest.precision.to_string() };
    let problem = format!("holds weights rounded to {held}: calibrate the bundle of --dtype fp32");
    Err(Error::input(bundle.folder.display(), problem))
}

/// Path of the state file of an incomplete calibration.
fn state_path(table: &Path) -> PathBuf {
    let mut name = table.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    table.with_file_name(name)
}

/// Runs the model on the remaining samples.
fn collect(collection: &mut Collection, state: &Path, config: &Config, weights: &Weights, images: &Path) -> Result<()> {
    if collection.done() > 0 {
        say(format_args!("resuming after {} of {} samples", collection.done(), collection.total()));
    }
    let mut progress = eqim_cli::Progress::new("calibrated", collection.total(), "pictures and rollouts");
    while collection.done() < collection.total() {
        collection.next(config, weights, images)?;
        collection.save(state)?;
        progress.at(collection.done());
    }
    Ok(())
}

/// Ranks the scopes and prints the ranking.
fn rank(
    arguments: &Calibrate,
    config: &Config,
    weights: &Weights,
    table: &Table,
    collection: (&mut Collection, &Path),
) -> Result<Sensitivity> {
    let target = arguments.int8_target;
    let stages = if arguments.stages.is_empty() { default_stages(target) } else { &arguments.stages };
    let policy = Policy::new(target, stages.iter().copied(), table.clone());
    let mut progress = eqim_cli::Progress::new("looked at", quantized(config, &policy)?.len(), "scopes");
    let found = search(config, weights, &policy, arguments.min_psnr, collection, |done| progress.at(done))?;
    drop(progress);
    let rows = found.scopes.iter().map(|Ranked { scope, damage }| {
        vec![scope.clone(), format!("{:.1e}", damage.token_error), decibels(damage.psnr)]
    });
    say(table::text(&["scope alone in INT8", "token error", "PSNR"], rows));
    let (all, kept) = (found.scopes.len(), found.exclude.len());
    let psnr = decibels(found.psnr);
    say(format_args!("{} of {all} scopes in INT8 together: image {psnr}", all - kept));
    if kept > 0 {
        let names: Vec<&str> = found.exclude.iter().map(String::as_str).collect();
        say(format_args!("left out for {} dB: {}", found.min_psnr, names.join(", ")));
    }
    Ok(found)
}
