//! What a stage cannot be faster than: every scope reads its weights or multiplies, whichever takes longer here.

use std::collections::BTreeMap;

use eqim::Result;
use eqim::model::Stage;
use serde::Serialize;

use super::probe::{Gemm, read_bandwidth};
use eqim::bundle::Bundle;
use eqim_engines::onnxruntime::Runtime;

/// Larger buffers read no faster, and take memory.
const MOST_BYTES: u64 = 512 << 20;

/// What one call of a stage does.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Effort {
    /// Bytes of weights read.
    pub bytes: f64,
    /// Multiply-adds.
    pub multiply_adds: f64,
    /// Seconds that it takes at least.
    pub limit: f64,
}

/// What this machine was measured to do.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Multiply-adds a second.
    pub gemm: Gemm,
    /// Bytes a second of reading so many megabytes again and again.
    pub read: BTreeMap<u64, f64>,
}

impl Machine {
    /// Measures the products; reading is measured when first asked for.
    ///
    /// # Errors
    /// When ONNX Runtime fails.
    pub fn measure(runtime: Runtime) -> Result<Self> {
        Ok(Self { gemm: Gemm::measure(runtime)?, read: BTreeMap::new() })
    }

    /// Bytes a second of reading `bytes` again and again, to the next power of two.
    fn read(&mut self, bytes: u64) -> f64 {
        let bytes = bytes.clamp(1 << 20, MOST_BYTES).next_power_of_two();
        *self.read.entry(bytes >> 20).or_insert_with(|| read_bandwidth(bytes as usize))
    }

    /// What a call of a stage of a bundle does at `rows` rows, `tokens` columns and `evaluations` of the velocity.
    ///
    /// # Errors
    /// When the configuration is not consistent.
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
