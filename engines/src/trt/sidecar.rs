//! What stands beside engines: where they came from, and what they run on.

use std::collections::BTreeMap;
use std::path::PathBuf;

use eqim::digest::short;
use eqim::model::Stage;
use eqim::{Config, Error, Result, ResultExt, files};
use serde::{Deserialize, Serialize};

use super::target::Target;
use eqim::bundle::{Bundle, FileRecord, Precision};

/// Folder of a bundle that its TensorRT engines are in.
pub const FOLDER: &str = "trt";
/// Name of the file, in that folder, that describes them.
pub const SIDECAR_FILE: &str = "engines.json";
/// Version of that file's format.
pub const SIDECAR_FORMAT: u32 = 1;

/// The TensorRT engines of a bundle, one a stage, built together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineSet {
    /// Version of the sidecar's format.
    pub format: u32,
    /// Program and version that built them.
    pub producer: String,
    /// The library that built them, as `TensorRT-RTX 1.7.1`: no other version runs them.
    pub tensorrt: String,
    /// GPUs that they run on.
    pub targets: Vec<Target>,
    /// The model.
    pub model: Config,
    /// SHA-256 of the bundle's weights that are in the engines.
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
    /// SHA-256 of the bundle's graph of this stage.
    pub graph: String,
    /// SHA-256 of the graph that TensorRT parsed: the same stage, lowered in the engine's precision.
    pub lowered: String,
    /// Precision of weights, caches and matrix products.
    pub precision: Precision,
    /// Whether some of it is in INT8.
    #[serde(default)]
    pub int8: bool,
    /// Shapes by input: those that have an axis known at run time only.
    pub profiles: BTreeMap<String, Profile>,
    /// Layers as parsed, before TensorRT fuses them.
    pub layers: Vec<Layers>,
    /// Seconds that building took.
    pub seconds: f64,
    /// Largest resident size of the building process, bytes.
    pub peak_bytes: u64,
}

/// Shapes of an input between which an engine runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Smallest.
    pub min: Vec<i64>,
    /// The one that kernels are chosen for.
    pub opt: Vec<i64>,
    /// Largest.
    pub max: Vec<i64>,
}

/// Layers of one kind in one precision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layers {
    /// TensorRT's name of the kind, as `MATRIX_MULTIPLY`.
    pub kind: String,
    /// Type of the first output, as `HALF`.
    pub precision: String,
    /// How many.
    pub count: usize,
}

/// The one field that every version of the sidecar has.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

impl EngineSet {
    /// The engines of a bundle, or `None` when none were built.
    ///
    /// # Errors
    /// [`Error::input`] naming the field that says that they belong to another model, weights or graph; or the file
    /// that is missing.
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

    /// Checks that the engines are those of the bundle as it is now.
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

    /// What is known of a stage's engine.
    ///
    /// # Errors
    /// [`Error::input`] when there is none.
    pub fn engine(&self, bundle: &Bundle, stage: Stage) -> Result<&EngineRecord> {
        let path = bundle.folder.join(FOLDER).join(SIDECAR_FILE);
        let missing = || Error::input(path.display(), format!("has no {} engine", stage.name()));
        self.engines.get(stage.name()).ok_or_else(missing)
    }

    /// Path of a stage's engine.
    pub fn path(&self, bundle: &Bundle, stage: Stage) -> PathBuf {
        bundle.folder.join(FOLDER).join(file_name(stage))
    }
}

/// File name of a stage's engine.
pub fn file_name(stage: Stage) -> String {
    format!("{}.engine", stage.name())
}
