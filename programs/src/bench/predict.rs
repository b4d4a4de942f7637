//! Prediction of the limits of a bundle's model on another machine, from two numbers of that machine.

use std::fmt::Write;
use std::str::FromStr;

use eqim::Result;
use eqim::config::Config;
use eqim::model::Stage;
use eqim::ops::cost::Row;
use eqim::request::Request;
use eqim_cli::table;
use serde::Serialize;

use super::statistics::milliseconds;
use super::workload::rows;

/// A machine, by what limits it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// Name of the machine.
    pub name: String,
    /// Memory bandwidth, GB/s.
    pub bandwidth: f64,
    /// Speed of products in FP32, TFLOP/s.
    pub fp32: f64,
    /// Speed of products in FP16, TFLOP/s.
    pub fp16: f64,
    /// Speed of products in INT8, TOP/s.
    pub int8: f64,
    /// Time to launch one product, µs.
    pub launch: f64,
}

/// Known machines: name, GB/s, and TFLOP/s in FP32, FP16 and INT8 without sparsity, from the data sheets of NVIDIA (L4;
/// A100 80GB SXM; H100 SXM; GeForce RTX 4090 with FP32 accumulation).
const KNOWN: [(&str, [f64; 4]); 4] = [
    ("l4", [300.0, 30.3, 121.0, 242.0]),
    ("a100", [2039.0, 19.5, 312.0, 624.0]),
    ("h100", [3350.0, 66.9, 989.0, 1979.0]),
    ("rtx4090", [1008.0, 82.6, 165.2, 660.6]),
];

/// Time to launch one product on a GPU, µs: an assumption, in the middle of what CUDA graphs and single launches take.
const LAUNCH: f64 = 3.0;

impl FromStr for Machine {
    type Err = String;

    /// Parses the name of a known machine, or `GBs=…,TFLOPs=…` with the options `FP16`, `INT8` (the default of both is
    /// `TFLOPs`) and `us` (time to launch a product, default 0).
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((name, [bandwidth, fp32, fp16, int8])) = KNOWN.into_iter().find(|(name, _)| *name == text) {
            return Ok(Self { name: name.into(), bandwidth, fp32, fp16, int8, launch: LAUNCH });
        }
        let names = KNOWN.map(|(name, _)| name).join(", ");
        let expected = || format!("is {text}, expected {names} or GBs=…,TFLOPs=…[,FP16=…][,INT8=…][,us=…]");
        let mut numbers = [None; 5];
        for part in text.split(',') {
            let (key, value) = part.split_once('=').ok_or_else(expected)?;
            let place = ["GBs", "TFLOPs", "FP16", "INT8", "us"].iter().position(|known| *known == key);
            let value = value.parse().ok().filter(|value: &f64| value.is_finite() && (*value > 0.0 || key == "us"));
            numbers[place.ok_or_else(expected)?] = Some(value.filter(|value| *value >= 0.0).ok_or_else(expected)?);
        }
        let [bandwidth, fp32, fp16, int8, launch] = numbers;
        let (bandwidth, fp32) = bandwidth.zip(fp32).ok_or_else(expected)?;
        let (fp16, int8) = (fp16.unwrap_or(fp32), int8.unwrap_or(fp32));
        Ok(Self { name: text.into(), bandwidth, fp32, fp16, int8, launch: launch.unwrap_or_default() })
    }
}

/// Precision of weights and products.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floating point.
    Fp32,
    /// 16-bit floating point.
    Fp16,
    /// 8-bit integers, in every product.
    Int8,
}

impl Machine {
    /// Shortest possible time in seconds of products with this cost: the time to read the weights or to multiply,
    /// whichever is longer for each scope, and the launches.
    fn time<'a>(&self, rows: impl IntoIterator<Item = &'a Row>, precision: Precision) -> f64 {
        let (bytes, speed) = match precision {
            Precision::Fp32 => (4.0, self.fp32),
            Precision::Fp16 => (2.0, self.fp16),
            Precision::Int8 => (1.0, self.int8),
        };
        let time = |row: &Row| {
            let read = bytes * row.weights_read as f64 / (1e9 * self.bandwidth);
            let multiply = 2.0 * row.multiply_adds as f64 / (1e12 * speed);
            read.max(multiply) + 1e-6 * self.launch * row.products as f64
        };
        rows.into_iter().map(time).sum()
    }
}

/// Predicted limits on one machine.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// The machine.
    pub machine: Machine,
    /// Number of images per batch.
    pub batch: usize,
    /// Length of the images in tokens.
    pub tokens: usize,
    /// Evaluations of the velocity per token.
    pub evaluations: usize,
    /// Limits in each precision.
    pub limits: Vec<Limit>,
}

/// Predicted limits in one precision.
#[derive(Clone, Debug, Serialize)]
pub struct Limit {
    /// Precision of weights and products.
    pub precision: Precision,
    /// Seconds per call of prefill, step, flow sampler and decoder.
    pub stages: Vec<(&'static str, f64)>,
    /// Seconds per batch of images.
    pub batch: f64,
}

impl Prediction {
    /// Predicts the limits of a batch of images.
    ///
    /// # Errors
    /// If the configuration is not consistent.
    pub fn new(machine: &Machine, config: &Config, request: &Request) -> Result<Self> {
        let (batch, tokens) = (request.classes.len(), request.tokens);
        let evaluations = request.solver.evaluations(request.steps);
        let calls = [(Stage::Prefill, 1), (Stage::Step, tokens - 1), (Stage::Flow, tokens), (Stage::Decoder, batch)];
        let limit = |precision| {
            let mut limit = Limit { precision, stages: vec![], batch: 0.0 };
            for (stage, count) in calls {
                let cost = stage.cost(config, rows(config, stage, request), tokens, evaluations)?;
                let seconds = machine.time(cost.rows().values(), precision);
                limit.stages.push((stage.name(), seconds));
                limit.batch += seconds * count as f64;
            }
            Ok(limit)
        };
        let limits = [Precision::Fp32, Precision::Fp16, Precision::Int8].map(limit);
        let limits = limits.into_iter().collect::<Result<_>>()?;
        Ok(Self { machine: machine.clone(), batch, tokens, evaluations, limits })
    }

    /// Adds a table to a text.
    pub fn table(&self, text: &mut String) {
        let Machine { name, bandwidth, fp32, fp16, int8, launch } = &self.machine;
        let Self { batch, tokens, evaluations, .. } = self;
        let _ = writeln!(text, "\n=== Prediction, not measured: {name} ===");
        let _ = writeln!(
            text,
            "{bandwidth} GB/s, {fp32} TFLOP/s in FP32, {fp16} in FP16, {int8} TOP/s in INT8, {launch} µs per product"
        );
        let _ = writeln!(text, "batch {batch}, {tokens} tokens, {evaluations} evaluations per token; limits in ms\n");
        let head: Vec<&str> = ["precision"]
            .into_iter()
            .chain(self.limits.first().into_iter().flat_map(|limit| limit.stages.iter().map(|(stage, _)| *stage)))
            .chain(["batch of images", "images/s"])
            .collect();
        let row = |limit: &Limit| {
            let name = match limit.precision {
                Precision::Fp32 => "FP32",
                Precision::Fp16 => "FP16",
                Precision::Int8 => "INT8",
            };
            let stages = limit.stages.iter().map(|(_, seconds)| milliseconds(*seconds));
            let images = format!("{:.2}", *batch as f64 / limit.batch);
            [name.into()].into_iter().chain(stages).chain([milliseconds(limit.batch), images]).collect::<Vec<String>>()
        };
        let _ = writeln!(text, "{}", table::text(&head, self.limits.iter().map(row)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_names_or_numbers() {
        let machine: Machine = "l4".parse().unwrap();
        assert_eq!((machine.bandwidth, machine.fp16, machine.launch), (300.0, 121.0, LAUNCH));
        let machine: Machine = "GBs=36,TFLOPs=0.45,INT8=1.9".parse().unwrap();
        assert_eq!((machine.bandwidth, machine.fp32, machine.fp16, machine.int8), (36.0, 0.45, 0.45, 1.9));
        for bad in [
            "l40",
            "",
            "GBs=36",
            "GBs=36,TFLOPs=",
            "GBs=0,TFLOPs=1",
            "GBs=nan,TFLOPs=1",
            "GBs=1,TFLOPs=1,us=-1",
            "GBs=1,W=2",
        ] {
            assert!(bad.parse::<Machine>().unwrap_err().contains("rtx4090 or GBs=…"), "{bad}");
        }
    }

    #[test]
    fn the_slower_of_reading_and_multiplying_counts() {
        let machine: Machine = "GBs=1,TFLOPs=1,INT8=4,us=2".parse().unwrap();
        let reading = Row { weights_read: 1_000_000, multiply_adds: 1, products: 3, ..Row::default() };
        let multiplying = Row { weights_read: 1, multiply_adds: 1_000_000_000, ..Row::default() };
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        near(machine.time([&reading], Precision::Fp32), 4e-3 + 6e-6);
        near(machine.time([&multiplying], Precision::Fp32), 2e-3);
        near(machine.time([&reading, &multiplying], Precision::Int8), 1e-3 + 6e-6 + 0.5e-3);
    }
}
