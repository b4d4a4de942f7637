//! Writes a bundle: first to a temporary folder next to its destination, then to the destination when it is complete.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use eqim::bundle::{
    Bundle, CALIBRATION_FILE, CONFIG_FILE, FORMAT, FileRecord, GraphRecord, Manifest, Precision, WEIGHTS_FILE,
};
use eqim::checkpoint::tensors::TensorFile;
use eqim::checkpoint::{self, Inferred, StoredConfig};
use eqim::files::{self, folder};
use eqim::model::Stage;
use eqim::temporary::Temporary;
use eqim::weights::Weights;
use eqim::{Config, Error, Result};
use eqim_calibration::plan;
use eqim_engines::trt;
use prost::Message;

pub use crate::lower::Options;
use crate::lower::{self, Places};

mod convert;
mod quantized;

/// Name of the quantization report in a bundle, as JSON.
pub const REPORT_FILE: &str = "quantization.json";
/// Name of the quantization report in a bundle, as text.
pub const REPORT_TEXT_FILE: &str = "quantization.txt";

pub(crate) const PRODUCER: &str = "eqim";

/// A complete bundle in a temporary folder, not yet at its destination. The folder is deleted if the draft is dropped.
#[derive(Debug)]
pub struct Draft {
    folder: Temporary,
    destination: PathBuf,
    /// The bundle in the temporary folder.
    pub bundle: Bundle,
}

/// Checks that a bundle can be written to `destination`, before any other work.
///
/// # Errors
/// [`Error::input`] if there is something other than a bundle at `destination`, or if its parent folder does not exist or
/// cannot be written to.
pub fn check_destination(destination: &Path) -> Result<()> {
    files::check_output_folder(destination)?;
    let entries = match std::fs::read_dir(destination) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::input(destination.display(), "cannot be written as a folder").because(error)),
    };
    let names: Vec<String> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    match names.iter().find(|name| !is_ours(destination, name)) {
        Some(name) => {
            let problem =
                format!("contains {name}, which is not part of a bundle: choose another folder, or remove it");
            Err(Error::input(destination.display(), problem))
        }
        None => Ok(()),
    }
}

/// Whether any version of eqim wrote the file `name` of a folder. The content of `config.json` is checked because
/// folders of other models also have a file of this name.
fn is_ours(folder: &Path, name: &str) -> bool {
    if name == trt::FOLDER {
        return folder.join(name).join(trt::SIDECAR_FILE).is_file();
    }
    if name != CONFIG_FILE {
        let ours = [WEIGHTS_FILE, CALIBRATION_FILE, REPORT_FILE, REPORT_TEXT_FILE];
        return ours.contains(&name) || Stage::ALL.iter().any(|stage| graph_file(*stage) == name);
    }
    let text = files::read(&folder.join(CONFIG_FILE)).unwrap_or_default();
    let manifest: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    manifest["producer"].as_str().is_some_and(|producer| producer.starts_with(PRODUCER))
}

/// Writes a complete bundle to a temporary folder next to `destination`. `progress` receives the name of the weights
/// file and of each graph file before it is written.
///
/// # Errors
/// [`Error::input`] if a weight is beyond the range of the precision; [`Error::run`] if a file cannot be written.
pub fn draft(
    destination: &Path,
    config: &Config,
    weights: &Weights,
    options: Options,
    mut progress: impl FnMut(&str),
) -> Result<Draft> {
    check_destination(destination)?;
    let failed = |error: std::io::Error| Error::run(destination.display(), "cannot be written").because(error);
    let draft = Temporary::new(folder(destination), 0o777).map_err(failed)?;
    progress(WEIGHTS_FILE);
    let weights_file = draft.path().join(WEIGHTS_FILE);
    let quantization = match options.policy {
        None => {
            write_weights(&weights_file, config, weights, options.precision)?;
            None
        }
        Some(policy) => {
            let plans = plan(config, policy)?;
            quantized::write_weights(&weights_file, config, weights, &plans, options.precision)?;
            policy.table.write(&draft.path().join(CALIBRATION_FILE))?;
            Some(quantized::describe(policy, &plans, FileRecord::of(draft.path(), CALIBRATION_FILE)?))
        }
    };
    let places = lower::places(&TensorFile::open(&weights_file)?)?;
    let mut graphs = BTreeMap::new();
    for stage in Stage::ALL {
        progress(&graph_file(stage));
        graphs.insert(stage.name().to_string(), write_graph(draft.path(), config, stage, &places, options)?);
    }
    let manifest = Manifest {
        format: FORMAT,
        producer: format!("{PRODUCER} {}", env!("CARGO_PKG_VERSION")),
        precision: options.precision,
        opset: options.opset,
        model: config.clone(),
        weights: FileRecord::of(draft.path(), WEIGHTS_FILE)?,
        graphs,
        quantization,
        inferred: vec![],
    };
    files::write_json(&draft.path().join(CONFIG_FILE), &manifest)?;
    let bundle = Bundle::open(draft.path())?;
    Ok(Draft { folder: draft, destination: destination.to_path_buf(), bundle })
}

impl Draft {
    /// Records in `config.json` where the values of the configuration come from.
    ///
    /// # Errors
    /// [`Error::run`] if the file cannot be written.
    pub fn record(&mut self, inferred: Vec<Inferred>) -> Result<()> {
        self.bundle.manifest.inferred = inferred;
        files::write_json(&self.folder.path().join(CONFIG_FILE), &self.bundle.manifest)
    }

    /// Moves the bundle to its destination and replaces an older bundle there.
    ///
    /// # Errors
    /// [`Error::input`] if there is now something other than a bundle at the destination; [`Error::run`] if the bundle
    /// cannot be moved. The older bundle is then still at the destination, or in the folder that the error message
    /// names.
    pub fn publish(self) -> Result<Bundle> {
        check_destination(&self.destination)?;
        files::publish_folder(self.folder, &self.destination)?;
        Bundle::open(&self.destination)
    }
}

fn graph_file(stage: Stage) -> String {
    format!("{}.onnx", stage.name())
}

fn write_graph(folder: &Path, config: &Config, stage: Stage, places: &Places, options: Options) -> Result<GraphRecord> {
    let model = lower::lower(config, stage, places, options)?;
    let file = graph_file(stage);
    files::write(&folder.join(&file), &model.encode_to_vec())?;
    let functions = model.functions.into_iter().filter_map(|function| function.name).collect();
    Ok(GraphRecord {
        file: FileRecord::of(folder, &file)?,
        inputs: stage.inputs(config),
        outputs: stage.outputs(config),
        functions,
    })
}

fn write_weights(path: &Path, config: &Config, weights: &Weights, precision: Precision) -> Result<()> {
    let config = StoredConfig { generator: Some(config.generator.clone()), tokenizer: Some(config.tokenizer.clone()) };
    let stored = weights
        .iter()
        .map(|(name, tensor)| Ok((name, convert::convert(name, tensor, precision)?)))
        .collect::<Result<Vec<(&str, Tensor)>>>()?;
    checkpoint::write(path, &config, &stored)
}
