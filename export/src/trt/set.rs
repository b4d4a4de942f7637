//! Builds the TensorRT engines of a bundle.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use eqim::bundle::{Bundle, FileRecord, Precision};
use eqim::model::Stage;
use eqim::temporary::Temporary;
use eqim::weights::Weights;
use eqim::{Error, Result, files};
use eqim_calibration::Policy;
use eqim_cli::memory::{forget_peak, peak};
use eqim_engines::trt::{EngineRecord, EngineSet, FOLDER, SIDECAR_FILE, SIDECAR_FORMAT, Target, file_name};

use super::builder;
use super::shapes::Limits;
use crate::drift::Drift;
use crate::lower::BF16_OPSET;
use crate::write::{self, Draft, Options, PRODUCER};

/// Name of the drift report, in the folder of the engines.
const DRIFT_FILE: &str = "drift.json";

/// Checks that engines in a precision can be built from a bundle's weights.
///
/// # Errors
/// [`Error::input`] if the weights are already rounded to another precision.
pub fn check_weights(bundle: &Bundle, precision: Precision) -> Result<()> {
    let manifest = &bundle.manifest;
    let held = match (&manifest.quantization, manifest.precision) {
        (Some(_), _) => "int8".to_string(),
        (None, held) if held != Precision::Fp32 && held != precision => held.to_string(),
        _ => return Ok(()),
    };
    let problem = format!("has weights in {held}, which cannot be built in {precision}: export the bundle in fp32");
    Err(Error::input(bundle.folder.display(), problem).with_field("dtype"))
}

/// Lowers a bundle's graphs in another precision, or partly in INT8, strongly typed. The result is a draft that is
/// never published.
///
/// # Errors
/// [`Error::input`] if a weight is beyond the range of the precision.
pub fn lowered(bundle: &Bundle, weights: &Weights, precision: Precision, policy: Option<&Policy>) -> Result<Draft> {
    let manifest = &bundle.manifest;
    let opset = if precision == Precision::Bf16 { BF16_OPSET } else { manifest.opset };
    write::draft(
        &bundle.folder,
        &manifest.model,
        weights,
        Options { precision, opset, policy, functions: false },
        |_| {},
    )
}

/// Engines in a temporary folder next to the bundle, not yet in it. The folder is deleted if this is dropped.
#[derive(Debug)]
pub struct Built {
    folder: Temporary,
    /// Content of the engines' sidecar.
    pub set: EngineSet,
}

/// Builds one engine per stage from `lowered`, a draft of the bundle's graphs. Every engine is for all of `targets`.
///
/// `progress` receives the stage and the phase of the builder. `done` receives the stage and the record of its engine.
///
/// # Errors
/// [`Error::run`] with TensorRT's message if a graph cannot be built, or if a file cannot be written.
pub fn build(
    bundle: &Bundle,
    lowered: &Bundle,
    limits: &Limits,
    targets: &[Target],
    progress: impl Fn(Stage, &str) + Clone + Send + Sync + 'static,
    mut done: impl FnMut(Stage, &EngineRecord),
) -> Result<Built> {
    let failed = |error: std::io::Error| Error::run(bundle.folder.display(), "cannot be written").because(error);
    let folder = Temporary::new(files::folder(&bundle.folder), 0o777).map_err(failed)?;
    let config = &bundle.manifest.model;
    let mut engines = BTreeMap::new();
    for stage in Stage::ALL {
        let profiles = limits.profiles(stage, config)?;
        let (start, watch) = (Instant::now(), progress.clone());
        forget_peak();
        let plan = builder::compile(&lowered.graph_path(stage)?, &profiles, targets, move |phase| watch(stage, phase))?;
        let seconds = start.elapsed().as_secs_f64();
        files::write(&folder.path().join(file_name(stage)), plan.bytes())?;
        let record = EngineRecord {
            file: FileRecord::of(folder.path(), &file_name(stage))?,
            graph: bundle.graph(stage)?.file.sha256.clone(),
            lowered: lowered.graph(stage)?.file.sha256.clone(),
            precision: lowered.manifest.precision,
            int8: lowered
                .manifest
                .quantization
                .as_ref()
                .is_some_and(|found| found.stages.contains(&stage.name().into())),
            profiles,
            layers: plan.layers().to_vec(),
            seconds,
            peak_bytes: peak(),
        };
        done(stage, &record);
        engines.insert(stage.name().to_string(), record);
    }
    let set = EngineSet {
        format: SIDECAR_FORMAT,
        producer: format!("{PRODUCER} {}", env!("CARGO_PKG_VERSION")),
        tensorrt: builder::version()?,
        targets: targets.to_vec(),
        model: config.clone(),
        weights: bundle.manifest.weights.sha256.clone(),
        engines,
    };
    files::write_json(&folder.path().join(SIDECAR_FILE), &set)?;
    Ok(Built { folder, set })
}

impl Built {
    /// The folder of the engines until they are published. Reports can be added to it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// Moves engines into their bundle and replaces older engines there. Adds the drift report of their graphs, if there is
/// one.
///
/// # Errors
/// [`Error::run`] if the engines cannot be moved; [`Error::input`] if the bundle was replaced in the meantime.
pub fn publish(built: Built, bundle: &Bundle, drift: Option<&Drift>) -> Result<()> {
    if let Some(drift) = drift {
        files::write_json(&built.folder.path().join(DRIFT_FILE), drift)?;
    }
    files::publish_folder(built.folder, &bundle.folder.join(FOLDER))?;
    EngineSet::open(&Bundle::open(&bundle.folder)?).map(|_| ())
}
