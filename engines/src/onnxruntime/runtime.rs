//! ONNX Runtime's library, and the graphs that it loads.

use std::cell::RefCell;
use std::path::Path;
use std::sync::OnceLock;

use eqim::{Error, Result};
use ort::environment::{Environment, GlobalThreadPoolOptions};
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{IoBinding, SessionInputValue};
use ort::value::DynValue;

/// ONNX Runtime's library, loaded once in a process.
#[derive(Clone, Copy)]
pub struct Runtime(&'static Environment);

/// One graph, loaded.
pub struct Graph {
    name: String,
    session: RefCell<ort::session::Session>,
}

/// Adds the name of what failed to an error of ONNX Runtime.
pub(super) fn failed(subject: &str) -> impl Fn(ort::Error) -> Error {
    move |error| Error::run(subject, "ONNX Runtime").because(error)
}

impl Runtime {
    /// Loads the shared library. In one process the first library that is loaded stays.
    ///
    /// # Errors
    /// [`Error::run`] when it is not ONNX Runtime, or too old.
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
    /// [`Error::run`] when ONNX Runtime refuses it.
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
    /// [`Error::run`] when ONNX Runtime fails.
    pub fn run(&self, inputs: &[SessionInputValue<'_>]) -> Result<Vec<DynValue>> {
        let mut session = self.session.borrow_mut();
        let outputs = session.run(inputs).map_err(failed(&self.name))?;
        Ok(outputs.into_iter().map(|(_, value)| value).collect())
    }

    /// Something to bind the graph's inputs and outputs to.
    pub(super) fn binding(&self) -> Result<IoBinding> {
        self.session.borrow().create_binding().map_err(failed(&self.name))
    }

    /// Runs the graph on what is bound.
    pub(super) fn run_bound(&self, binding: &IoBinding) -> Result<()> {
        self.session.borrow_mut().run_binding(binding).map(drop).map_err(failed(&self.name))
    }
}
