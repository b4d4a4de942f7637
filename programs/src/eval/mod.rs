//! `eqim-eval`: measures how good images are, by the features of a network.

mod bundle;
mod drift;
mod network;
mod reconstruction;
mod report;
mod sets;

use std::ffi::OsString;
use std::path::PathBuf;

use bundle::Generation;
use clap::{Args, Parser, Subcommand};
use drift::Drift;
use eqim::{Error, Result, ResultExt, files};
use eqim_cli::print;
use eqim_evaluation::features::Features;
use eqim_evaluation::metrics::{Metrics, Settings};
use eqim_evaluation::{inception, kernel};
use network::NetworkOptions;
use reconstruction::Reconstruction;
use report::Report;
use sets::{CropOptions, Sets};

/// Runs the program with its arguments, the first of which is its name. Returns the exit code of the process.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let arguments = Arguments::parse_from(arguments);
    eqim_cli::main(|| run(&arguments.command))
}

const EXAMPLES: &str = "\
Examples:
  eqim-eval compare images photos --crops 400
  eqim-eval bundle --engine bundle --count 400 -o images photos --crops 400
  eqim-eval reconstructions --engine bundle -o reconstructed photos --crops 400
  eqim-eval features photos --crops 400 -o photos.safetensors
  eqim-eval compare images VIRTUAL_imagenet256_labeled.npz --features inception.onnx --resize legacy
  eqim-eval drift panoramas photos.safetensors --every 8 --plot drift.png

IMAGES and REAL are folders of PNG and JPEG pictures, or files of features. The last three commands keep the features of
photographs, compute the published FID, and show the distance over the length of panoramas.";

/// Measure how good images are: distances between sets of images, by the features of a network.
///
/// The distances are the Fréchet distance (FID), the kernel distance (KID), precision, recall, density, coverage and the
/// inception score. They are called FID, KID and IS only for Inception's features. Progress and warnings go to standard
/// error, the report goes to standard output.
#[derive(Parser)]
#[command(name = "eqim-eval", version, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// The commands of `eqim-eval`.
#[derive(Subcommand)]
enum Command {
    /// Compare two sets of images.
    Compare {
        /// Folder of images, or file of features.
        images: PathBuf,
        #[command(flatten)]
        real: Real,
        #[command(flatten)]
        metrics: MetricOptions,
    },
    /// Generate images with a bundle, and compare them with real images. Images that already exist are not generated again.
    Bundle {
        #[command(flatten)]
        generation: Box<Generation>,
        #[command(flatten)]
        real: Real,
        #[command(flatten)]
        metrics: MetricOptions,
    },
    /// Encode and decode photographs with the tokenizer of a bundle, and compare the results with them (rFID, PSNR).
    Reconstructions {
        #[command(flatten)]
        reconstruction: Box<Reconstruction>,
        #[command(flatten)]
        real: Real,
        #[command(flatten)]
        metrics: MetricOptions,
    },
    /// Keep the features of a set of images in a file, to compare other sets with them.
    Features {
        /// Folder of images.
        images: PathBuf,
        #[command(flatten)]
        network: NetworkOptions,
        #[command(flatten)]
        crops: CropOptions,
        /// File to write.
        #[arg(short, long, value_name = "FILE.safetensors")]
        output: PathBuf,
    },
    /// Compare the squares of panoramas at every position with real images: quality over the length.
    Drift(Box<Drift>),
}

/// The images to compare with, and how features are made.
#[derive(Args)]
struct Real {
    /// Folder of real images, or file of features: of `eqim-eval features`, or an .npz with mu and sigma.
    real: PathBuf,
    #[command(flatten)]
    network: NetworkOptions,
    #[command(flatten)]
    crops: CropOptions,
}

/// Settings of the distances.
#[derive(Args)]
struct MetricOptions {
    /// Subsets of the kernel distance.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    kernel_subsets: u32,
    /// Images of a subset of the kernel distance; fewer if a set has fewer.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(2..=100_000))]
    kernel_subset_size: u32,
    /// Nearest neighbours of precision, recall, density and coverage.
    #[arg(long, value_name = "K", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    neighbours: u32,
    /// Parts of the inception score.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    splits: u32,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

impl MetricOptions {
    fn settings(&self) -> Settings {
        let kernel = kernel::Settings {
            subsets: self.kernel_subsets as usize,
            subset_size: self.kernel_subset_size as usize,
            ..kernel::Settings::default()
        };
        let inception = inception::Settings { splits: self.splits as usize, ..inception::Settings::default() };
        Settings { kernel, inception, neighbours: self.neighbours as usize }
    }
}

fn run(command: &Command) -> Result<()> {
    match command {
        Command::Compare { images, real, metrics } => {
            let (images, real) = Sets::new(&real.network, &real.crops).pair(images, &real.real)?;
            compare(&images, &real, None, metrics)
        }
        Command::Reconstructions { reconstruction, real, metrics } => {
            let sets = Sets::new(&real.network, &real.crops);
            // A network that cannot be used is found before the photographs are reconstructed.
            sets.network()?;
            let pairs = reconstruction.run(&real.real)?;
            let (images, real) = sets.pair(&pairs.reconstructions, &pairs.photographs)?;
            compare(&images, &real, Some(pairs.psnr), metrics)
        }
        Command::Bundle { generation, real, metrics } => {
            let sets = Sets::new(&real.network, &real.crops);
            let jobs = generation.jobs()?;
            let real = sets.features(&real.real)?;
            // Sets that cannot be compared are found before the images are generated.
            if let Some(of_real) = &real.origin {
                sets.origin(&generation.output, None)?.check_comparable(of_real)?;
            }
            generation.run(&jobs)?;
            compare(&sets.features(&generation.output)?, &real, None, metrics)
        }
        Command::Features { images, network, crops, output } => {
            if output.extension().is_none_or(|extension| extension != "safetensors") {
                return Err(Error::input(output.display(), "expected a name that ends in .safetensors"));
            }
            files::check_output(output)?;
            let features = Sets::new(network, crops).features(images)?;
            features.write(output)?;
            print(format_args!("features of {} images in {}", features.count().unwrap_or_default(), output.display()))
        }
        Command::Drift(drift) => drift.run(),
    }
}

/// Prints the distances of two sets, after the PSNR of each image to its original, if there is one.
fn compare(images: &Features, real: &Features, psnr: Option<Vec<f64>>, options: &MetricOptions) -> Result<()> {
    for (name, set) in [("the first set", images), ("the second set", real)] {
        if let Some(rank) = set.moments.missing_rank() {
            let (count, width) = (rank + 1, set.moments.mean.len());
            tracing::warn!(
                "{name} has {count} images for {width} features: its covariance has at most rank {rank}, and the Fréchet \
                 distance depends on the number of images"
            );
        }
    }
    let settings = options.settings();
    let report = Report { images, real, psnr, settings, metrics: Metrics::new(images, real, settings)? };
    print(if options.json { serde_json::to_string_pretty(&report.json()).or_run("report")? } else { report.text() })
}
