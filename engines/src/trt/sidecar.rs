//! The sidecar file of TensorRT engines. It records how the engines were built and which GPUs they run on.

use std::collections::BTreeMap;
use std::path::PathBuf;

use eqim::digest::short;
use eqim::model::Stage;
use eqim::{Config, Error, Result, ResultExt, files};
use serde::{Deserialize, Serialize};

use super::target::Target;
use eqim::bundle::{Bundle, FileRecord, Precision};

/// Folder in a bundle for the TensorRT engines.
pub const FOLDER: &str = "trt";
/// Name of the sidecar file in that folder.
pub const SIDECAR_FILE: &str = "engines.json";
/// Version of the sidecar format.
pub const SIDECAR_FORMAT: u32 = 1;

/// The TensorRT engines of a bundle, one per stage, built together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineSet {
    /// Version of the sidecar format.
    pub format: u32,
    /// Program and version that built the engines.
    pub producer: String,
    /// Name and version of the library that built the engines, for example `TensorRT-RTX 1.7.1`. No other version runs
    /// them.
    pub tensorrt: String,
    /// GPUs that the engines run on.
    pub targets: Vec<Target>,
    /// Configuration of the model.
    pub model: Config,
    /// SHA-256 of the weights of the bundle that the engines contain.
    pub weights: String,
    /// Engines by stage name.
    pub engines: BTreeMap<String, EngineRecord>,
}

/// One engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineRecord {
    /// The `.engine` file.
    #[serde(flatten)]
    pub file: FileRecord,
    /// SHA-256 of the graph of this stage in the bundle.
    pub graph: String,
    /// SHA-256 of the graph that TensorRT parsed. It is the same stage, lowered in the precision of the engine.
    pub lowered: String,
    /// Precision of weights, caches and matrix products.
    pub precision: Precision,
    /// Whether parts of the engine are in INT8.
    #[serde(default)]
    pub int8: bool,
    /// Optimization profiles by input name, for inputs with a dynamic axis.
    pub profiles: BTreeMap<String, Profile>,
    /// Layers as parsed, before TensorRT fuses them.
    pub layers: Vec<Layers>,
    /// Build time in seconds.
    pub seconds: f64,
    /// Peak resident size of the build process in bytes.
    pub peak_bytes: u64,
}

/// Optimization profile of an input: the range of shapes that an engine accepts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Smallest shape.
    pub min: Vec<i64>,
    /// Shape that TensorRT selects kernels for.
    pub opt: Vec<i64>,
    /// Largest shape.
    pub max: Vec<i64>,
}

/// Layers with the same type and precision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layers {
    /// Layer type in TensorRT, for example `MATRIX_MULTIPLY`.
    pub kind: String,
    /// Data type of the first output, for example `HALF`.
    pub precision: String,
    /// Number of these layers.
    pub count: usize,
}

/// The only field that is the same in all versions of the sidecar.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

impl EngineSet {
    /// Reads the sidecar of a bundle. Returns `None` if the bundle has no engines.
    ///
    /// # Errors
    /// [`Error::input`] if the sidecar is not valid, if the engines belong to another model, other weights or another
    /// graph, or if an engine is missing or truncated. The message names the field or the file.
    pub fn open(bundle: &Bundle) -> Result<Option<Self>> {
        let path = bundle.folder.join(FOLDER).join(SIDECAR_FILE);
        if !bundle.folder.join(FOLDER).exists() {
            return Ok(None);
        }
        let bad = |problem: String| Error::input(path.display(), problem);
        let text = files::read(&path)?;
        let version: Version = serde_json::from_slice(&text)
            .map_err(|error| bad("does not describe TensorRT engines".into()).because(error))?;
        if version.format != SIDECAR_FORMAT {
            return Err(bad(format!(
                "has format {}, expected {SIDECAR_FORMAT}: build the engines again with this version",
                version.format
            )));
        }
        let set: Self = serde_json::from_slice(&text).or_input(path.display())?;
        set.check(bundle)?;
        Ok(Some(set))
    }

    /// Checks that the engines fit the current bundle.
    fn check(&self, bundle: &Bundle) -> Result<()> {
        let path = bundle.folder.join(FOLDER).join(SIDECAR_FILE);
        let stale = |field: &str, found: &str, expected: &str| {
            let problem = format!(
                "is stale: {field} is {}…, but the bundle has {}…; build the engines again with eqim-export trt",
                short(found),
                short(expected)
            );
            Err(Error::input(path.display(), problem))
        };
        if !self.model.is_same_model(&bundle.manifest.model) {
            let problem =
                "is stale: its model is not the model of the bundle; build the engines again with eqim-export trt";
            return Err(Error::input(path.display(), problem));
        }
        if self.weights != bundle.manifest.weights.sha256 {
            return stale("weights", &self.weights, &bundle.manifest.weights.sha256);
        }
        for stage in Stage::ALL {
            let (engine, graph) = (self.engine(bundle, stage)?, bundle.graph(stage)?);
            if engine.graph != graph.file.sha256 {
                return stale(&format!("engines.{}.graph", stage.name()), &engine.graph, &graph.file.sha256);
            }
            if engine.file.file != file_name(stage) {
                let problem = format!("names {} as the engine of {}", engine.file.file, stage.name());
                return Err(Error::input(path.display(), problem));
            }
            let engine_path = self.path(bundle, stage);
            let found = engine_path.metadata().or_input(engine_path.display())?.len();
            if found != engine.file.bytes {
                let problem = format!("has {found} bytes, {SIDECAR_FILE} says {}: truncated?", engine.file.bytes);
                return Err(Error::input(engine_path.display(), problem));
            }
        }
        Ok(())
    }

    /// Record of the engine of a stage.
    ///
    /// # Errors
    /// [`Error::input`] if the stage has no engine.
    pub fn engine(&self, bundle: &Bundle, stage: Stage) -> Result<&EngineRecord> {
        let path = bundle.folder.join(FOLDER).join(SIDECAR_FILE);
        let missing = || Error::input(path.display(), format!("has no {} engine", stage.name()));
        self.engines.get(stage.name()).ok_or_else(missing)
    }

    /// Path of the engine of a stage.
    pub fn path(&self, bundle: &Bundle, stage: Stage) -> PathBuf {
        bundle.folder.join(FOLDER).join(file_name(stage))
    }
}

/// File name of the engine of a stage.
pub fn file_name(stage: Stage) -> String {
    format!("{}.engine", stage.name())
}
