//! Roofline limit of a stage. For every scope, the limit is the time to read its weights or the time to multiply on
//! this machine, whichever is longer.

use eqim::Result;
use eqim::model::Stage;
use eqim::request::timing::{median, percentile};
use serde::Serialize;

use super::probe::Limits;
use super::workload::Call;
use eqim::bundle::Bundle;

/// Work of one call of a stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// Bytes of all weights of the stage. The loop of the flow sampler reads some of them repeatedly.
    pub stored: u64,
    scopes: Vec<Scope>,
}

/// Work of one scope.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Scope {
    bytes: f64,
    multiply_adds: f64,
    integer: bool,
}

impl Work {
    /// Work of a call of a stage with `rows` rows, `tokens` tokens and `evaluations` evaluations of the velocity.
    ///
    /// # Errors
    /// If the configuration is not consistent.
    pub fn new(bundle: &Bundle, stage: Stage, rows: usize, tokens: usize, evaluations: usize) -> Result<Self> {
        let manifest = &bundle.manifest;
        let cost = stage.cost(&manifest.model, rows, tokens, evaluations)?;
        let is_integer = |scope: &str| {
            let quantization = manifest.quantization.as_ref();
            quantization
                .is_some_and(|it| it.stages.iter().any(|name| name == stage.name()) && it.scopes.contains(scope))
        };
        let float_bytes = manifest.precision.dtype().bitsize() as f64 / 8.0;
        let (mut stored, mut scopes) = (0.0, vec![]);
        for (scope, row) in cost.rows() {
            let integer = is_integer(scope);
            let size = if integer { 1.0 } else { float_bytes };
            stored += size * row.parameters as f64;
            let (bytes, multiply_adds) = (size * row.weights_read as f64, row.multiply_adds as f64);
            scopes.push(Scope { bytes, multiply_adds, integer });
        }
        Ok(Self { stored: stored as u64, scopes })
    }

    /// Bytes of weights that are read.
    pub fn bytes(&self) -> f64 {
        self.scopes.iter().map(|scope| scope.bytes).sum()
    }

    /// Number of multiply-adds.
    pub fn multiply_adds(&self) -> f64 {
        self.scopes.iter().map(|scope| scope.multiply_adds).sum()
    }

    /// Shortest possible time in seconds.
    pub fn limit(&self, limits: &Limits) -> f64 {
        let time = |scope: &Scope| {
            let gemm = if scope.integer { limits.int8 } else { limits.fp32 };
            (scope.bytes / limits.read).max(scope.multiply_adds / gemm)
        };
        self.scopes.iter().map(time).sum()
    }
}

/// Effort of the calls of a stage, and their distance from the limits that were measured before and after each call.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Effort {
    /// Bytes of weights that a call reads.
    pub bytes: f64,
    /// Number of multiply-adds of a call.
    pub multiply_adds: f64,
    /// Shortest possible time in seconds: median over the calls.
    pub limit: f64,
    /// Bytes per second at which memory was read before and after the calls: median.
    pub read: f64,
    /// Limit divided by time, of each call: the median. 1 means that the stage is as fast as the limit.
    pub of_limit: f64,
    /// The 10th and the 90th percentile of `of_limit`.
    pub spread: (f64, f64),
}

impl Effort {
    /// Effort of the calls of a stage; `None` if no limits were measured.
    pub fn new(work: &Work, calls: &[Call]) -> Option<Self> {
        let measured = || calls.iter().filter_map(|call| Some((call.time.as_secs_f64(), call.limits?)));
        let mut reads: Vec<f64> = measured().flat_map(|(_, limits)| limits.map(|limits| limits.read)).collect();
        // The median of the two neighbours of a call is their mean.
        let limit = |[before, after]: [Limits; 2]| (work.limit(&before) + work.limit(&after)) / 2.0;
        let mut limits: Vec<f64> = measured().map(|(_, neighbours)| limit(neighbours)).collect();
        let mut fractions: Vec<f64> = measured().map(|(time, neighbours)| limit(neighbours) / time).collect();
        if fractions.is_empty() {
            return None;
        }
        fractions.sort_by(f64::total_cmp);
        Some(Self {
            bytes: work.bytes(),
            multiply_adds: work.multiply_adds(),
            limit: median(&mut limits),
            read: median(&mut reads),
            of_limit: percentile(&fractions, 50.0),
            spread: (percentile(&fractions, 10.0), percentile(&fractions, 90.0)),
        })
    }
}
