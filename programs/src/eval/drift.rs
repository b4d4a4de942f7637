//! Quality over the length of panoramas.

use std::path::{Path, PathBuf};

use clap::Args;
use eqim::{Error, Result, ResultExt, files};
use eqim_cli::chart::{self, Chart, Scale, Series, Style};
use eqim_cli::{Spinner, print};
use eqim_evaluation::drift::{Place, Steps, curve, seams};
use eqim_evaluation::pictures::Pictures;

use super::Real;
use super::report;
use super::sets::{Sets, report_skipped};

/// What is compared over the length.
#[derive(Args)]
pub struct Drift {
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
}

impl Drift {
    /// Measures the curve and reports it.
    ///
    /// # Errors
    /// [`Error::input`] if the images cannot be compared; [`Error::run`] if the network fails.
    pub fn run(&self) -> Result<()> {
        self.plot.as_deref().map(files::check_output).transpose()?;
        let steps = Steps { token_width: self.token_width as usize, every: self.every as usize };
        let panoramas = Pictures::open(&self.panoramas, 1)?;
        report_skipped(&panoramas);
        let (_, height) = panoramas.size()?;
        let squares = height / steps.token_width;
        if squares == 0 {
            let problem = format!("is {}, expected at most the height {height}", steps.token_width);
            return Err(Error::setting("token_width", problem));
        }
        let sets = Sets::new(&self.real.network, &self.real.crops);
        let (real, origin) = (sets.features(&self.real.real)?, sets.origin(&self.panoramas, Some(height))?);
        let spinner = Spinner::new();
        let shown = |count: usize| spinner.show(format!("{count} positions"));
        let places = curve(&panoramas, &real, sets.network()?, (steps, sets.protocol()), &origin, shown)?;
        spinner.finish();
        if let Some(path) = &self.plot {
            let title = format!("Fréchet distance of squares, {}", origin.network);
            draw(path, &title, &origin.images, &places)?;
        }
        let width = real.moments.mean.len();
        if let Some(images) = places.iter().map(|place| place.images).min().filter(|&images| images <= width) {
            tracing::warn!(
                "a position has {images} images for {width} features: compare its distance only with those of as many images"
            );
        }
        let distance = self.seams.map(|distance| distance as usize);
        let seams = distance.and_then(|distance| seams(&places, squares, distance));
        if distance.is_some() && seams.is_none() {
            tracing::warn!("all squares have a seam, or none has: lower --every, or correct --seams");
        }
        let report = report::Drift { origin, places, seams };
        print(if self.json { serde_json::to_string_pretty(&report).or_run("report")? } else { report.text() })
    }
}

/// Draws the distance over the first token of the squares.
fn draw(path: &Path, title: &str, name: &str, places: &[Place]) -> Result<()> {
    let points = places.iter().map(|place| (place.token as f64, place.frechet_distance)).collect();
    let chart = Chart {
        title,
        x: "first token of the square",
        x_scale: Scale::Linear,
        y: "Fréchet distance",
        series: vec![Series { name, points, style: Style::Line }],
    };
    chart::draw(path, &[chart])
}
