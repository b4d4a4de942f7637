//! The graphs of a bundle on ONNX Runtime.

use std::cell::OnceCell;
use std::path::Path;
use std::time::{Duration, Instant};

use eqim::bundle::{Bundle, Int8Target, Precision};
use eqim::model::{Sizes, Stage};
use eqim::{Config, Error, Result};
use ndarray::{Array, Dimension};
use ort::session::SessionInputValue;
use ort::value::{DynValue, PrimitiveTensorElementType};

use super::device::DeviceMemory;
use super::ports;
use super::provider::Providers;
use super::runtime::{Graph, GraphOptions, Runtime};
use super::values::float_output;

/// Stages that nearly every run needs. The encoder is opened when it is first used.
const USUAL: [Stage; 4] = [Stage::Prefill, Stage::Step, Stage::Flow, Stage::Decoder];

/// The opened graphs of a bundle.
pub(super) struct Graphs {
    pub(super) bundle: Bundle,
    runtime: Runtime,
    threads: Option<usize>,
    providers: Providers,
    graphs: [OnceCell<Opened>; Stage::ALL.len()],
}

/// A graph, and the time that it took to open.
struct Opened {
    graph: Graph,
    time: Duration,
}

impl Graphs {
    /// Opens the usual graphs of a bundle with the given library, side by side.
    ///
    /// # Errors
    /// [`Error::run`] if the library or a graph cannot be loaded; [`Error::input`] if a graph is not the one of its stage.
    pub(super) fn new(bundle: &Bundle, library: &Path, threads: Option<usize>, providers: &Providers) -> Result<Self> {
        providers.check()?;
        let runtime = Runtime::load(library, threads)?;
        let open = |stage| open(bundle, runtime, threads, providers, stage);
        let opened = std::thread::scope(|scope| {
            let opening = USUAL.map(|stage| scope.spawn(move || open(stage)));
            opening.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let graphs: [OnceCell<Opened>; Stage::ALL.len()] = Default::default();
        for (stage, opened) in USUAL.into_iter().zip(opened) {
            let opened = opened?;
            graphs[stage as usize].get_or_init(|| opened);
        }
        Ok(Self { bundle: bundle.clone(), runtime, threads, providers: providers.clone(), graphs })
    }

    /// The stages that are open, and the time that each took to open.
    pub(super) fn opening(&self) -> Vec<(Stage, Duration)> {
        let time = |stage: Stage| Some((stage, self.graphs[stage as usize].get()?.time));
        Stage::ALL.into_iter().filter_map(time).collect()
    }

    pub(super) fn config(&self) -> &Config {
        &self.bundle.manifest.model
    }

    pub(super) fn graph(&self, stage: Stage) -> Result<&Graph> {
        let cell = &self.graphs[stage as usize];
        if let Some(opened) = cell.get() {
            return Ok(&opened.graph);
        }
        let opened = open(&self.bundle, self.runtime, self.threads, &self.providers, stage)?;
        Ok(&cell.get_or_init(|| opened).graph)
    }

    /// The memory of the device that runs the transformer step, for caches of type `T`; `None` if that is the memory of the
    /// CPU.
    pub(super) fn device_memory<T: PrimitiveTensorElementType>(&self) -> Result<Option<DeviceMemory>> {
        DeviceMemory::of::<T>(self.graph(Stage::Step)?, self.runtime, &self.providers)
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

/// Opens the graph of a stage.
fn open(
    bundle: &Bundle,
    runtime: Runtime,
    threads: Option<usize>,
    providers: &Providers,
    stage: Stage,
) -> Result<Opened> {
    let start = Instant::now();
    let manifest = &bundle.manifest;
    let kernels = if providers.is_cpu() { kernels(bundle, stage)? } else { &[] };
    // Prepacking copies weights. It does not pay off for stages that run once per image, nor for kernels, which read the
    // weights in the file. Integer convolutions without prepacking pack their weights in every run.
    let every_token = matches!(stage, Stage::Step | Stage::Flow);
    let prepacking = manifest.quantization.is_some() || (every_token && kernels.is_empty());
    let options = GraphOptions { threads, prepacking, kernels, providers: Some(providers) };
    let graph = runtime.graph(&bundle.graph_path(stage)?, options)?;
    graph.check(&stage.inputs(&manifest.model), &stage.outputs(&manifest.model), manifest.precision)?;
    Ok(Opened { graph, time: start.elapsed() })
}

/// Functions of a stage that run in kernels. The kernels compute in FP32 and in INT8 for a CPU.
fn kernels(bundle: &Bundle, stage: Stage) -> Result<&[String]> {
    let manifest = &bundle.manifest;
    let other = manifest.quantization.as_ref().is_some_and(|found| found.target != Int8Target::Cpu);
    let fits = manifest.precision == Precision::Fp32 && !other;
    Ok(if fits { &bundle.graph(stage)?.functions } else { &[] })
}
