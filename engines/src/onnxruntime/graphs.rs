//! The graphs of a bundle on ONNX Runtime.

use std::cell::OnceCell;
use std::path::Path;

use eqim::bundle::Bundle;
use eqim::model::Stage;
use eqim::{Config, Error, Result};
use ndarray::{Array, Dimension};
use ort::session::SessionInputValue;
use ort::value::DynValue;

use super::runtime::{Graph, Runtime};
use super::values::float_output;

/// The graphs of a bundle, loaded. The encoder is loaded when it is first used, since few runs need it.
pub(super) struct Graphs {
    pub(super) bundle: Bundle,
    runtime: Runtime,
    threads: Option<usize>,
    graphs: [OnceCell<Graph>; Stage::ALL.len()],
}

impl Graphs {
    /// The graphs of a bundle on the given library.
    ///
    /// # Errors
    /// [`Error::run`] when the library cannot be used.
    pub(super) fn new(bundle: &Bundle, library: &Path, threads: Option<usize>) -> Result<Self> {
        let runtime = Runtime::load(library)?;
        let graphs = Self { bundle: bundle.clone(), runtime, threads, graphs: Default::default() };
        for stage in [Stage::Prefill, Stage::Step, Stage::Flow, Stage::Decoder] {
            graphs.graph(stage)?;
        }
        Ok(graphs)
    }

    pub(super) fn config(&self) -> &Config {
        &self.bundle.manifest.model
    }

    pub(super) fn graph(&self, stage: Stage) -> Result<&Graph> {
        let cell = &self.graphs[stage as usize];
        if let Some(graph) = cell.get() {
            return Ok(graph);
        }
        // On the large model packing takes seconds and makes a token 1.6 times as fast; once an image it does not pay.
        // Integer operators pack at every run what was not packed before.
        let every_token = matches!(stage, Stage::Step | Stage::Flow);
        let packed = every_token || self.bundle.manifest.quantization.is_some();
        let graph = self.runtime.graph(&self.bundle.graph_path(stage)?, self.threads, packed)?;
        Ok(cell.get_or_init(|| graph))
    }

    pub(super) fn run(&self, stage: Stage, inputs: &[SessionInputValue<'_>]) -> Result<Vec<DynValue>> {
        self.graph(stage)?.run(inputs)
    }

    /// Runs a stage of one output.
    pub(super) fn run_one<D: Dimension>(
        &self,
        stage: Stage,
        inputs: &[SessionInputValue<'_>],
    ) -> Result<Array<f32, D>> {
        let outputs = self.run(stage, inputs)?;
        let output = outputs.first().ok_or_else(|| Error::run(stage.name(), "gave no output"))?;
        float_output(output)
    }
}
