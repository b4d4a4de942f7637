//! The ONNX Runtime library and the graphs that it loads.

use std::cell::RefCell;
use std::path::Path;
use std::sync::{OnceLock, PoisonError, RwLock};

use eqim::bundle::Precision;
use eqim::model::ValueInfo;
use eqim::{Error, Result, ResultExt};
use ort::environment::{Environment, GlobalThreadPoolOptions};
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{IoBinding, SessionInputValue};
use ort::value::{DynValue, Outlet, ValueType};

use super::failure::failed;
use super::provider::{ProviderName, Providers};
use super::{placement, ports, register, version};

/// The ONNX Runtime library. It is loaded once per process.
#[derive(Clone, Copy)]
pub struct Runtime {
    environment: &'static Environment,
    /// Number of threads of the pool that graphs share; `None` is all cores.
    threads: Option<usize>,
}

/// The number of threads with which ONNX Runtime uses all cores.
const ALL_CORES: usize = 0;

/// How a graph is opened.
#[derive(Clone, Copy, Default)]
pub struct GraphOptions<'a> {
    /// Maximum number of threads of one operator. The default is all cores.
    pub threads: Option<usize>,
    /// Whether to copy the weights into the layout that matrix products read. This takes time and memory once and makes
    /// every run faster.
    pub prepacking: bool,
    /// Functions that run in kernels of this crate instead of their bodies. They need the CPU.
    pub kernels: &'a [String],
    /// Execution providers. The default is the CPU.
    pub providers: Option<&'a Providers>,
}

/// A loaded graph.
pub struct Graph {
    name: String,
    session: RefCell<ort::session::Session>,
    /// Where the execution provider has its memory, if that is not the memory of the CPU.
    memory: Option<(AllocationDevice<'static>, i32)>,
}

impl Runtime {
    /// Loads the shared library, and makes the pool of threads that graphs share. The first library and the first number of
    /// threads of a process are used for its whole run time. Graphs with another number of threads have pools of their own.
    ///
    /// # Errors
    /// [`Error::run`] if the file is not ONNX Runtime, or if its version is too old.
    pub fn load(library: &Path, threads: Option<usize>) -> Result<Self> {
        static ENVIRONMENT: OnceLock<Result<(Environment, Option<usize>), String>> = OnceLock::new();
        // Without a slash, the name of a library would be searched in the folders of the system.
        let library = &std::path::absolute(library).or_run(library.display())?;
        if ENVIRONMENT.get().is_none() {
            version::check(library)?;
        }
        let environment = ENVIRONMENT.get_or_init(|| {
            // ONNX Runtime would store and send statistics of its use, from its start on.
            // SAFETY: Other threads read the environment only through the standard library, which locks it.
            unsafe { std::env::set_var("ORT_DISABLE_TELEMETRY", "1") };
            let builder = ort::init_from(library).map_err(|error| error.to_string())?;
            // With a pool per graph, the threads of one graph would continue to spin after their work, while another graph
            // needs the cores.
            let pool = GlobalThreadPoolOptions::default().with_intra_threads(threads.unwrap_or(ALL_CORES));
            let build = |pool| builder.with_name("eqim").with_global_thread_pool(pool).build();
            Ok((pool.and_then(build).map_err(|error| error.to_string())?, threads))
        });
        match environment {
            Ok((environment, threads)) => Ok(Self { environment, threads: *threads }),
            Err(problem) => Err(Error::run(library.display(), format!("cannot be used as ONNX Runtime: {problem}"))),
        }
    }

    /// The environment that sessions are created in.
    pub fn environment(self) -> &'static Environment {
        self.environment
    }

    /// Loads a graph.
    ///
    /// # Errors
    /// [`Error::input`] if ONNX Runtime does not have an execution provider, or if nodes would run on the CPU although it
    /// is not one of the providers; [`Error::run`] if ONNX Runtime refuses the graph.
    pub fn graph(self, path: &Path, options: GraphOptions<'_>) -> Result<Graph> {
        let name = path.display().to_string();
        let accelerated = options.providers.filter(|providers| !providers.is_cpu());
        let session = match accelerated {
            None => self.session(path, options, true)?,
            Some(providers) => self.accelerated(path, options, providers)?,
        };
        let memory = accelerated.and_then(|providers| providers.accelerators().next()).and_then(register::memory);
        Ok(Graph { name, session: RefCell::new(session), memory })
    }

    /// Opens a graph on execution providers other than the CPU. Names the nodes that they do not run.
    fn accelerated(
        self,
        path: &Path,
        options: GraphOptions<'_>,
        providers: &Providers,
    ) -> Result<ort::session::Session> {
        let name = path.display();
        let on_cpu = |session: &ort::session::Session| -> Result<Option<String>> {
            let mut nodes = placement::nodes(session).map_err(failed(&name.to_string()))?;
            let cpu = nodes.remove(ProviderName::Cpu.in_onnxruntime()).unwrap_or_default();
            Ok((!cpu.is_empty()).then(|| format!("{} nodes ({})", cpu.len(), placement::list(&cpu))))
        };
        if providers.with_cpu() {
            let session = self.session(path, options, true)?;
            if let Some(nodes) = on_cpu(&session)? {
                tracing::warn!("{name}: the CPU runs {nodes}");
            }
            return Ok(session);
        }
        self.session(path, options, false).map_err(|error| {
            // ONNX Runtime does not name the nodes. If it opens the graph with the CPU, the CPU's nodes are the problem.
            let nodes = self.session(path, options, true).and_then(|session| on_cpu(&session));
            let Ok(Some(nodes)) = nodes else { return error };
            let problem =
                format!("does not run {nodes} of {name}: name cpu as the last provider to run them on the CPU");
            Error::setting("provider", format!("{providers} {problem}"))
        })
    }

    /// Creates a session. `cpu` says whether nodes may run on the CPU if there are other execution providers.
    fn session(self, path: &Path, options: GraphOptions<'_>, cpu: bool) -> Result<ort::session::Session> {
        let GraphOptions { threads, prepacking, kernels, providers } = options;
        let name = path.display().to_string();
        let configure = || -> Result<SessionBuilder, ort::Error> {
            let builder = ort::session::Session::builder(self.environment())?;
            let mut builder =
                builder.with_optimization_level(GraphOptimizationLevel::All)?.with_prepacking(prepacking)?;
            if threads != self.threads {
                builder = builder.with_independent_thread_pool()?.with_intra_threads(threads.unwrap_or(ALL_CORES))?;
                builder = builder.with_config_entry("session.force_spinning_stop", "1")?;
            }
            if !kernels.is_empty() {
                builder = builder.with_operators(super::kernels::domain(kernels, threads)?)?;
            }
            Ok(builder)
        };
        let load = || -> Result<ort::session::Session> {
            let mut builder = configure().map_err(failed(&name))?;
            if let Some(providers) = providers.filter(|providers| !providers.is_cpu()) {
                let record = |builder: SessionBuilder| -> Result<SessionBuilder, ort::Error> {
                    let builder = builder.with_config_entry(placement::RECORD, "1")?;
                    let disabled = if cpu { "0" } else { "1" };
                    Ok(builder.with_config_entry("session.disable_cpu_ep_fallback", disabled)?)
                };
                builder = record(builder).map_err(failed(&name))?;
                builder = register::register(self.environment(), builder, providers, threads)?;
            }
            builder.commit_from_file(path).map_err(failed(&name))
        };
        // ONNX Runtime adds the domain of the functions to a table when the first graph with kernels is opened, without a
        // lock. No other graph may be opened at that time.
        static DOMAIN_IS_KNOWN: RwLock<bool> = RwLock::new(false);
        let known = DOMAIN_IS_KNOWN.read().unwrap_or_else(PoisonError::into_inner);
        if kernels.is_empty() || *known {
            return load();
        }
        drop(known);
        let mut known = DOMAIN_IS_KNOWN.write().unwrap_or_else(PoisonError::into_inner);
        let session = load();
        *known |= session.is_ok();
        session
    }
}

impl Graph {
    /// The file of the graph, for messages.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Names and types of the inputs.
    pub(super) fn inputs(&self) -> Vec<(String, ValueType)> {
        declared(self.session.borrow().inputs())
    }

    /// Names and types of the outputs.
    pub(super) fn outputs(&self) -> Vec<(String, ValueType)> {
        declared(self.session.borrow().outputs())
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

    /// An allocator of the execution provider's memory; `None` if that is the memory of the CPU.
    pub(super) fn allocator(&self) -> Result<Option<Allocator>> {
        let Some((device, index)) = self.memory.clone() else { return Ok(None) };
        let allocator = || {
            let info = MemoryInfo::new(device, index, AllocatorType::Device, MemoryType::Default)?;
            Allocator::new(&self.session.borrow(), info)
        };
        allocator().map(Some).map_err(failed(&self.name))
    }
}

fn declared(ports: &[Outlet]) -> Vec<(String, ValueType)> {
    ports.iter().map(|port| (port.name().to_string(), port.dtype().clone())).collect()
}
