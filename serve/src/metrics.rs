//! Metrics of requests and of models, in the format of Prometheus.

use std::sync::Arc;

use prometheus::{Histogram, HistogramOpts, IntCounterVec, Opts, Registry, TextEncoder};

use crate::model::Model;

/// Upper ends of the intervals in which times are counted, in seconds.
const SECONDS: [f64; 14] = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Metrics of requests. Those of models are read from their threads.
pub struct Metrics {
    registry: Registry,
    /// Requests by route and status.
    pub requests: IntCounterVec,
    /// Seconds from the request to the first columns of an image.
    pub first_strip: Histogram,
    /// Seconds between two tokens of an image; the first is counted from the request.
    pub token: Histogram,
    /// Seconds from the request to the image.
    pub image: Histogram,
}

impl Metrics {
    /// Metrics without values.
    ///
    /// # Errors
    /// If a name is used twice.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let times = |name: &str, help: &str| -> prometheus::Result<Histogram> {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok(histogram)
        };
        let first_strip = times("eqim_first_strip_seconds", "Time from the request to the first columns of an image")?;
        let token = times("eqim_token_seconds", "Time between two tokens of an image")?;
        let image = times("eqim_image_seconds", "Time from the request to the image")?;
        let requests = Opts::new("eqim_requests_total", "Requests by route and status");
        let requests = IntCounterVec::new(requests, &["route", "status"])?;
        registry.register(Box::new(requests.clone()))?;
        Ok(Self { registry, requests, first_strip, token, image })
    }

    /// All metrics as text, in the format of Prometheus.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn text(&self, models: &[Arc<Model>]) -> prometheus::Result<String> {
        Ok(TextEncoder::new().encode_to_string(&self.registry.gather())? + &of_models(models))
    }
}

/// The metrics of all models as text.
fn of_models(models: &[Arc<Model>]) -> String {
    let mut families: Vec<(&str, &str, &str, Vec<String>)> = vec![
        ("eqim_waiting_images", "gauge", "Images that wait", vec![]),
        ("eqim_pending_images", "gauge", "Images that were accepted and have not ended", vec![]),
        ("eqim_batch_images", "gauge", "Images in all batches", vec![]),
        ("eqim_batches", "gauge", "Batches", vec![]),
        ("eqim_tokens_total", "counter", "Generated tokens", vec![]),
        ("eqim_images_total", "counter", "Images by outcome", vec![]),
        ("eqim_stage_seconds_total", "counter", "Time of the calls of a stage", vec![]),
        ("eqim_stage_calls_total", "counter", "Calls of a stage", vec![]),
    ];
    for model in models {
        let (name, metrics) = (&model.name, model.state().metrics.clone());
        let name = name.replace('\\', "\\\\").replace('"', "\\\"");
        let mut add = |family: usize, label: &str, value: String| {
            let metric = families[family].0;
            families[family].3.push(format!("{metric}{{model=\"{name}\"{label}}} {value}\n"));
        };
        add(0, "", metrics.waiting.to_string());
        add(1, "", model.pending().to_string());
        add(2, "", metrics.batches.iter().sum::<usize>().to_string());
        add(3, "", metrics.batches.len().to_string());
        add(4, "", metrics.tokens.to_string());
        for (outcome, count) in [("done", metrics.done), ("failed", metrics.failed), ("cancelled", metrics.cancelled)] {
            add(5, &format!(",outcome=\"{outcome}\""), count.to_string());
        }
        let stages = [
            ("prefill", metrics.prefill),
            ("transformer_step", metrics.step),
            ("flow_sampler", metrics.flow),
            ("decoder", metrics.decoder),
        ];
        for (stage, calls) in stages {
            let label = format!(",stage=\"{stage}\"");
            add(6, &label, calls.time.as_secs_f64().to_string());
            add(7, &label, calls.count.to_string());
        }
    }
    let family = |(name, kind, help, lines): &(&str, &str, &str, Vec<String>)| {
        format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{}", lines.concat())
    };
    families.iter().map(family).collect()
}
