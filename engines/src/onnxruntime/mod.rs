//! The engine that runs a bundle's graphs on ONNX Runtime's CPU provider.

mod session;

use std::cell::{OnceCell, RefCell};
use std::path::Path;
use std::sync::OnceLock;

use eqim::engine::{Engine, Session};
use eqim::model::Stage;
use eqim::request::solver::Tableau;
use eqim::{Config, Error, Result};
use half::f16;
use ndarray::{Array, Array2, Array3, Array4, ArrayView, ArrayView2, ArrayView3, ArrayView4, Dimension};
use ort::environment::{Environment, GlobalThreadPoolOptions};
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{IoBinding, SessionInputValue};
pub use ort::value::DynValue;
use ort::value::Tensor;

use eqim::bundle::{Bundle, Precision};
use session::OrtSession;

/// ONNX Runtime's library, loaded once in a process.
#[derive(Clone, Copy)]
pub struct Runtime(&'static Environment);

/// One graph, loaded.
pub struct Graph {
    name: String,
    session: RefCell<ort::session::Session>,
}

fn failed(subject: &str) -> impl Fn(ort::Error) -> Error {
    move |error| Error::run(subject, format!("ONNX Runtime: {error}"))
}

impl Runtime {
    /// Loads the shared library. In one process the first library that is loaded stays.
    ///
    /// # Errors
    /// [`Error::Run`] when it is not ONNX Runtime, or too old.
    pub fn load(library: &Path) -> Result<Self> {
        static ENVIRONMENT: OnceLock<Result<Environment, String>> = OnceLock::new();
        let environment = ENVIRONMENT.get_or_init(|| {
            let builder = ort::init_from(library).map_err(|error| error.to_string())?;
            // With a pool of its own each graph's threads would spin on after their work, while another graph needs the cores.
            let threads = GlobalThreadPoolOptions::default();
            builder.with_name("eqim").with_global_thread_pool(threads).build().map_err(|error| error.to_string())
        });
        match environment {
            Ok(environment) => Ok(Self(environment)),
            Err(problem) => Err(Error::run(library.display(), format!("cannot be used as ONNX Runtime: {problem}"))),
        }
    }

    /// What sessions belong to.
    pub fn environment(self) -> &'static Environment {
        self.0
    }

    /// Loads a graph. `threads` limits those of one operator; `prepacking` copies weights into the order in which
    /// products read them, which takes time and memory once and makes every run faster.
    ///
    /// # Errors
    /// [`Error::Run`] when ONNX Runtime refuses it.
    pub fn graph(self, path: &Path, threads: Option<usize>, prepacking: bool) -> Result<Graph> {
        let name = path.display().to_string();
        let load = || -> Result<ort::session::Session, ort::Error> {
            let builder = ort::session::Session::builder(self.0)?;
            let mut builder =
                builder.with_optimization_level(GraphOptimizationLevel::All)?.with_prepacking(prepacking)?;
            if let Some(threads) = threads {
                builder = builder.with_independent_thread_pool()?.with_intra_threads(threads)?;
            }
            builder.commit_from_file(path)
        };
        let session = RefCell::new(load().map_err(failed(&name))?);
        Ok(Graph { name, session })
    }
}

impl Graph {
    /// Runs the graph on its inputs in order; gives its outputs in order.
    ///
    /// # Errors
    /// [`Error::Run`] when ONNX Runtime fails.
    pub fn run(&self, inputs: &[SessionInputValue<'_>]) -> Result<Vec<DynValue>> {
        let mut session = self.session.borrow_mut();
        let outputs = session.run(inputs).map_err(failed(&self.name))?;
        Ok(outputs.into_iter().map(|(_, value)| value).collect())
    }

    /// Something to bind the graph's inputs and outputs to.
    fn binding(&self) -> Result<IoBinding> {
        self.session.borrow().create_binding().map_err(failed(&self.name))
    }

    /// Runs the graph on what is bound.
    fn run_bound(&self, binding: &IoBinding) -> Result<()> {
        self.session.borrow_mut().run_binding(binding).map(drop).map_err(failed(&self.name))
    }
}

/// An array as an input.
///
/// # Errors
/// [`Error::Run`] when ONNX Runtime refuses its shape.
pub fn float_input<D: Dimension>(array: ArrayView<f32, D>) -> Result<DynValue> {
    let values: Vec<f32> = array.iter().copied().collect();
    Ok(Tensor::from_array((array.shape().to_vec(), values)).map_err(failed("input"))?.into_dyn())
}

/// An array of FP16, a cache, as an input.
///
/// # Errors
/// [`Error::Run`] when ONNX Runtime refuses its shape.
pub fn half_input<D: Dimension>(array: Array<f16, D>) -> Result<DynValue> {
    let shape = array.shape().to_vec();
    let values: Vec<f16> = array.into_iter().collect();
    Ok(Tensor::from_array((shape, values)).map_err(failed("input"))?.into_dyn())
}

/// Integers `[rows]` as an input.
///
/// # Errors
/// [`Error::Run`] when ONNX Runtime refuses them.
pub fn integer_input(values: &[i64]) -> Result<DynValue> {
    Ok(Tensor::from_array((vec![values.len()], values.to_vec())).map_err(failed("input"))?.into_dyn())
}

/// Values of `f32` or `f16` as an array of as many axes.
///
/// # Errors
/// [`Error::Run`] for values of another type or rank.
pub fn float_output<D: Dimension>(value: &DynValue) -> Result<Array<f32, D>> {
    let (shape, values) = match value.try_extract_tensor::<f32>() {
        Ok((shape, values)) => (shape, values.to_vec()),
        Err(_) => {
            let (shape, values) = value.try_extract_tensor::<f16>().map_err(failed("output"))?;
            (shape, values.iter().map(|value| value.to_f32()).collect())
        }
    };
    let shape: Vec<usize> = shape.iter().map(|&size| size as usize).collect();
    let array = Array::from_shape_vec(shape, values).and_then(Array::into_dimensionality);
    array.map_err(|error| Error::run("output", error))
}

/// A bundle on ONNX Runtime. The encoder is loaded when first used, since few runs need it.
pub struct OrtEngine {
    bundle: Bundle,
    runtime: Runtime,
    threads: Option<usize>,
    graphs: [OnceCell<Graph>; Stage::ALL.len()],
}

impl OrtEngine {
    /// An engine for a bundle on the given library.
    ///
    /// # Errors
    /// [`Error::Run`] when the library cannot be used.
    pub fn new(bundle: &Bundle, library: &Path, threads: Option<usize>) -> Result<Self> {
        let runtime = Runtime::load(library)?;
        let engine = Self { bundle: bundle.clone(), runtime, threads, graphs: Default::default() };
        for stage in [Stage::Prefill, Stage::Step, Stage::Flow, Stage::Decode] {
            engine.graph(stage)?;
        }
        Ok(engine)
    }

    fn graph(&self, stage: Stage) -> Result<&Graph> {
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

    fn run(&self, stage: Stage, inputs: &[SessionInputValue<'_>]) -> Result<Vec<DynValue>> {
        self.graph(stage)?.run(inputs)
    }

    /// Runs a stage of one output.
    fn run_one<D: Dimension>(&self, stage: Stage, inputs: &[SessionInputValue<'_>]) -> Result<Array<f32, D>> {
        let outputs = self.run(stage, inputs)?;
        let output = outputs.first().ok_or_else(|| Error::run(stage.name(), "gave no output"))?;
        float_output(output)
    }
}

impl Engine for OrtEngine {
    fn config(&self) -> &Config {
        &self.bundle.manifest.model
    }

    fn name(&self) -> &str {
        "ONNX Runtime"
    }

    fn session(&self) -> Result<Box<dyn Session + '_>> {
        match self.bundle.manifest.precision {
            Precision::Fp32 => Ok(Box::new(OrtSession::<f32>::new(self))),
            Precision::Fp16 => Ok(Box::new(OrtSession::<f16>::new(self))),
            Precision::Bf16 => Err(Error::run("cache", "ONNX Runtime's CPU has no kernels for BF16")),
        }
    }

    fn sample(
        &self,
        z: ArrayView2<f32>,
        noise: ArrayView2<f32>,
        guidance: &[f32],
        tableau: &Tableau,
    ) -> Result<Array2<f32>> {
        let updates = ArrayView::from_shape((tableau.evaluations(), 2, 3), &tableau.updates);
        let updates = updates.map_err(|error| Error::run("updates", error))?;
        let inputs = [
            float_input(z)?.into(),
            float_input(noise)?.into(),
            float_input(ArrayView::from(guidance))?.into(),
            float_input(ArrayView::from(&tableau.times))?.into(),
            float_input(updates)?.into(),
        ];
        self.run_one(Stage::Flow, &inputs)
    }

    fn decode(&self, latents: ArrayView3<f32>) -> Result<Array4<f32>> {
        self.run_one(Stage::Decode, &[float_input(latents)?.into()])
    }

    fn encode(&self, images: ArrayView4<f32>) -> Result<Array3<f32>> {
        self.run_one(Stage::Encode, &[float_input(images)?.into()])
    }
}
