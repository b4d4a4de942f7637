//! Report of all measurements, as text, in Markdown and in JSON.

use std::fmt::Write;

use eqim_cli::table;
use serde::Serialize;

use super::contest::Agreement;
use super::equivariance::Equivariance;
use super::predict::Prediction;
use super::roofline::Effort;
use super::solvers::Solved;
use super::statistics::{Summary, milliseconds};
use super::tiling::Tilings;

/// All measurements.
#[derive(Debug, Default, Serialize)]
pub struct BenchReport {
    /// One case per batch size and length.
    pub cases: Vec<Case>,
    /// Results of `--on`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub predictions: Vec<Prediction>,
    /// Results of `--solvers`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub solvers: Vec<Solved>,
    /// Results of `--tiling`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tiling: Option<Tilings>,
    /// Results of `--equivariance`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub equivariance: Option<Equivariance>,
}

/// Results of all candidates on the same workload.
#[derive(Debug, Serialize)]
pub struct Case {
    /// Number of images per batch.
    pub batch: usize,
    /// Length of the images in tokens.
    pub tokens: usize,
    /// Number of timed tokens at the end of each image.
    pub generated: usize,
    /// Guidance scale.
    pub cfg: f32,
    /// ODE solver of the bundles.
    pub solver: String,
    /// Evaluations of the velocity per token.
    pub evaluations: usize,
    /// One result per candidate.
    pub results: Vec<Measurement>,
}

/// Result of one candidate.
#[derive(Debug, Serialize)]
pub struct Measurement {
    /// Name of the candidate.
    pub name: String,
    /// Whether the candidate is a reference that bundles are compared with.
    pub is_reference: bool,
    /// Seconds per batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<Summary>,
    /// Seconds until the first tokens of a batch are generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token: Option<Summary>,
    /// One measurement per stage that ran.
    pub stages: Vec<StageMeasurement>,
    /// Peak resident size of this process during the runs in bytes. It does not include the process of PyTorch.
    pub peak_bytes: u64,
    /// Difference from the tokens of the first candidate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement: Option<Agreement>,
    /// Speed relative to the first candidate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

/// Times of one stage.
#[derive(Debug, Serialize)]
pub struct StageMeasurement {
    /// Name of the stage.
    pub stage: &'static str,
    /// Seconds per call.
    pub call: Summary,
    /// Calls per batch.
    pub calls: f64,
    /// Effort of a call, if it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effort: Option<Effort>,
}

impl Measurement {
    /// Seconds per batch of all stages together.
    fn in_stages(&self) -> f64 {
        self.stages.iter().map(StageMeasurement::total).sum()
    }

    /// One row of [`COLUMNS`] per stage.
    fn rows(&self) -> Vec<Vec<String>> {
        let all = self.in_stages();
        self.stages.iter().map(|stage| stage.cells(all)).collect()
    }

    /// Warnings about times that are not reliable.
    fn warnings(&self) -> Vec<String> {
        let stages = self.stages.iter().flat_map(|stage| stage.call.warnings(stage.stage));
        self.batch.iter().flat_map(|batch| batch.warnings("images")).chain(stages).collect()
    }
}

impl BenchReport {
    /// The report as text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for case in &self.cases {
            case.text(&mut text);
        }
        self.instead_of_timings(&mut text);
        text.trim_end().to_string()
    }

    /// Adds the results of the flags that print something instead of timings.
    fn instead_of_timings(&self, text: &mut String) {
        self.predictions.iter().for_each(|found| found.table(text));
        Solved::table(&self.solvers, text);
        self.tiling.iter().for_each(|found| found.table(text));
        self.equivariance.iter().for_each(|found| found.table(text));
    }

    /// The report in Markdown.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for case in &self.cases {
            let _ = writeln!(text, "{}\n", case.title());
            let head = ["", "s/batch", "images/s", "s/token", "ratio", "tokens differ", "peak MB"];
            let _ = writeln!(text, "{}\n", table::markdown(&head, case.results.iter().map(|result| case.row(result))));
            let of_engine = |result: &Measurement| {
                let named = |mut cells: Vec<String>| {
                    cells[0] = format!("{}: {}", result.name, cells[0]);
                    cells
                };
                result.rows().into_iter().map(named).collect::<Vec<_>>()
            };
            let _ = writeln!(text, "{}\n", table::markdown(&COLUMNS, case.results.iter().flat_map(of_engine)));
        }
        self.instead_of_timings(&mut text);
        text
    }
}

/// Titles of the columns of [`StageMeasurement::cells`].
const COLUMNS: [&str; 10] =
    ["stage", "calls", "median ms", "share", "GB/s", "GFLOP/s", "memory GB/s", "limit ms", "of limit", "from … to"];

impl StageMeasurement {
    /// Seconds per batch.
    fn total(&self) -> f64 {
        self.calls * self.call.mean
    }

    /// One cell per column. `all` is the total time of all stages.
    fn cells(&self, all: f64) -> Vec<String> {
        let median = self.call.median;
        let share = 100.0 * self.total() / all;
        let mut cells =
            vec![self.stage.into(), format!("{:.0}", self.calls), milliseconds(median), format!("{share:.1} %")];
        if let Some(effort) = self.effort {
            let percent = |fraction: f64| format!("{:.0} %", 100.0 * fraction);
            cells.push(format!("{:.1}", 1e-9 * effort.bytes / median));
            cells.push(format!("{:.1}", 2e-9 * effort.multiply_adds / median));
            cells.push(format!("{:.1}", 1e-9 * effort.read));
            cells.push(milliseconds(effort.limit));
            cells.push(percent(effort.of_limit));
            cells.push(format!("{} … {}", percent(effort.spread.0), percent(effort.spread.1)));
        }
        cells
    }
}

impl Case {
    fn title(&self) -> String {
        let Self { batch, tokens, generated, cfg, solver, evaluations, .. } = self;
        let timed = if generated < tokens { format!(", the last {generated} timed") } else { String::new() };
        format!("batch {batch}, {tokens} tokens{timed}, cfg {cfg}, {solver}, {evaluations} evaluations per token")
    }

    /// Cells of a result: name, seconds per batch, images per second, seconds per token, ratio, agreement, peak memory.
    fn row(&self, result: &Measurement) -> Vec<String> {
        let mut cells = vec![result.name.clone()];
        match &result.batch {
            Some(batch) => cells.extend([
                format!("{:.3}", batch.median),
                if self.generated == self.tokens {
                    format!("{:.3}", self.batch as f64 / batch.median)
                } else {
                    String::new()
                },
                format!("{:.4}", self.seconds_a_token(result)),
            ]),
            None => cells.extend(["", "", ""].map(String::from)),
        }
        cells.push(result.ratio.map_or(String::new(), |ratio| format!("{ratio:.2}")));
        cells.push(
            result.agreement.map_or(String::new(), |it| format!("{:.1e}, {:.2} %", it.largest, 100.0 * it.relative)),
        );
        cells.push(format!("{:.0}", result.peak_bytes as f64 / 1e6));
        cells
    }

    /// Seconds per token of a batch, without prefill and decoding.
    fn seconds_a_token(&self, result: &Measurement) -> f64 {
        let loops = result.stages.iter().filter(|stage| ["transformer_step", "flow_sampler"].contains(&stage.stage));
        loops.map(|stage| stage.call.median).sum()
    }

    fn text(&self, text: &mut String) {
        for result in &self.results {
            let _ = writeln!(text, "\n=== Performance summary: {} ===", result.name);
            let _ = writeln!(text, "{}", self.title());
            if let Some(batch) = &result.batch {
                if self.generated == self.tokens {
                    let images = self.batch as f64 / batch.median;
                    let tokens = (self.batch * self.tokens) as f64 / batch.median;
                    let _ = writeln!(text, "Throughput: {images:.3} images/s, {tokens:.2} tokens/s");
                }
                let _ = writeln!(text, "Latency per batch, {} runs: {}", batch.count, batch.line());
                if let Some(first) = &result.first_token {
                    let _ = writeln!(text, "Time to the first token: {}", first.line());
                }
                let _ = writeln!(
                    text,
                    "Seconds per token, without prefill and decoding: {:.4}",
                    self.seconds_a_token(result)
                );
            }
            let _ = writeln!(text, "Peak memory: {:.0} MB", result.peak_bytes as f64 / 1e6);
            for stage in &result.stages {
                let _ = writeln!(text, "{}, {} calls: {}", stage.stage, stage.call.count, stage.call.line());
            }
            let _ = writeln!(text, "\n{}", table::text(&COLUMNS, result.rows()));
            for warning in result.warnings() {
                let _ = writeln!(text, "warning: {warning}");
            }
        }
        if self.results.iter().any(|result| result.agreement.is_some()) {
            let _ = writeln!(text, "\n=== Comparison: {} ===", self.title());
            for result in &self.results {
                let cells = self.row(result);
                let _ = write!(text, "{}: {} s per batch", cells[0], cells[1]);
                if let Some(it) = result.agreement {
                    let _ = write!(
                        text,
                        ", tokens differ by at most {:.1e}, {:.2} % overall",
                        it.largest,
                        100.0 * it.relative
                    );
                    match result.ratio {
                        Some(ratio) => {
                            let _ = write!(text, ": {ratio:.2} times as fast");
                        }
                        None => text.push_str(": not the same images, no ratio"),
                    }
                }
                text.push('\n');
            }
        }
    }
}
