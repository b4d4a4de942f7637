//! What a run did and how long it took.

use std::fmt::Write;
use std::time::Duration;

use eqim::engine::Engine;
use eqim::request::condition::ClassSchedule;
use eqim::request::timing::StageTimes;
use eqim::request::{Noise, Request};
use eqim::{Result, ResultExt};
use eqim_cli::{memory, table};
use serde::Serialize;

use super::arguments::Arguments;
use super::outputs::Outputs;

/// A finished run.
#[derive(Debug, Serialize)]
pub struct RunReport {
    /// The bundle's folder.
    engine: String,
    /// What ran it.
    backend: String,
    /// One an image; `null` is none, a list is of classes along the way.
    classes: Vec<ClassSchedule>,
    /// `null` when the noise was given.
    seed: Option<u64>,
    /// Length of an image, its prefix included.
    tokens: usize,
    /// Length of what was given.
    prefix_tokens: usize,
    /// Pixels.
    width: usize,
    /// Pixels.
    height: usize,
    /// Images in the order of the classes, then the tokens.
    files: Vec<String>,
    /// Where images were decoded in tiles.
    #[serde(skip_serializing_if = "Option::is_none")]
    tiles: Option<Tiles>,
    /// Largest resident size of the process; 0 where the system does not tell.
    peak_bytes: u64,
    seconds: Seconds,
    /// Without loading.
    images_per_second: f64,
    /// Generated tokens of all images, without loading, encoding and decoding.
    tokens_per_second: f64,
}

/// How long images were decoded.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Tiles {
    /// Tokens of a tile.
    pub tile: usize,
    /// Tokens that neighbours share.
    pub overlap: usize,
    /// Tiles of an image.
    pub count: usize,
    /// Tokens of all images that earlier runs had done.
    pub resumed_tokens: usize,
}

/// Seconds spent in each stage.
#[derive(Debug, Serialize)]
pub struct Seconds {
    load: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    encoder: Option<f64>,
    prefill: f64,
    /// How often conditions were computed: again where classes change along the way.
    #[serde(skip)]
    prefills: usize,
    transformer_step: f64,
    flow_sampler: f64,
    decoder: f64,
    /// All but `load`.
    total: f64,
    /// Where a GPU ran: the three stages above are then its own time.
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<Device>,
}

/// Seconds around the work of a GPU, generation only.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Device {
    /// The host's, handing over work.
    enqueue: f64,
    host_to_device: f64,
    device_to_host: f64,
}

impl Seconds {
    /// Where the time went; `encoder` when a picture was encoded.
    pub fn new(load: Duration, encoder: Option<Duration>, times: &StageTimes, decoder: Duration) -> Self {
        let total =
            encoder.unwrap_or_default() + times.prefill.total() + times.step.total() + times.flow.total() + decoder;
        Self {
            load: load.as_secs_f64(),
            encoder: encoder.map(|time| time.as_secs_f64()),
            prefill: times.prefill.total().as_secs_f64(),
            prefills: times.prefill.0.len(),
            transformer_step: times.step.total().as_secs_f64(),
            flow_sampler: times.flow.total().as_secs_f64(),
            decoder: decoder.as_secs_f64(),
            total: total.as_secs_f64(),
            device: times.device.map(|device| Device {
                enqueue: device.enqueue.as_secs_f64(),
                host_to_device: device.host_to_device.as_secs_f64(),
                device_to_host: device.device_to_host.as_secs_f64(),
            }),
        }
    }
}

impl RunReport {
    /// The report of a run that took `seconds`.
    pub fn new(
        arguments: &Arguments,
        engine: &dyn Engine,
        request: &Request,
        prefix_tokens: usize,
        outputs: &Outputs,
        tiles: Option<Tiles>,
        seconds: Seconds,
    ) -> Self {
        let (width, height) = engine.config().image_size(request.tokens);
        let images = request.classes.len();
        let resumed = tiles.map_or(0, |tiles| tiles.resumed_tokens);
        let generated = (images * (request.tokens - prefix_tokens)).saturating_sub(resumed);
        Self {
            engine: arguments.engine.display().to_string(),
            backend: engine.name().to_string(),
            classes: request.classes.clone(),
            seed: match request.noise {
                Noise::Seed(seed) => Some(seed),
                Noise::Given(_) => None,
            },
            tokens: request.tokens,
            prefix_tokens,
            width,
            height,
            files: outputs.all().map(|path| path.display().to_string()).collect(),
            tiles,
            peak_bytes: memory::peak(),
            images_per_second: images as f64 / seconds.total,
            tokens_per_second: generated as f64 / (seconds.prefill + seconds.transformer_step + seconds.flow_sampler),
            seconds,
        }
    }

    /// The report as JSON.
    ///
    /// # Errors
    /// Never for a run's numbers.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).or_run("report")
    }

    /// The report as text.
    pub fn text(&self) -> String {
        let Self { seconds, tokens, prefix_tokens, .. } = self;
        let images = self.classes.len();
        let stages = [
            ("encoder", seconds.encoder, 1),
            ("prefill", Some(seconds.prefill), seconds.prefills.max(1)),
            ("transformer step", Some(seconds.transformer_step), tokens - 1),
            ("flow sampler", Some(seconds.flow_sampler), tokens - prefix_tokens),
            ("decoder", Some(seconds.decoder), images * self.tiles.map_or(1, |tiles| tiles.count)),
        ];
        let mut text = format!("{} on {}, loaded in {:.2} s\n\n", self.engine, self.backend, seconds.load);
        let row = |(name, time, calls): (&str, Option<f64>, usize)| {
            let (mean, share) = (1e3 * time? / calls as f64, 100.0 * time? / seconds.total);
            Some(vec![
                name.into(),
                calls.to_string(),
                format!("{:.3}", time?),
                format!("{mean:.3}"),
                format!("{share:.1} %"),
            ])
        };
        let total = vec!["total".into(), String::new(), format!("{:.3}", seconds.total)];
        let rows = stages.into_iter().filter_map(row).chain([total]);
        let _ = writeln!(text, "{}\n", table::text(&["stage", "calls", "total s", "mean ms", "share"], rows));
        if let Some(Device { enqueue, host_to_device, device_to_host }) = seconds.device {
            let [enqueue, h2d, d2h] = [enqueue, host_to_device, device_to_host].map(|seconds| 1e3 * seconds);
            let _ = writeln!(text, "GPU: enqueue {enqueue:.3} ms, H2D {h2d:.3} ms, D2H {d2h:.3} ms\n");
        }
        let size = format!("{} × {} pixels", self.width, self.height);
        let _ = writeln!(text, "{images} × {size}: {:.3} images/s", self.images_per_second);
        let resumed = self.tiles.map_or(0, |tiles| tiles.resumed_tokens);
        let generated = (images * (tokens - prefix_tokens)).saturating_sub(resumed);
        let _ =
            writeln!(text, "{generated} tokens generated: {:.3} tokens/s without decoding\n", self.tokens_per_second);
        if let Some(Tiles { tile, overlap, resumed_tokens, .. }) = self.tiles {
            let _ = writeln!(
                text,
                "decoded in tiles of {tile} tokens, {overlap} shared; {resumed_tokens} tokens were done before"
            );
        }
        if self.peak_bytes > 0 {
            let _ = writeln!(text, "peak memory {} MB\n", self.peak_bytes >> 20);
        }
        text + "wrote " + &self.files.join(", ")
    }
}
