//! The reports of `eqim-eval`.

use eqim_cli::table;
use eqim_evaluation::drift::{Place, Seams};
use eqim_evaluation::features::{Features, Origin};
use eqim_evaluation::metrics::{Metrics, Settings};
use eqim_training::tokenizer::mean;
use serde::Serialize;
use serde_json::{Value, json};

/// The distances of two sets.
pub struct Report<'a> {
    /// The first set.
    pub images: &'a Features,
    /// The second set.
    pub real: &'a Features,
    /// PSNR in dB of each image of the first set to its original in the second.
    pub psnr: Option<Vec<f64>>,
    /// Settings of the distances.
    pub settings: Settings,
    /// Their distances.
    pub metrics: Metrics,
}

impl Report<'_> {
    /// As JSON: how the features were made, the settings, and the distances.
    pub fn json(&self) -> Value {
        let set = |set: &Features| json!({ "source": set.source, "count": set.count(), "made": set.origin });
        let Settings { kernel, inception, neighbours } = self.settings;
        let settings = json!({
            "kernel_subsets": kernel.subsets,
            "kernel_subset_size": kernel.subset_size,
            "neighbours": neighbours,
            "splits": inception.splits,
        });
        let mut report = json!({ "images": set(self.images), "real": set(self.real), "settings": settings, "metrics": self.metrics });
        if let Some(psnr) = &self.psnr {
            report["psnr"] = json!(mean(psnr.iter().copied()));
        }
        report
    }

    /// As a table.
    pub fn text(&self) -> String {
        let metrics = &self.metrics;
        let deviated = |mean: Option<f64>, deviation: Option<f64>| match (mean, deviation) {
            (Some(mean), Some(deviation)) => format!("{mean:.4} ± {deviation:.4}"),
            (Some(mean), None) => format!("{mean:.4}"),
            _ => "–".into(),
        };
        let share = |value: Option<f64>| value.map_or("–".into(), |value| format!("{value:.3}"));
        let rows = [
            ("Fréchet distance", format!("{:.3}", metrics.frechet_distance)),
            ("kernel distance", deviated(metrics.kernel_distance, metrics.kernel_distance_deviation)),
            ("precision", share(metrics.precision)),
            ("recall", share(metrics.recall)),
            ("density", share(metrics.density)),
            ("coverage", share(metrics.coverage)),
            ("inception score", deviated(metrics.inception_score, metrics.inception_score_deviation)),
        ];
        let table = table::text(&["distance", "value"], rows.map(|(name, value)| vec![name.to_string(), value]));
        let psnr = self.psnr.as_ref().map_or(String::new(), |psnr| {
            format!("{} reconstructions: mean PSNR {:.2} dB\n", psnr.len(), mean(psnr.iter().copied()))
        });
        format!("{psnr}{}\n{table}", self.head())
    }

    /// What was compared, and how.
    fn head(&self) -> String {
        let of = |set: &Features| match set.count() {
            Some(count) => format!("{count} images of {}", set.source),
            None => format!("the statistics in {}", set.source),
        };
        let how = [self.images, self.real].into_iter().find_map(|set| set.origin.as_ref()).map_or_else(
            || format!("features of {} values", self.metrics.width),
            |origin| format!("{}, {}", described(origin), origin.parts()),
        );
        format!("{}, compared with {}\n{how}", of(self.images), of(self.real))
    }
}

fn described(origin: &Origin) -> String {
    format!("features of {}, resizing: {}", origin.network, origin.resize)
}

/// The distance over the length of panoramas.
#[derive(Serialize)]
pub struct Drift {
    /// How the features were made.
    pub origin: Origin,
    /// The distance at every position.
    pub places: Vec<Place>,
    /// The distance at seams, if it was asked for.
    pub seams: Option<Seams>,
}

impl Drift {
    /// As a table.
    pub fn text(&self) -> String {
        let row = |place: &Place| {
            vec![place.token.to_string(), place.images.to_string(), format!("{:.3}", place.frechet_distance)]
        };
        let table = table::text(&["first token", "images", "Fréchet distance"], self.places.iter().map(row));
        let seams = self.seams.map_or(String::new(), |Seams { with_seam, without_seam }| {
            format!("\nsquares with a seam: {with_seam:.3}, without: {without_seam:.3}")
        });
        let Origin { images, .. } = &self.origin;
        format!("squares of {images}\n{}, {}\n{table}{seams}", described(&self.origin), self.origin.parts())
    }
}
