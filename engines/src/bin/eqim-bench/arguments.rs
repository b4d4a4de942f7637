//! The flags of `eqim-bench`.

use std::path::PathBuf;

use clap::Parser;
use eqim::model::Stage;
use eqim::request::MOST_TOKENS;
use eqim::request::settings::SamplingSettings;

use eqim_cli::flags::within;
use eqim_engines::Backend;

const EXAMPLES: &str = "\
Examples:
  eqim-bench --engine bundle --tokens 16,64 --batch 1,4
  eqim-bench --engine fp32 --engine int8 --cfg 7 --stage flow --duration 10
  eqim-bench --engine fp32 --engine int8 --cfg 7 --pytorch EquivariantModeling --python python3 --iterations 1
  eqim-bench --engine bundle --solvers
  eqim-bench --engine bundle --tiling --tokens 512
  eqim-bench --engine bundle --equivariance --images photos --plot equivariance.png";

/// Measure how fast bundles run, against each other, the machine's limits and the reference.
///
/// All that take part make the same images in turn, from the same noise, and a ratio is printed only when their tokens agree.
#[derive(Clone, Debug, Parser)]
#[command(name = "eqim-bench", version, after_help = EXAMPLES, allow_negative_numbers = true)]
pub struct Arguments {
    /// Folder of an exported model; several are compared
    #[arg(long = "engine", value_name = "BUNDLE", required = true)]
    pub engines: Vec<PathBuf>,

    /// Also run the reference's algorithm on Candle, with the weights of the first bundle: the whole sequence again for every
    /// token, modulations inside the loop
    #[arg(long)]
    pub reference: bool,

    /// Also run the PyTorch reference of this checkout, with the weights of the first bundle
    #[arg(long, value_name = "CHECKOUT", requires = "python")]
    pub pytorch: Option<PathBuf>,

    /// Python that has what the checkout needs
    #[arg(long, value_name = "PROGRAM", requires = "pytorch")]
    pub python: Option<PathBuf>,

    /// Instead, print how far every solver lies from 1000 and from 100 steps of euler, by evaluations of the flow head
    #[arg(long, conflicts_with_all = ["reference", "pytorch", "stage", "tail"])]
    pub solvers: bool,

    /// Instead, print how far images decoded in tiles lie from images decoded as a whole, over tile and overlap
    #[arg(long, group = "of_images", conflicts_with_all = ["reference", "pytorch", "stage", "tail", "solvers"])]
    pub tiling: bool,

    /// Instead, print how equivariant the model is on the pictures of --images: tokens of shifted images, the loss by position
    #[arg(long, group = "of_images", requires = "images", conflicts_with_all = ["reference", "pytorch", "stage", "tail", "solvers"])]
    pub equivariance: bool,

    /// Folder of pictures. For --equivariance its folders are classes, by name or else in their order; for --tiling, all
    /// pictures side by side are decoded instead of a generated image
    #[arg(long, value_name = "FOLDER", requires = "of_images")]
    pub images: Option<PathBuf>,

    /// Tokens of the images that the model was trained on
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = tokens_of_row, requires = "equivariance")]
    pub trained: usize,

    /// Positions that the loss is measured at
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = tokens_of_row, requires = "equivariance")]
    pub positions: usize,

    /// Draw what --equivariance finds into this PNG
    #[arg(long, value_name = "PNG", requires = "equivariance")]
    pub plot: Option<PathBuf>,

    /// Measure one stage by itself, of prefill, step, flow and decoder [default: whole images, stage by stage]
    #[arg(long, value_name = "STAGE", value_parser = measured, conflicts_with_all = ["reference", "pytorch", "tail"])]
    pub stage: Option<Stage>,

    /// Lengths of images in tokens
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "16", value_parser = tokens)]
    pub tokens: Vec<usize>,

    /// Images at once
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1", value_parser = batch)]
    pub batch: Vec<usize>,

    /// Time the last N tokens of an image only, without decoding: those before them are given
    #[arg(long, value_name = "N", value_parser = least_one)]
    pub tail: Option<usize>,

    /// How tokens are sampled. The reference always uses euler, and the model's steps; guidance is 7 by default.
    #[command(flatten)]
    pub sampling: SamplingSettings,

    /// Work for at least this long before measuring, milliseconds
    #[arg(long = "warmUp", value_name = "MS", default_value_t = 200)]
    pub warm_up: u64,

    /// Measure for at least this long, seconds
    #[arg(long, value_name = "S", default_value_t = 3)]
    pub duration: u64,

    /// Measure at least so many times
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = least_one)]
    pub iterations: usize,

    /// Percentiles to print
    #[arg(long = "percentile", value_name = "P,…", value_delimiter = ',', default_value = "90,95,99", value_parser = percentile)]
    pub percentiles: Vec<f64>,

    /// What runs the bundles
    #[arg(long, value_enum, value_name = "BACKEND", default_value_t)]
    pub backend: Backend,

    /// Threads of ONNX Runtime, several are compared; PyTorch takes the last [default: every core]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = least_one)]
    pub threads: Vec<usize>,

    /// Write everything measured to this JSON
    #[arg(long = "export-json", value_name = "FILE")]
    pub export_json: Option<PathBuf>,

    /// Write the tables to this Markdown
    #[arg(long = "export-markdown", value_name = "FILE")]
    pub export_markdown: Option<PathBuf>,
}

impl Arguments {
    /// Seed of the noise.
    pub fn seed(&self) -> u64 {
        self.sampling.seed.unwrap_or_default()
    }
}

fn tokens(text: &str) -> Result<usize, String> {
    within(text, 2..=MOST_TOKENS)
}

fn tokens_of_row(text: &str) -> Result<usize, String> {
    within(text, 2..=4096)
}

fn batch(text: &str) -> Result<usize, String> {
    within(text, 1..=4096)
}

fn least_one(text: &str) -> Result<usize, String> {
    within(text, 1..=MOST_TOKENS)
}

fn measured(text: &str) -> Result<Stage, String> {
    let stage: Stage = text.parse().map_err(|error: eqim::Error| error.to_string())?;
    if stage == Stage::Encoder { Err("the encoder is not measured".into()) } else { Ok(stage) }
}

fn percentile(text: &str) -> Result<f64, String> {
    within(text, 0.0..=100.0)
}
