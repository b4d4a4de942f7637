//! `eqim-export onnx`: exports checkpoints to a bundle.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use eqim::bundle::{Int8Target, Precision};
use eqim::checkpoint::{self, Hints, Inferred, Loaded, WeightSet, WeightSets};
use eqim::config::Preset;
use eqim::engine::candle::CandleEngine;
use eqim::weights::Weights;
use eqim::{Config, Error, Result, ResultExt, files};
use eqim_cli::flags::tolerance;
use eqim_cli::{note, say, table};
use eqim_engines::native;
use eqim_export::lower::{NEWEST_OPSET, OLDEST_OPSET};
use eqim_export::validate::{default_tolerance, validate};
use eqim_export::write::{self, Draft, Options};

use super::int8::Int8;

/// Export checkpoints to a bundle: five ONNX graphs that share one weights file, validated against Candle.
#[derive(Args)]
#[command(
    after_help = "Example:\n  eqim-export onnx --generator places_large.ckpt --tokenizer tokenizer.ckpt \\\n    --preset places-large -o bundle"
)]
pub struct Onnx {
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    hints: HintArguments,
    /// Text file with the class names in order, one per line, so that commands accept names [default: the names in the
    /// checkpoint, if eqim-train wrote it]
    #[arg(long, value_name = "FILE")]
    class_names: Option<PathBuf>,
    #[command(flatten)]
    sets: SetArguments,
    /// Low-rank adapter of the generator, as eqim-train and peft write them (.safetensors); it is merged into the weights
    #[arg(long, value_name = "FILE", requires = "generator")]
    adapter: Option<PathBuf>,
    /// Factor of the adapter; for an adapter of peft lora_alpha / r
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = factor, requires = "adapter")]
    adapter_scale: f64,
    /// Folder to write the bundle to; an older bundle there is replaced
    #[arg(short, long, value_name = "BUNDLE")]
    output: PathBuf,
    /// ONNX opset version to export with
    #[arg(long, default_value_t = NEWEST_OPSET, value_parser = clap::value_parser!(i64).range(OLDEST_OPSET..=NEWEST_OPSET))]
    opset: i64,
    /// Floating-point precision of the weights and matrix products
    #[arg(long, value_enum, default_value_t = DtypeArgument::Fp32)]
    dtype: DtypeArgument,
    /// Tolerance of the validation against Candle, |a-b| / max(1, |b|) [default: 1e-4 for fp32, 2e-2 for fp16]
    #[arg(long, value_parser = tolerance, conflicts_with_all = ["no_validate", "int8"])]
    atol: Option<f32>,
    /// Write the bundle without validating it on ONNX Runtime
    #[arg(long)]
    no_validate: bool,
    #[command(flatten)]
    int8: Int8,
    /// Target of the INT8 graphs: explicit Q/DQ for TensorRT, or integer operators that are fast on a CPU
    #[arg(long, alias = "for", value_enum, default_value_t = Int8Target::TensorRt, requires = "int8")]
    int8_target: Int8Target,
}

fn factor(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|factor: &f64| factor.is_finite()).ok_or_else(|| "expected a number".into())
}

/// Source of the weights.
#[derive(Args)]
struct Source {
    /// Generator checkpoint: .pth of the reference implementation, .safetensors, or the index of several .safetensors
    #[arg(long, value_name = "FILE", required_unless_present = "random", requires = "tokenizer")]
    generator: Option<PathBuf>,
    /// Tokenizer checkpoint: .ckpt of the reference implementation, .safetensors, or the index of several .safetensors
    #[arg(long, value_name = "FILE", required_unless_present = "random", requires = "generator")]
    tokenizer: Option<PathBuf>,
    /// Use random weights of a published model size instead of checkpoints, for benchmarks without a download
    #[arg(long, value_enum, value_name = "PRESET", conflicts_with_all = ["generator", "tokenizer", "preset"])]
    random: Option<PresetArgument>,
    /// Seed of the random weights
    #[arg(long, default_value_t = 0, conflicts_with_all = ["generator", "tokenizer"])]
    seed: u32,
}

/// The weights to take of a checkpoint that has both averages and trained weights.
#[derive(Args)]
struct SetArguments {
    /// Weights of the generator [default: the moving average, or the trained weights if there is none]
    #[arg(long, value_enum)]
    generator_weights: Option<WeightsArgument>,
    /// Weights of the tokenizer [default: the moving average of every tensor that has one]
    #[arg(long, value_enum)]
    tokenizer_weights: Option<WeightsArgument>,
}

impl SetArguments {
    fn sets(&self) -> WeightSets {
        WeightSets {
            generator: self.generator_weights.map(WeightSet::from),
            tokenizer: self.tokenizer_weights.map(WeightSet::from),
        }
    }
}

/// Settings that a checkpoint may not contain.
#[derive(Args)]
struct HintArguments {
    /// Model size of the generator checkpoint, for what it does not contain
    #[arg(long, value_enum)]
    preset: Option<PresetArgument>,
    /// Number of attention heads
    #[arg(long)]
    heads: Option<usize>,
    /// Number of earlier tokens that self-attention attends to (cond_length)
    #[arg(long)]
    window: Option<usize>,
    /// Scale factor from latents to tokens
    #[arg(long)]
    vae_norm: Option<f64>,
    /// Default number of Euler steps per token
    #[arg(long)]
    steps: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum PresetArgument {
    Tiny,
    Small,
    Base,
    Large,
    Huge,
    PlacesLarge,
}

#[derive(Clone, Copy, ValueEnum)]
enum WeightsArgument {
    Ema,
    Raw,
}

#[derive(Clone, Copy, ValueEnum)]
enum DtypeArgument {
    Fp32,
    Fp16,
}

impl From<WeightsArgument> for WeightSet {
    fn from(weights: WeightsArgument) -> Self {
        match weights {
            WeightsArgument::Ema => Self::Ema,
            WeightsArgument::Raw => Self::Raw,
        }
    }
}

impl From<PresetArgument> for Preset {
    fn from(preset: PresetArgument) -> Self {
        match preset {
            PresetArgument::Tiny => Self::Tiny,
            PresetArgument::Small => Self::Small,
            PresetArgument::Base => Self::Base,
            PresetArgument::Large => Self::Large,
            PresetArgument::Huge => Self::Huge,
            PresetArgument::PlacesLarge => Self::PlacesLarge,
        }
    }
}

/// Loads the weights and says what was decided, or generates random weights. Returns where the values of the
/// configuration come from.
fn load(arguments: &Onnx) -> Result<(Config, Weights, Vec<Inferred>)> {
    let HintArguments { preset, heads, window, vae_norm, steps } = arguments.hints;
    if let Some(preset) = arguments.source.random {
        let mut config = Preset::from(preset).config();
        let generator = &mut config.generator;
        generator.heads = heads.unwrap_or(generator.heads);
        generator.window = window.unwrap_or(generator.window);
        generator.vae_norm = vae_norm.unwrap_or(generator.vae_norm);
        generator.steps = steps.unwrap_or(generator.steps);
        config.check()?;
        let weights = Weights::random(&config, arguments.source.seed)?;
        return Ok((config, weights, vec![]));
    }
    let (Some(generator), Some(tokenizer)) = (&arguments.source.generator, &arguments.source.tokenizer) else {
        return Err(Error::input("--generator and --tokenizer", "are both required without --random"));
    };
    let hints = Hints { preset: preset.map(Preset::from), heads, window, vae_norm, steps };
    let loaded = checkpoint::load_described(generator, tokenizer, arguments.sets.sets(), &hints)?;
    describe(&loaded);
    Ok((loaded.config, loaded.weights, loaded.inferred))
}

/// Prints which weights were taken, where the values of the configuration come from, and what was passed over.
fn describe(loaded: &Loaded) {
    let row = |value: &Inferred| vec![value.name.clone(), value.value.clone(), value.origin.to_string()];
    say(format_args!("weights: {}\n", loaded.taken));
    say(format_args!("{}\n", table::text(&["model", "value", "from"], loaded.inferred.iter().map(row))));
    if !loaded.passed_over.is_empty() {
        let names = loaded.passed_over.join(", ");
        note(format_args!(
            "note: passed over, as the reference does, since the tokenizer has no such tensors: {names}"
        ));
    }
}

/// Writes the bundle that the flags specify.
///
/// # Errors
/// [`Error::input`] if files or flags do not fit; [`Error::run`] if the graphs do not pass the validation.
pub fn run(arguments: &Onnx) -> Result<()> {
    write::check_destination(&arguments.output)?;
    let library =
        if arguments.no_validate { None } else { Some(native::find_onnxruntime().map_err(without_validation)?) };
    let precision = match arguments.dtype {
        DtypeArgument::Fp32 => Precision::Fp32,
        DtypeArgument::Fp16 => Precision::Fp16,
    };
    let (mut config, mut weights, inferred) = load(arguments)?;
    if let Some(adapter) = &arguments.adapter {
        checkpoint::adapter::merge(adapter, arguments.adapter_scale, &mut config, &mut weights)?;
    }
    if let Some(file) = &arguments.class_names {
        let about = |error: Error| error.about(format!("--class-names {}", file.display()));
        let text = String::from_utf8(files::read(file)?).or_input("is not text in UTF-8").map_err(about)?;
        config.generator.name_classes(&text).map_err(about)?;
    }
    let options = Options { precision, opset: arguments.opset, policy: None, functions: precision == Precision::Fp32 };
    let mut draft = match arguments.int8.policy(&config, &weights, arguments.int8_target)? {
        Some(policy) => {
            arguments.int8.draft(&arguments.output, &config, &weights, options, policy, library.as_deref())?
        }
        None => float(arguments, config, weights, options, library)?,
    };
    draft.record(inferred)?;
    let bundle = draft.publish()?;
    eqim_cli::print(format_args!("The ONNX export succeeded and the bundle was saved at: {}", bundle.folder.display()))
}

/// Writes a bundle without INT8, and validates it if `library` is given.
fn float(
    arguments: &Onnx,
    config: Config,
    weights: Weights,
    options: Options,
    library: Option<PathBuf>,
) -> Result<Draft> {
    let draft =
        write::draft(&arguments.output, &config, &weights, options, |file| say(format_args!("writing {file}")))?;
    let Some(library) = library else { return Ok(draft) };
    let atol = arguments.atol.unwrap_or(default_tolerance(options.precision));
    validated(draft, &CandleEngine::new(config, weights), &library, atol)
}

fn without_validation(problem: Error) -> Error {
    problem.advise(", or use --no-validate to write the bundle without validation")
}

/// Returns a draft if it computes the same as the model.
fn validated(draft: Draft, reference: &CandleEngine, library: &Path, atol: f32) -> Result<Draft> {
    say("Validating on ONNX Runtime against Candle in FP32 (same inputs, same noise):");
    let report = validate(&draft.bundle, reference, library, atol, |line| say(line))?;
    if report.passed() {
        return Ok(draft);
    }
    Err(Error::run(
        "validation",
        "what is marked -[x] does not compute what the model does, so no bundle was written; --atol accepts larger \
         differences, --no-validate writes the bundle unseen",
    ))
}
