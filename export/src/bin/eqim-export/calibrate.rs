//! `eqim-export calibrate`: ranges of activations, from pictures and rollouts.

use std::path::{Path, PathBuf};

use clap::Args;
use eqim::bundle::{Bundle, Int8Target};
use eqim::model::Stage;
use eqim::picture::folder::pictures;
use eqim::weights::Weights;
use eqim::{Config, Error, Result, checkpoint, files};
use eqim_calibration::policy::STAGES;
use eqim_calibration::{
    Collection, Estimator, Policy, Ranked, Samples, Sensitivity, Table, fingerprint, hashes, quantized, search,
};
use eqim_cli::flags::tolerance;
use eqim_cli::{say, table};
use eqim_export::quantization::decibels;

/// Watch a model work on pictures and rollouts, and write the ranges of its activations: what INT8 is scaled by.
///
/// Every picture passes the tokenizer, there and back. Every rollout generates an image with guidance, caches and all ODE
/// steps, from a class and a seed of its own. What has been seen is kept beside the table until that is complete: a
/// calibration that was stopped goes on where it was.
#[derive(Args)]
#[command(
    after_help = "Example:\n  eqim-export calibrate --engine bundle --images photos -o calibration.json --sensitivity --min-psnr 35"
)]
pub struct Calibrate {
    /// The bundle, in FP32: a folder that eqim-export onnx wrote
    #[arg(long, value_name = "BUNDLE")]
    engine: PathBuf,
    /// Folder of PNG and JPEG pictures as the model will meet, searched with its subfolders
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// The table to write
    #[arg(short, long, value_name = "TABLE.json")]
    output: PathBuf,
    /// How ranges are chosen: max, percentile[:P], entropy or mse
    #[arg(long, default_value_t = Estimator::Mse)]
    estimator: Estimator,
    /// Scale pictures of other heights than the model's
    #[arg(long)]
    resize: bool,
    /// Rollouts, each of the next class and seed
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rollouts: u32,
    /// Tokens of a rollout, and at most of a picture
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=4096))]
    tokens: u32,
    /// Euler steps a token [default: the model's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: Option<u32>,
    /// Guidance at a rollout's last token
    #[arg(long, default_value_t = 3.0, value_parser = tolerance)]
    cfg: f32,
    /// Seed of the first rollout
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Rank scopes by what quantizing each alone does, and leave the worst out of INT8
    #[arg(long)]
    sensitivity: bool,
    /// Least PSNR of the image against FP32, dB: as few scopes stay out as it needs
    #[arg(long, value_name = "DB", default_value_t = 30.0, requires = "sensitivity", value_parser = tolerance)]
    min_psnr: f32,
    /// What the scopes are quantized for
    #[arg(long, alias = "for", value_enum, default_value_t = Int8Target::TensorRt, requires = "sensitivity")]
    int8_target: Int8Target,
    /// Stages that are quantized
    #[arg(long = "int8", value_name = "STAGES", value_delimiter = ',', requires = "sensitivity")]
    stages: Vec<Stage>,
}

/// Calibrates a bundle's model.
///
/// # Errors
/// [`Error::input`] for pictures or a bundle that do not fit; [`Error::run`] for values that are not finite.
pub fn run(arguments: &Calibrate) -> Result<()> {
    check_output(&arguments.output)?;
    let bundle = Bundle::open(&arguments.engine)?;
    check_bundle(&bundle)?;
    let pictures = pictures(&arguments.images)?;
    let (config, weights) = checkpoint::load_safetensors(&bundle.weights_path())?;
    let samples = Samples {
        images: hashes(&arguments.images, &pictures)?,
        resized: arguments.resize,
        rollouts: arguments.rollouts as usize,
        tokens: arguments.tokens as usize,
        steps: arguments.steps.map_or(config.generator.steps, |steps| steps as usize),
        cfg: arguments.cfg,
        seed: arguments.seed,
    };
    let state = state_path(&arguments.output);
    let mut collection = Collection::open(&state, &fingerprint(&config, &weights)?, &samples)?;
    collect(&mut collection, &state, &config, &weights, &pictures)?;
    let mut table = collection.table(arguments.estimator)?;
    if arguments.sensitivity {
        table.sensitivity = Some(rank(arguments, &config, &weights, &table, (&mut collection, &state))?);
    }
    table.write(&arguments.output)?;
    // The table is complete without it.
    let _ = std::fs::remove_file(&state);
    eqim_cli::print(format_args!(
        "The ranges of {} scopes were saved at: {}",
        table.scopes.len(),
        arguments.output.display()
    ))
}

fn check_output(path: &Path) -> Result<()> {
    if path.file_name().is_none() || path.is_dir() || !files::folder(path).is_dir() {
        return Err(Error::input(path.display(), "expected the name of a file to write, inside a folder that exists"));
    }
    Ok(())
}

/// Only weights as they were trained can be calibrated: rounded ones are another model's.
fn check_bundle(bundle: &Bundle) -> Result<()> {
    let manifest = &bundle.manifest;
    if manifest.is_fp32() {
        return Ok(());
    }
    let held = if manifest.quantization.is_some() { "INT8".into() } else { manifest.precision.to_string() };
    let problem = format!("holds weights rounded to {held}: calibrate the bundle of --dtype fp32");
    Err(Error::input(bundle.folder.display(), problem))
}

/// Where a calibration that is not complete stands.
fn state_path(table: &Path) -> PathBuf {
    let mut name = table.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    table.with_file_name(name)
}

/// Shows the model what is still to be seen.
fn collect(
    collection: &mut Collection,
    state: &Path,
    config: &Config,
    weights: &Weights,
    pictures: &[PathBuf],
) -> Result<()> {
    if collection.done() > 0 {
        say(format_args!("resuming after {} of {} samples", collection.done(), collection.total()));
    }
    let mut progress = eqim_cli::Progress::new("calibrated", collection.total(), "pictures and rollouts");
    while collection.done() < collection.total() {
        collection.next(config, weights, pictures)?;
        collection.save(state)?;
        progress.at(collection.done());
    }
    Ok(())
}

/// Ranks the scopes, and shows the ranking.
fn rank(
    arguments: &Calibrate,
    config: &Config,
    weights: &Weights,
    table: &Table,
    collection: (&mut Collection, &Path),
) -> Result<Sensitivity> {
    let stages = if arguments.stages.is_empty() { STAGES.to_vec() } else { arguments.stages.clone() };
    let policy = Policy::new(arguments.int8_target, stages, table.clone());
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
