//! The graphs of a bundle on ONNX Runtime.

use std::cell::OnceCell;
use std::path::Path;

use eqim::bundle::{Bundle, Int8Target, Precision};
use eqim::model::{Sizes, Stage};
use eqim::{Config, Error, Result};
use ndarray::{Array, Dimension};
use ort::session::SessionInputValue;
use ort::value::DynValue;

use super::ports;
use super::runtime::{Graph, Runtime};
use super::values::float_output;

/// The loaded graphs of a bundle. The encoder is loaded when it is first used, because few runs need it.
pub(super) struct Graphs {
    pub(super) bundle: Bundle,
    runtime: Runtime,
    threads: Option<usize>,
    graphs: [OnceCell<Graph>; Stage::ALL.len()],
}

impl Graphs {
    /// Loads the graphs of a bundle with the given library.
    ///
    /// # Errors
    /// [`Error::run`] if the library or a graph cannot be loaded; [`Error::input`] if a graph is not the one of its stage.
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

    /// Functions of a stage that run in kernels. The kernels compute in FP32 and in INT8 for a CPU.
    fn kernels(&self, stage: Stage) -> Result<&[String]> {
        let manifest = &self.bundle.manifest;
        let other = manifest.quantization.as_ref().is_some_and(|found| found.target != Int8Target::Cpu);
        let fits = manifest.precision == Precision::Fp32 && !other;
        Ok(if fits { &self.bundle.graph(stage)?.functions } else { &[] })
    }

    pub(super) fn graph(&self, stage: Stage) -> Result<&Graph> {
        let cell = &self.graphs[stage as usize];
        if let Some(graph) = cell.get() {
            return Ok(graph);
        }
        // Prepacking takes seconds on the large model and makes a token 1.6 times as fast. It does not pay off for
        // stages that run once per image. Integer operators without prepacking pack their weights in every run.
        let every_token = matches!(stage, Stage::Step | Stage::Flow);
        let packed = every_token || self.bundle.manifest.quantization.is_some();
        let graph = self.runtime.graph(&self.bundle.graph_path(stage)?, self.threads, packed, self.kernels(stage)?)?;
        graph.check(&stage.inputs(self.config()), &stage.outputs(self.config()), self.bundle.manifest.precision)?;
        Ok(cell.get_or_init(|| graph))
    }

    /// Runs a stage. The outputs have the types and, for these sizes of the symbols, the shapes of the stage's outputs.
    pub(super) fn run(&self, stage: Stage, inputs: &[SessionInputValue<'_>], sizes: &Sizes) -> Result<Vec<DynValue>> {
        let graph = self.graph(stage)?;
        let outputs = graph.run(inputs)?;
        let expected = stage.outputs(self.config());
        ports::check_given(graph.name(), &outputs, &expected, sizes, self.bundle.manifest.precision)?;
        Ok(outputs)
    }

    /// Runs a stage that has one output.
    pub(super) fn run_one<D: Dimension>(
        &self,
        stage: Stage,
        inputs: &[SessionInputValue<'_>],
        sizes: &Sizes,
    ) -> Result<Array<f32, D>> {
        let outputs = self.run(stage, inputs, sizes)?;
        let output = outputs.first().ok_or_else(|| Error::run(stage.name(), "gave no output"))?;
        float_output(output)
    }
}
