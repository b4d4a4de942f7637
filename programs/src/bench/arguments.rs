//! The flags of `eqim-bench`.

use std::path::PathBuf;

use clap::Parser;
use eqim::model::Stage;
use eqim::request::MOST_TOKENS;
use eqim::request::settings::SamplingSettings;

use eqim_cli::flags::within;
use eqim_engines::Backend;
use eqim_engines::onnxruntime::Providers;

use super::predict::Machine;

const EXAMPLES: &str = "\
Examples:
  eqim-bench --engine bundle --tokens 16,64 --batch 1,4
  eqim-bench --engine fp32 --engine int8 --cfg 7 --stage flow --duration 10
  eqim-bench --engine fp32 --engine int8 --cfg 7 --pytorch EquivariantModeling --python python3 --iterations 1
  eqim-bench --engine fp32 --engine int8 --solvers --plot solvers.png
  eqim-bench --engine bundle --on l4 --on h100
  eqim-bench --engine bundle --tiling --tokens 512
  eqim-bench --engine bundle --equivariance --images photos --plot equivariance.png";

/// Measure how fast bundles run, compared with each other, with the limits of the machine and with the reference.
///
/// All candidates generate the same images in turn, from the same noise. A ratio is printed only if their tokens agree.
#[derive(Clone, Debug, Parser)]
#[command(name = "eqim-bench", version, after_help = EXAMPLES, allow_negative_numbers = true)]
// The guidance scale of the published images.
#[command(mut_arg("cfg", |arg| arg.default_value("7")))]
pub struct Arguments {
    /// Folder of an exported model; repeat the flag to compare several
    #[arg(long = "engine", value_name = "BUNDLE", required = true)]
    pub engines: Vec<PathBuf>,

    /// Also run the algorithm of the reference on Candle, with the weights of the first bundle: it runs the whole
    /// sequence for every token and computes the modulations inside the loop of the ODE
    #[arg(long)]
    pub reference: bool,

    /// Also run the PyTorch reference of this checkout, with the weights of the first bundle
    #[arg(long, value_name = "CHECKOUT", requires = "python")]
    pub pytorch: Option<PathBuf>,

    /// Also run the PyTorch reference with a tuned flow head: hoisted modulations, compiled, in bfloat16, and in dynamic INT8
    #[arg(long, requires = "pytorch")]
    pub pytorch_tuned: bool,

    /// Python interpreter with the packages that the checkout needs
    #[arg(long, value_name = "PROGRAM", requires = "pytorch")]
    pub python: Option<PathBuf>,

    /// Print the time of every solver on every bundle, its distance from 1000 Euler steps of the first bundle and from the
    /// model's number of Euler steps, by evaluations of the flow head. References take their own number of steps
    #[arg(long, group = "drawn", conflicts_with_all = ["stage", "tail"])]
    pub solvers: bool,

    /// Instead of timings, predict the limits of another machine: l4, a100, h100, rtx4090, or its numbers, for example
    /// GBs=36,TFLOPs=0.45,INT8=1.9; can be given several times
    #[arg(long, value_name = "MACHINE", conflicts_with_all = ["reference", "pytorch", "stage", "tail", "solvers"])]
    pub on: Vec<Machine>,

    /// Instead of timings, print the difference between images decoded in tiles and images decoded as a whole, by tile
    /// and overlap
    #[arg(long, group = "of_images", conflicts_with_all = ["reference", "pytorch", "stage", "tail", "solvers", "on"])]
    pub tiling: bool,

    /// Instead of timings, print the equivariance of the model on the pictures of --images: tokens of shifted images,
    /// and the loss by position
    #[arg(long, groups = ["of_images", "drawn"], requires = "images", conflicts_with_all = ["reference", "pytorch", "stage", "tail", "solvers", "on"])]
    pub equivariance: bool,

    /// Folder of pictures. With --equivariance, its sub-folders are classes, matched by name or else by order. With
    /// --tiling, all pictures side by side are decoded instead of a generated image
    #[arg(long, value_name = "FOLDER", requires = "of_images")]
    pub images: Option<PathBuf>,

    /// Length in tokens of the images that the model was trained on
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = tokens_of_row, requires = "equivariance")]
    pub trained: usize,

    /// Number of positions to measure the loss at
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = tokens_of_row, requires = "equivariance")]
    pub positions: usize,

    /// Draw the results of --equivariance, or time and distance of --solvers, to this PNG
    #[arg(long, value_name = "PNG", requires = "drawn")]
    pub plot: Option<PathBuf>,

    /// Measure only one stage: prefill, step, flow or decoder [default: whole images, stage by stage]
    #[arg(long, value_name = "STAGE", value_parser = measured, conflicts_with_all = ["reference", "pytorch", "tail"])]
    pub stage: Option<Stage>,

    /// Lengths of the images in tokens
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "16", value_parser = tokens)]
    pub tokens: Vec<usize>,

    /// Batch sizes
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1", value_parser = batch)]
    pub batch: Vec<usize>,

    /// Time only the last N tokens of an image, without decoding; the tokens before them are given
    #[arg(long, value_name = "N", value_parser = least_one)]
    pub tail: Option<usize>,

    /// Sampling of the tokens. The reference always uses euler. If the bundles use another solver, it takes the model's
    /// number of steps. The default guidance is 7.
    #[command(flatten)]
    pub sampling: SamplingSettings,

    /// Run for at least MS milliseconds to warm up before measuring
    #[arg(long = "warmUp", value_name = "MS", default_value_t = 200)]
    pub warm_up: u64,

    /// Measure for at least S seconds
    #[arg(long, value_name = "S", default_value_t = 3)]
    pub duration: u64,

    /// Run at least N iterations
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = least_one)]
    pub iterations: usize,

    /// Percentiles of the times to print
    #[arg(long = "percentile", value_name = "P,…", value_delimiter = ',', default_value = "90,95,99", value_parser = percentile)]
    pub percentiles: Vec<f64>,

    /// Device of --backend candle and of --pytorch: cpu, or cuda:N if built with the feature cuda [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,

    /// Backend that runs the bundles
    #[arg(long, value_enum, value_name = "BACKEND", default_value_t)]
    pub backend: Backend,

    /// Numbers of threads of ONNX Runtime to compare; PyTorch uses the last one [default: all cores]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = least_one)]
    pub threads: Vec<usize>,

    /// Execution providers of ONNX Runtime
    #[command(flatten)]
    pub providers: Providers,

    /// Write all measurements to this JSON file
    #[arg(long = "export-json", value_name = "FILE")]
    pub export_json: Option<PathBuf>,

    /// Write the tables to this Markdown file
    #[arg(long = "export-markdown", value_name = "FILE")]
    pub export_markdown: Option<PathBuf>,
}

impl Arguments {
    /// Whether everything that is measured runs on the CPU.
    pub fn is_cpu(&self) -> bool {
        self.providers.is_cpu() && self.device.as_deref().is_none_or(|device| device == "cpu")
    }

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
