//! `eqim-eval`: measures how good images are, by the features of a network.

mod bundle;
mod network;
mod report;
mod sets;

use std::ffi::OsString;
use std::path::PathBuf;

use bundle::Generation;
use clap::{Args, Parser, Subcommand};
use eqim::{Error, Result, ResultExt, files};
use eqim_cli::chart::{self, Chart, Scale, Series, Style};
use eqim_cli::print;
use eqim_evaluation::drift::{self, Steps};
use eqim_evaluation::features::Features;
use eqim_evaluation::metrics::{Metrics, Settings};
use eqim_evaluation::pictures::Pictures;
use eqim_evaluation::{inception, kernel};
use network::NetworkOptions;
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
    Drift {
        /// Folder of panoramas of the same height.
        panoramas: PathBuf,
        #[command(flatten)]
        real: Real,
        /// Width of a token in pixels.
        #[arg(long, value_name = "PIXELS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
        token_width: u32,
        /// Distance of two positions in tokens.
        #[arg(long, value_name = "TOKENS", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=65536))]
        every: u32,
        /// Distance of the seams of tiles in tokens, to compare squares with a seam with the others.
        #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=65536))]
        seams: Option<u32>,
        /// Chart to write.
        #[arg(long, value_name = "PNG")]
        plot: Option<PathBuf>,
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
    },
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
            compare(&images, &real, metrics)
        }
        Command::Bundle { generation, real, metrics } => {
            let sets = Sets::new(&real.network, &real.crops);
            // A folder that cannot be compared is found before the images are generated.
            let real = sets.features(&real.real)?;
            generation.run()?;
            compare(&sets.features(&generation.output)?, &real, metrics)
        }
        Command::Features { images, network, crops, output } => {
            files::check_output(output)?;
            let features = Sets::new(network, crops).features(images)?;
            features.write(output)?;
            print(format_args!("features of {} images in {}", features.count().unwrap_or_default(), output.display()))
        }
        Command::Drift { panoramas, real, token_width, every, seams, plot, json } => {
            let steps = Steps { token_width: *token_width as usize, every: *every as usize };
            let seams = seams.map(|tokens| tokens as usize);
            over_length(panoramas, real, steps, seams, plot.as_deref(), *json)
        }
    }
}

fn compare(images: &Features, real: &Features, options: &MetricOptions) -> Result<()> {
    for (name, set) in [("the first set", images), ("the second set", real)] {
        if let Some(rank) = set.moments.missing_rank() {
            let (count, width) = (rank + 1, set.moments.mean.len());
            tracing::warn!(
                "{name} has {count} images for {width} features: its covariance has at most rank {rank}, and the Fréchet \
                 distance depends on the number of images"
            );
        }
    }
    let metrics = Metrics::new(images, real, options.settings())?;
    print(match options.json {
        true => serde_json::to_string_pretty(&report::Report { images, real, metrics }.json()).or_run("report")?,
        false => report::Report { images, real, metrics }.text(),
    })
}

fn over_length(
    folder: &std::path::Path,
    real: &Real,
    steps: Steps,
    seams: Option<usize>,
    plot: Option<&std::path::Path>,
    json: bool,
) -> Result<()> {
    plot.map(files::check_output).transpose()?;
    let sets = Sets::new(&real.network, &real.crops);
    let known = sets.features(&real.real)?;
    let network = sets.network()?;
    let panoramas = Pictures::open(folder, 1)?;
    sets::report_skipped(&panoramas);
    let (_, height) = panoramas.size()?;
    let origin = sets.origin(folder, Some(height))?;
    let squares = height / steps.token_width;
    if squares == 0 {
        return Err(Error::input("--token-width", format!("is {}, more than the height {height}", steps.token_width)));
    }
    let spinner = eqim_cli::Spinner::new();
    let shown = |count: usize| spinner.show(format!("{count} positions"));
    let places = drift::curve(&panoramas, &known, network, (steps, sets.protocol()), &origin, shown)?;
    spinner.finish();
    let seams = seams.and_then(|distance| drift::seams(&places, squares, distance));
    if let Some(path) = plot {
        let points = places.iter().map(|place| (place.token as f64, place.frechet_distance)).collect();
        let name = folder.display().to_string();
        let title = format!("Fréchet distance of squares, {}", origin.network);
        let chart = Chart {
            title: &title,
            x: "first token of the square",
            x_scale: Scale::Linear,
            y: "Fréchet distance",
            series: vec![Series { name: &name, points, style: Style::Line }],
        };
        chart::draw(path, &[chart])?;
    }
    let report = report::Drift { origin, places, seams };
    print(if json { serde_json::to_string_pretty(&report).or_run("report")? } else { report.text() })
}
