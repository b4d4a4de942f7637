//! `eqim-train`: trains the tokenizer and the generator on folders of photographs.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use candle_core::Device;
use clap::{Args, Parser, Subcommand};
use eqim::bundle::FileRecord;
use eqim::checkpoint::{self, Hints};
use eqim::engine::candle::open_device;
use eqim::{Error, Result, ResultExt, files, limits};
use eqim_training::evaluation::Evaluation;
use eqim_training::generator::{self, GeneratorTask};
use eqim_training::latents::Encoder;
use eqim_training::perceptual::Perceptual;
use eqim_training::photos::Photos;
use eqim_training::ranks::Ranks;
use eqim_training::recipe::{Base, Recipe, TrainingPlan};
use eqim_training::run::{Output, Task, run as run_task};
use eqim_training::semantic::Semantic;
use eqim_training::start::Start;
use eqim_training::tokenizer::{self, Networks, TokenizerTask, mean};
use regex::Regex;
use serde::Serialize;

/// Runs the program with its arguments, the first of which is its name. Returns the exit code of the process.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let arguments = Arguments::parse_from(arguments);
    let mut ranks = None;
    let code = eqim_cli::main(|| {
        restart_with_variables()?;
        let ranks = ranks.insert(Rc::new(Ranks::join()?));
        run_on(ranks, &arguments)
    });
    if let Some(ranks) = ranks.filter(|_| code != 0) {
        ranks.abort(code);
    }
    code
}

/// Runs the command on one of several ranks. The first writes the messages, and all write their errors.
fn run_on(ranks: &Rc<Ranks>, arguments: &Arguments) -> Result<()> {
    if !ranks.is_first() {
        eqim_cli::silence();
    }
    run(arguments, ranks).map_err(|error| {
        if !ranks.is_first() {
            // An error that all ranks have is written once: the first ends the others.
            std::thread::sleep(Duration::from_secs(2));
        }
        if ranks.size() > 1 { error.about(format!("rank {} of {}", ranks.rank(), ranks.size())) } else { error }
    })
}

/// Train the tokenizer or the generator on a folder of photographs.
#[derive(Parser)]
#[command(name = "eqim-train", version)]
struct Arguments {
    #[command(subcommand)]
    part: Part,
}

/// The commands of `eqim-train`.
#[derive(Subcommand)]
enum Part {
    /// Train the tokenizer: the autoencoder between images and latent tokens.
    Tokenizer {
        #[command(flatten)]
        shared: Shared,
        /// Tokenizer checkpoint to start from (.safetensors of eqim-train, or .ckpt).
        #[arg(long, value_name = "FILE")]
        from: Option<PathBuf>,
        /// Network of the perceptual loss: EfficientNet-Lite0 (.pth), or VGG16 and LPIPS (.safetensors).
        #[arg(long, value_name = "FILE", alias = "lpips")]
        perceptual: Option<PathBuf>,
        /// Network of the semantic loss: DINOv2 (.safetensors) or EfficientNet-Lite0 (.pth).
        #[arg(long, value_name = "FILE", alias = "dino")]
        semantic: Option<PathBuf>,
    },
    /// Train the generator on the latents of a trained tokenizer.
    Generator {
        #[command(flatten)]
        shared: Shared,
        /// Checkpoint of the trained tokenizer (.safetensors of eqim-train, or .ckpt).
        #[arg(long, value_name = "FILE")]
        tokenizer: PathBuf,
        /// Generator checkpoint to start from (.safetensors of eqim-train, .pth or .ckpt). Its sizes are those of the training.
        #[arg(long, value_name = "FILE")]
        from: Option<PathBuf>,
        /// Classes of the photographs that start as a class of the checkpoint, by name or number. Without it a class starts as
        /// the one of its name, else as the mean of all classes.
        #[arg(long, value_name = "NAME=CLASS,…", value_delimiter = ',', requires = "from")]
        classes: Vec<String>,
        /// Regular expression for the names of the weights that are not trained, such as `^diffloss`.
        #[arg(long, value_name = "PATTERN", requires = "from")]
        freeze: Option<Regex>,
    },
    /// Print a preset as TOML, to edit and pass to --recipe.
    Recipe {
        /// Preset to print.
        #[arg(long, value_enum, default_value_t)]
        preset: Base,
    },
}

/// Arguments of both training commands.
#[derive(Args)]
struct Shared {
    /// Folder of photographs (.jpg, .png), with one subfolder per class, or tar shards (.tar) as WebDataset writes them.
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// Output folder for the model, checkpoints, metrics and samples.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Preset of model sizes and hyperparameters.
    #[arg(long, value_enum, default_value_t)]
    preset: Base,
    /// TOML file with the settings that differ from the preset.
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// Device to train on: cpu, or cuda:N if built with the feature cuda. With several ranks, cuda is one GPU per rank.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Resume from the last checkpoint in the output folder.
    #[arg(long)]
    resume: bool,
    /// Weights of EfficientNet-Lite0 (.pth): every validation also measures the Fréchet distance to the held-out photographs.
    #[arg(long, value_name = "FILE")]
    evaluate: Option<PathBuf>,
    /// Number of optimizer steps; overrides the recipe.
    #[arg(long)]
    steps: Option<usize>,
    /// Images per optimizer step; overrides the recipe.
    #[arg(long)]
    batch_size: Option<usize>,
    /// Random seed; overrides the recipe.
    #[arg(long)]
    seed: Option<u64>,
}

/// Names of classes in the message about the photographs.
const MOST_NAMES: usize = 20;

impl Shared {
    /// What checkpoints of the reference may lack: the values of the preset's size.
    fn hints(&self) -> Hints {
        Hints { preset: self.preset.size(), ..Hints::default() }
    }

    fn device(&self, ranks: &Ranks) -> Result<Device> {
        match self.device.as_str() {
            "cuda" => open_device(&format!("cuda:{}", ranks.local())),
            name => open_device(name),
        }
    }

    fn recipe(&self) -> Result<Recipe> {
        let mut recipe = match &self.recipe {
            Some(path) => Recipe::read(self.preset, path)?,
            None => Recipe::new(self.preset),
        };
        for plan in [&mut recipe.tokenizer.plan, &mut recipe.generator.plan] {
            plan.steps = self.steps.unwrap_or(plan.steps);
            plan.batch_size = self.batch_size.unwrap_or(plan.batch_size);
            plan.seed = self.seed.unwrap_or(plan.seed);
        }
        recipe.check()?;
        Ok(recipe)
    }

    fn evaluation(&self, plan: &TrainingPlan) -> Result<Option<Evaluation>> {
        if self.evaluate.is_some() && plan.validation == 0 {
            return Err(Error::setting("evaluate", "needs held-out photographs: set plan.validation in the recipe"));
        }
        self.evaluate.as_deref().map(Evaluation::open).transpose()
    }

    fn photos(&self, plan: &TrainingPlan, height: usize, token_width: usize) -> Result<Photos> {
        let photos = Photos::open(&self.images, height, plan.tokens * token_width)?;
        photos.skipped.iter().for_each(|problem| eqim_cli::note(format_args!("skipped: {problem}")));
        let classes = match photos.classes.len() {
            0..=MOST_NAMES => photos.classes.join(", "),
            many => format!("{} and {} more", photos.classes[..MOST_NAMES].join(", "), many - MOST_NAMES),
        };
        let (found, skipped) = (photos.len(), photos.skipped.len());
        eqim_cli::note(format_args!("{found} photographs ({skipped} skipped), classes: {classes}"));
        Ok(photos)
    }
}

/// Sets variables that libraries read once, at the start of a process, by restarting the program with them:
///
/// - `CANDLE_NUM_THREADS=1`: batches are divided among the cores, and Candle's own threads would wait for one another
///   after every operation.
/// - `MIMALLOC_PURGE_DELAY=-1`: every step needs the memory of the step before again. Returning it to the system between
///   them takes half of the time of a step.
///
/// Variables that are already set are kept.
///
/// # Errors
/// [`Error::run`] if the program cannot be restarted.
fn restart_with_variables() -> Result<()> {
    const VARIABLES: [(&str, &str); 2] = [("CANDLE_NUM_THREADS", "1"), ("MIMALLOC_PURGE_DELAY", "-1")];
    let missing = VARIABLES.into_iter().filter(|(name, _)| std::env::var_os(name).is_none()).collect::<Vec<_>>();
    if missing.is_empty() {
        return Ok(());
    }
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        // A console script is started by an interpreter, and its name is one of the arguments.
        let mut arguments = std::env::args_os();
        let program = arguments.next().unwrap_or_else(|| "eqim-train".into());
        let failed = |error| Error::run("eqim-train", format!("cannot be restarted with {missing:?}: {error}"));
        Err(failed(Command::new(program).args(arguments).envs(missing.iter().copied()).exec()))
    }
    #[cfg(not(unix))]
    Ok(())
}

/// Runs the command.
///
/// # Errors
/// [`Error::input`] naming the flag, file or key that cannot be used; [`Error::run`] if the training fails.
fn run(arguments: &Arguments, ranks: &Rc<Ranks>) -> Result<()> {
    match &arguments.part {
        Part::Recipe { preset } => eqim_cli::print(Recipe::new(*preset).text()?),
        Part::Tokenizer { shared, from, perceptual, semantic } => {
            tokenizer(shared, from.as_deref(), perceptual.as_deref(), semantic.as_deref(), ranks)
        }
        Part::Generator { shared, tokenizer, from, classes, freeze } => {
            let start = |path: &PathBuf| Start::open(path, &shared.hints(), classes, freeze.clone());
            generator(shared, tokenizer, from.as_ref().map(start).transpose()?, ranks)
        }
    }
}

fn tokenizer(
    shared: &Shared,
    from: Option<&Path>,
    perceptual: Option<&Path>,
    semantic: Option<&Path>,
    ranks: &Rc<Ranks>,
) -> Result<()> {
    let mut recipe = shared.recipe()?.tokenizer;
    ranks.set_timeout(recipe.plan.timeout);
    let device = shared.device(ranks)?;
    if recipe.plan.bf16 && device.is_cpu() {
        return Err(Error::input(
            "tokenizer.plan.bf16",
            "requires a GPU, since Candle has no such convolutions on a CPU: set --device",
        ));
    }
    let initial = from.map(|path| checkpoint::load_tokenizer_alone(path, None)).transpose()?;
    if let Some((model, _)) = &initial {
        recipe.model = model.clone();
    }
    tokenizer::check_memory(&recipe, limits::memory())?;
    let evaluation = shared.evaluation(&recipe.plan)?;
    let photos = shared.photos(&recipe.plan, recipe.model.image_height(), recipe.model.token_width())?;
    let output = Output::open(&shared.output, shared.resume, ranks)?;
    let networks = Networks {
        perceptual: perceptual.map(|path| Perceptual::open(path, &device)).transpose()?,
        semantic: semantic.map(|path| Semantic::open(path, &device)).transpose()?,
        evaluation,
    };
    let mut task =
        TokenizerTask::new(recipe, photos, initial.map(|(_, weights)| weights), networks, device, ranks.clone())?;
    train(&mut task, &output, shared.resume)?;
    if !ranks.is_first() {
        return Ok(());
    }
    let report = ReconstructionReport::new(&task)?;
    let text = serde_json::to_string_pretty(&report).or_run("report")?;
    files::write(&output.file("report.json"), text.as_bytes())?;
    eqim_cli::print(report.text())
}

fn generator(shared: &Shared, tokenizer: &Path, start: Option<Start>, ranks: &Rc<Ranks>) -> Result<()> {
    let mut recipe = shared.recipe()?;
    ranks.set_timeout(recipe.generator.plan.timeout);
    if let Some(start) = &start {
        recipe.generator.model = start.config.clone();
    }
    let device = shared.device(ranks)?;
    let (config, weights) = checkpoint::load_tokenizer_alone(tokenizer, None)?;
    let hash = FileRecord::at(tokenizer)?.sha256;
    generator::check_memory(&recipe.generator, &config, limits::memory())?;
    let evaluation = shared.evaluation(&recipe.generator.plan)?;
    let photos = shared.photos(&recipe.generator.plan, config.image_height(), config.token_width())?;
    let output = Output::open(&shared.output, shared.resume, ranks)?;
    let networks = generator::Networks { encoder: Encoder { config, weights, hash }, start, evaluation };
    let posterior_std = recipe.tokenizer.posterior_std;
    let cache = output.file("latents");
    let mut task =
        GeneratorTask::new(recipe.generator, posterior_std, photos, networks, &cache, device, ranks.clone())?;
    train(&mut task, &output, shared.resume)?;
    eqim_cli::print(format_args!("classes: {}", task.classes().join(", ")))
}

fn train(task: &mut impl Task, output: &Output, resume: bool) -> Result<()> {
    let start = if resume { output.resume(task)? } else { 0 };
    if resume {
        eqim_cli::note(format_args!("resuming after step {start}"));
    }
    run_task(task, output, start)?;
    let result = output.file(&format!("{}.safetensors", task.kind()));
    eqim_cli::print(format_args!("the {} is {}", task.kind(), result.display()))
}

/// Quality of the tokenizer's reconstructions of the photographs.
#[derive(Serialize)]
struct ReconstructionReport {
    /// Peak signal-to-noise ratio (PSNR) in dB of each training photograph, by file.
    training: Vec<(String, f64)>,
    /// PSNR in dB of each held-out photograph, by file.
    held_out: Vec<(String, f64)>,
}

impl ReconstructionReport {
    fn new(task: &TokenizerTask) -> Result<Self> {
        let (training, held_out) = task.photos();
        Ok(Self { training: task.psnr(training)?, held_out: task.psnr(held_out)? })
    }

    fn text(&self) -> String {
        let line = |name: &str, photos: &[(String, f64)]| {
            let mean = mean(photos.iter().map(|(_, psnr)| *psnr));
            format!("reconstruction of {} {name} photographs: PSNR {mean:.2} dB", photos.len())
        };
        match self.held_out.is_empty() {
            true => line("training", &self.training),
            false => format!("{}\n{}", line("training", &self.training), line("held-out", &self.held_out)),
        }
    }
}
