//! The ONNX Runtime library and the graphs that it loads.

use std::cell::RefCell;
use std::path::Path;
use std::sync::{OnceLock, PoisonError, RwLock};

use eqim::bundle::Precision;
use eqim::model::ValueInfo;
use eqim::{Error, Result, ResultExt};
use ort::environment::{Environment, GlobalThreadPoolOptions};
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{IoBinding, SessionInputValue};
use ort::value::DynValue;

use super::{ports, version};

/// The ONNX Runtime library. It is loaded once per process.
#[derive(Clone, Copy)]
pub struct Runtime(&'static Environment);

/// A loaded graph.
pub struct Graph {
    name: String,
    session: RefCell<ort::session::Session>,
}

/// Adds the subject, for example the name of a graph, to an error of ONNX Runtime.
pub(super) fn failed(subject: &str) -> impl Fn(ort::Error) -> Error {
    move |error| Error::run(subject, "ONNX Runtime").because(error)
}

impl Runtime {
    /// Loads the shared library. The first library that a process loads is used for its whole run time.
    ///
    /// # Errors
    /// [`Error::run`] if the file is not ONNX Runtime, or if its version is too old.
    pub fn load(library: &Path) -> Result<Self> {
        static ENVIRONMENT: OnceLock<Result<Environment, String>> = OnceLock::new();
        // Without a slash, the name of a library would be searched in the folders of the system.
        let library = &std::path::absolute(library).or_run(library.display())?;
        if ENVIRONMENT.get().is_none() {
            version::check(library)?;
        }
        let environment = ENVIRONMENT.get_or_init(|| {
            let builder = ort::init_from(library).map_err(|error| error.to_string())?;
            // By default, all graphs share one thread pool. With a pool per graph, the threads of one graph would
            // continue to spin after their work, while another graph needs the cores.
            let threads = GlobalThreadPoolOptions::default();
            builder.with_name("eqim").with_global_thread_pool(threads).build().map_err(|error| error.to_string())
        });
        match environment {
            Ok(environment) => Ok(Self(environment)),
            Err(problem) => Err(Error::run(library.display(), format!("cannot be used as ONNX Runtime: {problem}"))),
        }
    }

    /// The environment that sessions are created in.
    pub fn environment(self) -> &'static Environment {
        self.0
    }

    /// Loads a graph. `threads` limits the threads of one operator. `prepacking` copies the weights into the layout
    /// that matrix products read. This takes time and memory once and makes every run faster. `kernels` are the functions
    /// that run in kernels of this crate instead of their bodies.
    ///
    /// # Errors
    /// [`Error::run`] if ONNX Runtime refuses the graph.
    pub fn graph(self, path: &Path, threads: Option<usize>, prepacking: bool, kernels: &[String]) -> Result<Graph> {
        let name = path.display().to_string();
        let load = || -> Result<ort::session::Session, ort::Error> {
            let builder = ort::session::Session::builder(self.0)?;
            let mut builder =
                builder.with_optimization_level(GraphOptimizationLevel::All)?.with_prepacking(prepacking)?;
            if let Some(threads) = threads {
                builder = builder.with_independent_thread_pool()?.with_intra_threads(threads)?;
            }
            if !kernels.is_empty() {
                builder = builder.with_operators(super::kernels::domain(kernels, threads)?)?;
            }
            builder.commit_from_file(path)
        };
        // ONNX Runtime adds the domain of the functions to a table when the first graph with kernels is opened, without a
        // lock. No other graph may be opened at that time.
        static DOMAIN_IS_KNOWN: RwLock<bool> = RwLock::new(false);
        let known = DOMAIN_IS_KNOWN.read().unwrap_or_else(PoisonError::into_inner);
        let session = if kernels.is_empty() || *known {
            load()
        } else {
            drop(known);
            let mut known = DOMAIN_IS_KNOWN.write().unwrap_or_else(PoisonError::into_inner);
            let session = load();
            *known |= session.is_ok();
            session
        };
        let session = RefCell::new(session.map_err(failed(&name))?);
        Ok(Graph { name, session })
    }
}

impl Graph {
    /// The file of the graph, for messages.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Checks that the graph declares these inputs and outputs, with caches in `precision`.
    ///
    /// # Errors
    /// [`Error::input`] naming the graph and the first input or output that differs.
    pub(super) fn check(&self, inputs: &[ValueInfo], outputs: &[ValueInfo], precision: Precision) -> Result<()> {
        let session = self.session.borrow();
        ports::check_declared(&self.name, "input", session.inputs(), inputs, precision)?;
        ports::check_declared(&self.name, "output", session.outputs(), outputs, precision)
    }

    /// Runs the graph. Inputs and outputs are in the order of the graph.
    ///
    /// # Errors
    /// [`Error::run`] if ONNX Runtime fails.
    pub fn run(&self, inputs: &[SessionInputValue<'_>]) -> Result<Vec<DynValue>> {
        let mut session = self.session.borrow_mut();
        let outputs = session.run(inputs).map_err(failed(&self.name))?;
        Ok(outputs.into_iter().map(|(_, value)| value).collect())
    }

    /// Creates an I/O binding for the inputs and outputs of the graph.
    pub(super) fn binding(&self) -> Result<IoBinding> {
        self.session.borrow().create_binding().map_err(failed(&self.name))
    }

    /// Runs the graph on the tensors of an I/O binding.
    pub(super) fn run_bound(&self, binding: &IoBinding) -> Result<()> {
        self.session.borrow_mut().run_binding(binding).map(drop).map_err(failed(&self.name))
    }
}
