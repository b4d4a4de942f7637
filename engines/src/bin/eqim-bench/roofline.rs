//! Roofline limit of a stage. For every scope, the limit is the time to read its weights or the time to multiply on
//! this machine, whichever is longer.

use std::collections::BTreeMap;

use eqim::Result;
use eqim::model::Stage;
use serde::Serialize;

use super::probe::{Gemm, read_bandwidth};
use eqim::bundle::Bundle;
use eqim_engines::onnxruntime::Runtime;

/// Largest buffer to measure the bandwidth with. Larger buffers have the same bandwidth and need more memory.
const MOST_BYTES: u64 = 512 << 20;

/// Effort of one call of a stage.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Effort {
    /// Bytes of weights that are read.
    pub bytes: f64,
    /// Number of multiply-adds.
    pub multiply_adds: f64,
    /// Shortest possible time in seconds.
    pub limit: f64,
}

/// Measured limits of this machine.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Multiply-adds per second.
    pub gemm: Gemm,
    /// Read bandwidth in bytes per second, by size of the buffer in megabytes.
    pub read: BTreeMap<u64, f64>,
}

impl Machine {
    /// Measures matrix products. The read bandwidth is measured when it is first needed.
    ///
    /// # Errors
    /// [`eqim::Error::run`] if ONNX Runtime fails.
    pub fn measure(runtime: Runtime) -> Result<Self> {
        Ok(Self { gemm: Gemm::measure(runtime)?, read: BTreeMap::new() })
    }

    /// Bandwidth in bytes per second when `bytes` are read repeatedly, rounded up to a power of two.
    fn read(&mut self, bytes: u64) -> f64 {
        let bytes = bytes.clamp(1 << 20, MOST_BYTES).next_power_of_two();
        *self.read.entry(bytes >> 20).or_insert_with(|| read_bandwidth(bytes as usize))
    }

    /// Effort of a call of a stage with `rows` rows, `tokens` tokens and `evaluations` evaluations of the velocity.
    ///
    /// # Errors
    /// If the configuration is not consistent.
    pub fn effort(
        &mut self,
        bundle: &Bundle,
        stage: Stage,
        rows: usize,
        tokens: usize,
        evaluations: usize,
    ) -> Result<Effort> {
        let manifest = &bundle.manifest;
        let cost = stage.cost(&manifest.model, rows, tokens, evaluations)?;
        let integer = |scope: &str| {
            let quantization = manifest.quantization.as_ref();
            quantization
                .is_some_and(|it| it.stages.iter().any(|name| name == stage.name()) && it.scopes.contains(scope))
        };
        let float_bytes = manifest.precision.dtype().bitsize() as f64 / 8.0;
        let bytes = |scope: &str| if integer(scope) { 1.0 } else { float_bytes };
        let stored: f64 = cost.rows().iter().map(|(scope, row)| bytes(scope) * row.parameters as f64).sum();
        let bandwidth = self.read(stored as u64);
        let mut effort = Effort::default();
        for (scope, row) in cost.rows() {
            let gemm = if integer(scope) { self.gemm.int8 } else { self.gemm.fp32 };
            let (read, multiply_adds) = (bytes(scope) * row.weights_read as f64, row.multiply_adds as f64);
            effort.bytes += read;
            effort.multiply_adds += multiply_adds;
            effort.limit += (read / bandwidth).max(multiply_adds / gemm);
        }
        Ok(effort)
    }
}
