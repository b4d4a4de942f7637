//! TensorRT's parser and builder, through the crate trtx.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use eqim::{Error, Result};
use eqim_engines::trt::edition;
use eqim_engines::trt::library::{self, Library};
use eqim_engines::trt::{Layers, Profile, Target};
use trtx::host_memory::HostMemory;
use trtx::interfaces::MonitorProgress;
use trtx::trtx_sys::Dims64;
use trtx::{Builder, NetworkDefinition, OnnxParser, OptProfileSelector, ProfilingVerbosity};

mod parser;

pub use parser::unsupported;

/// A serialized engine.
pub struct SerializedEngine {
    memory: HostMemory<'static>,
    layers: Vec<Layers>,
}

impl SerializedEngine {
    /// The engine, as it is written to a file.
    pub fn bytes(&self) -> &[u8] {
        &self.memory
    }

    /// Layers of the parsed network.
    pub fn layers(&self) -> &[Layers] {
        &self.layers
    }
}

/// Name and version of the TensorRT library, as written in sidecars.
///
/// # Errors
/// [`Error::run`] if the library is not found or cannot be used.
pub fn version() -> Result<String> {
    Library::load().map(|library| library.version().to_string())
}

/// Checks that the library can build for all targets.
///
/// # Errors
/// [`Error::input`] with the reason if it cannot.
pub fn check_targets(targets: &[Target]) -> Result<()> {
    edition::check_targets(targets)
}

/// An error with TensorRT's messages, or with the message of the binding if there are none.
fn failed(subject: &Path, error: impl std::fmt::Display) -> Error {
    let said = library::take_errors();
    let problem = if said.is_empty() { error.to_string() } else { said.join("; ") };
    let name = subject.file_name().unwrap_or(subject.as_os_str());
    Error::run(name.display(), format!("TensorRT: {problem}"))
}

/// Parses a graph and builds one engine for all of `targets`. `watch` receives the name of every phase that the builder
/// begins.
///
/// # Errors
/// [`Error::run`] with TensorRT's message, which names the nodes of the graph.
pub fn compile(
    model: &Path,
    profiles: &BTreeMap<String, Profile>,
    targets: &[Target],
    watch: impl Fn(&str) + Send + Sync + 'static,
) -> Result<SerializedEngine> {
    let library = Library::load()?;
    let failed = |error: trtx::Error| failed(model, error);
    library::take_errors();
    let mut builder = Builder::new(library.logger()).map_err(failed)?;
    let network = builder.create_network(0).map_err(failed)?;
    let mut parser = OnnxParser::new(network, library.logger()).map_err(failed)?;
    let path = model.to_str().ok_or_else(|| Error::run(model.display(), "is no name in UTF-8"))?;
    parser.parse_from_file(path, 0).map_err(failed)?;
    let network = parser.network_mut();

    let mut config = builder.create_config().map_err(failed)?;
    config.set_progress_monitor(Box::new(Monitor(Box::new(watch)))).map_err(failed)?;
    config.set_profiling_verbosity(ProfilingVerbosity::kDETAILED);
    edition::set_targets(&mut config, targets)?;
    let mut profile = builder.creata_optimization_profile().map_err(failed)?;
    for (name, shapes) in profiles {
        let selected = [
            (OptProfileSelector::kMIN, &shapes.min),
            (OptProfileSelector::kOPT, &shapes.opt),
            (OptProfileSelector::kMAX, &shapes.max),
        ];
        for (selector, shape) in selected {
            profile.set_dimensions(name, selector, &Dims64::from_slice(shape)).map_err(failed)?;
        }
    }
    config.add_optimization_profile(&mut profile).map_err(failed)?;

    let layers = layers(network);
    // Reading the output of a layer without outputs logs an error, which is discarded here.
    library::take_errors();
    let memory = builder.build_serialized_network(network, &mut config).map_err(failed)?;
    Ok(SerializedEngine { memory, layers })
}

/// Counts the layers of a parsed network by kind and precision.
fn layers(network: &NetworkDefinition) -> Vec<Layers> {
    let mut counts = BTreeMap::new();
    for index in 0..network.nb_layers() {
        let Ok(kind) = network.layer_type(index) else { continue };
        let output = network.layer(index).and_then(|layer| layer.output(network, 0));
        let precision = output.map_or("-".into(), |output| format!("{:?}", output.data_type(network)));
        *counts.entry((format!("{kind:?}"), precision)).or_insert(0) += 1;
    }
    let bare = |name: &str| name.trim_start_matches('k').to_string();
    let layers =
        counts.iter().map(|((kind, precision), &count)| Layers { kind: bare(kind), precision: bare(precision), count });
    layers.collect()
}

struct Monitor(Box<dyn Fn(&str) + Send + Sync>);

impl MonitorProgress for Monitor {
    fn phase_start(&self, phase: &str, _parent: Option<&str>, steps: i32) {
        tracing::debug!(target: "tensorrt", "{phase}, {steps} steps");
        (self.0)(phase);
    }

    fn step_complete(&self, _phase: &str, _step: i32) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn phase_finish(&self, _phase: &str) {}
}
