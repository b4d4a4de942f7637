//! `eqim-bench --equivariance`: measures how equivariant a model is. For the tokenizer: are the tokens of a shifted
//! image equal to the shifted tokens of the image? For the generator: is the flow loss the same at every position?

mod positions;
mod shifts;
mod subject;

use std::fmt::Write;
use std::path::Path;

use eqim::Result;
use eqim_cli::chart::{self, Chart, Scale, Series, Style};
use eqim_cli::table;
use serde::Serialize;

use super::photos::photos;
use positions::{Band, Position};
use shifts::Shift;
pub use subject::Subject;

/// Results of a measurement.
#[derive(Debug, Serialize)]
pub struct Equivariance {
    /// Number of pictures.
    pub images: usize,
    /// How the classes of the pictures were determined.
    pub classes: &'static str,
    /// Equivariance of the tokenizer, by shift.
    pub shifts: Vec<Shift>,
    /// Flow loss, by position.
    pub loss: Vec<Position>,
    /// Flow loss, by what training has seen of the positions.
    pub bands: Vec<Band>,
}

/// Measures the equivariance. `progress` receives a description of the next work.
///
/// # Errors
/// [`eqim::Error::input`] if the pictures cannot be used; [`eqim::Error::run`] if the engine fails.
pub fn measure(subject: &Subject, progress: &mut dyn FnMut(String)) -> Result<Equivariance> {
    let config = subject.engine.config();
    let (photos, classes) = photos(subject.images, config)?;
    let shifts = shifts::measure(subject, &photos, progress)?;
    let (loss, bands) = positions::measure(subject, &photos, progress)?;
    Ok(Equivariance { images: photos.len(), classes, shifts, loss, bands })
}

impl Equivariance {
    /// Writes the results as tables in Markdown.
    pub fn table(&self, text: &mut String) {
        let Self { images, classes, shifts, bands, .. } = self;
        let _ = writeln!(text, "{images} pictures, classes from {classes}\n");
        let _ =
            writeln!(text, "Tokens of the shifted image compared with the shifted tokens, relative to their norm:\n");
        let part = |value: &f64| format!("{value:.4}");
        let shift = |Shift { pixels, tokens, images, all, inside, unshifted }: &Shift| {
            let inside = inside.as_ref().map_or(String::new(), part);
            vec![pixels.to_string(), tokens.to_string(), images.to_string(), part(all), inside, part(unshifted)]
        };
        let head = ["shift, pixels", "tokens", "images", "all", "inside", "not shifted"];
        let _ = writeln!(text, "{}", table::markdown(&head, shifts.iter().map(shift)));
        let _ = writeln!(text, "\nThe flow loss by position:\n");
        let band = |Band { first, last, what, loss, error, ratio }: &Band| {
            vec![format!("{first} to {last}"), what.to_string(), part(loss), part(error), part(ratio)]
        };
        let head = ["positions", "in training", "loss", "±", "relative to positions with full context in training"];
        let _ = writeln!(text, "{}", table::markdown(&head, bands.iter().map(band)));
    }

    /// Draws the results of the tokenizer and of the generator to a PNG.
    ///
    /// # Errors
    /// [`eqim::Error::run`] if the file cannot be written.
    pub fn draw(&self, path: &Path, title: &str) -> Result<()> {
        let shifted = |name, value: &dyn Fn(&Shift) -> Option<f64>| {
            let points = self.shifts.iter().filter_map(|shift| Some((shift.tokens, value(shift)?))).collect();
            Series { name, points, style: Style::Line }
        };
        let losses = self.bands.iter().map(|band| {
            let here = self.loss.iter().filter(|position| (band.first..=band.last).contains(&position.position));
            let points = here.map(|position| (position.position as f64, position.loss)).collect();
            Series { name: band.what, points, style: Style::Line }
        });
        let titles = [format!("{title}: tokens of shifted images"), format!("{title}: flow loss by position")];
        let charts = [
            Chart {
                title: &titles[0],
                x: "shift in tokens",
                x_scale: Scale::Linear,
                y: "distance from the shifted tokens, relative to their norm",
                series: vec![
                    shifted("all tokens", &|shift| Some(shift.all)),
                    shifted("inside: away from edges", &|shift| shift.inside),
                    shifted("if the tokens were not shifted", &|shift| Some(shift.unshifted)),
                ],
            },
            Chart {
                title: &titles[1],
                x: "position",
                x_scale: Scale::Linear,
                y: "flow loss",
                series: losses.collect(),
            },
        ];
        chart::draw(path, &charts)
    }
}
