//! A bundle: a folder with small ONNX graphs, one `model.safetensors` with the weights of all graphs (ONNX external
//! data), and `config.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Inferred;
use crate::checkpoint::tensors::TensorFile;
use crate::digest::{sha256_of, short};
use crate::model::{Stage, ValueInfo};
use crate::weights::Weights;
use crate::{Config, Error, Result, ResultExt, checkpoint, files, kind};

/// Name of the file that describes a bundle.
pub const CONFIG_FILE: &str = "config.json";
/// Name of the weights file.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Name of the calibration table from which an INT8 bundle was quantized.
pub const CALIBRATION_FILE: &str = "calibration.json";
/// Version of the bundle format that this code writes and reads.
pub const FORMAT: u32 = 1;

/// Contents of `config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the bundle's format.
    pub format: u32,
    /// Program and version that wrote the bundle.
    pub producer: String,
    /// Precision of weights, caches and matrix products.
    pub precision: Precision,
    /// ONNX operator set of the graphs.
    pub opset: i64,
    /// Configuration of the model.
    pub model: Config,
    /// The weights. Candle reads them, and the graphs refer to them.
    pub weights: FileRecord,
    /// The graphs, by stage name.
    pub graphs: BTreeMap<String, GraphRecord>,
    /// The INT8 parts of the bundle, if there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// Where the values of the configuration come from. Empty if the bundle has random weights or an older version wrote
    /// it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inferred: Vec<Inferred>,
}

impl Manifest {
    /// Whether all computations are in FP32.
    pub fn is_fp32(&self) -> bool {
        self.precision == Precision::Fp32 && self.quantization.is_none()
    }
}

/// The INT8 parts of a bundle. All other parts are in the bundle's [`Precision`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantization {
    /// Runtime that the graphs are made for.
    #[serde(alias = "flavour")]
    pub target: Int8Target,
    /// Names of the stages with INT8 parts.
    pub stages: Vec<String>,
    /// Scopes (module names) in INT8.
    pub scopes: BTreeSet<String>,
    /// File of the calibration table.
    pub calibration: FileRecord,
}

/// Runtime that INT8 graphs are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Int8Target {
    /// TensorRT: explicit, symmetric `QuantizeLinear` and `DequantizeLinear`, which any runtime can run.
    #[cfg_attr(feature = "clap", value(name = "tensorrt"))]
    TensorRt,
    /// ONNX Runtime on a CPU: integer operators, some of which TensorRT does not support.
    Cpu,
}

impl std::fmt::Display for Int8Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::TensorRt => "tensorrt",
            Self::Cpu => "cpu",
        })
    }
}

/// Precision of a bundle's graphs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floating point.
    #[default]
    Fp32,
    /// 16-bit floating point (`float16`). Norms, softmax, the residual stream and the ODE's state are in FP32.
    Fp16,
    /// 16-bit `bfloat16`, with the same parts in FP32. TensorRT only: ONNX Runtime has no CPU kernels for it.
    Bf16,
}

impl Precision {
    /// Data type of the weights.
    pub fn dtype(self) -> safetensors::Dtype {
        match self {
            Self::Fp32 => safetensors::Dtype::F32,
            Self::Fp16 => safetensors::Dtype::F16,
            Self::Bf16 => safetensors::Dtype::BF16,
        }
    }

    /// Size of a value in bytes.
    pub fn bytes(self) -> usize {
        self.dtype().bitsize() / 8
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
        })
    }
}

/// Record of a file of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Name of the file in the bundle's folder.
    pub file: String,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// SHA-256 of the file in hexadecimal.
    pub sha256: String,
}

/// Record of a graph of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraphRecord {
    /// The `.onnx` file.
    #[serde(flatten)]
    pub file: FileRecord,
    /// Inputs of the graph, in order.
    pub inputs: Vec<ValueInfo>,
    /// Outputs of the graph, in order.
    pub outputs: Vec<ValueInfo>,
    /// Functions that the graph calls ([`crate::ops::function`]). Empty in bundles of older versions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub functions: Vec<String>,
}

/// An opened bundle. It is complete, and its graphs have not changed since the export.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// Folder of the bundle.
    pub folder: PathBuf,
    /// Contents of the bundle's `config.json`.
    pub manifest: Manifest,
}

impl FileRecord {
    /// Describes the current contents of `folder/file`.
    ///
    /// # Errors
    /// [`Error::input`] if the file cannot be read.
    pub fn of(folder: &Path, file: &str) -> Result<Self> {
        let path = folder.join(file);
        let (bytes, sha256) = sha256_of(files::open(&path)?).or_input(path.display())?;
        Ok(Self { file: file.to_string(), bytes, sha256 })
    }

    /// Describes the current contents of the file at `path`.
    ///
    /// # Errors
    /// [`Error::input`] if the file cannot be read.
    pub fn at(path: &Path) -> Result<Self> {
        Self::of(files::folder(path), &path.file_name().unwrap_or_default().to_string_lossy())
    }

    /// Checks that the file in `folder` still has the recorded length and SHA-256.
    ///
    /// # Errors
    /// [`Error::input`] naming the file, if it cannot be read or has changed.
    pub fn verify(&self, folder: &Path) -> Result<()> {
        let found = Self::of(folder, &self.file)?;
        if &found == self {
            return Ok(());
        }
        self.refuse_pointer(folder)?;
        let problem = format!(
            "is not the file that was exported ({} bytes, sha256 {}…; its description says {} bytes, {}…): run eqim-export \
             again",
            found.bytes,
            short(&found.sha256),
            self.bytes,
            short(&self.sha256),
        );
        Err(Error::input(folder.join(&self.file).display(), problem))
    }

    /// An error if the file has not been fetched: a clone without Git LFS has small text files in the place of files.
    fn refuse_pointer(&self, folder: &Path) -> Result<()> {
        let path = folder.join(&self.file);
        match kind::of(&path).filter(|kind| kind.is_pointer()) {
            Some(kind) => Err(Error::input(path.display(), format!("is {kind}"))),
            None => Ok(()),
        }
    }
}

impl Bundle {
    /// Opens a bundle and checks that it is complete. For the weights, only the length and the header are checked;
    /// [`Bundle::load_weights`] and [`FileRecord::verify`] also check their contents.
    ///
    /// # Errors
    /// [`Error::input`] naming the file that is missing, belongs to another bundle or has changed.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG_FILE);
        let bad = |problem: String| Error::input(path.display(), problem);
        let not_a_bundle = || Error::input(folder.display(), "is not a bundle, a folder that eqim-export onnx wrote");
        let metadata = folder.metadata().map_err(|error| not_a_bundle().because(error))?;
        if !metadata.is_dir() {
            return Err(not_a_bundle());
        }
        let text = files::read(&path)?;
        let version: Version =
            serde_json::from_slice(&text).map_err(|error| bad("does not describe a bundle".into()).because(error))?;
        if version.format != FORMAT {
            return Err(bad(format!(
                "has format {}, expected {FORMAT}: export the bundle again with this version",
                version.format
            )));
        }
        let manifest: Manifest = serde_json::from_slice(&text).or_input(path.display())?;
        manifest.model.check().map_err(|error| error.about(path.display()))?;
        let bundle = Self { folder: folder.to_path_buf(), manifest };
        bundle.check_files()?;
        Ok(bundle)
    }

    /// Sizes and times of the bundle's files, by name. They differ after a file has changed.
    ///
    /// # Errors
    /// [`Error::input`] naming the file that is missing.
    pub fn stamps(&self) -> Result<BTreeMap<String, (u64, SystemTime)>> {
        let files = self.records().map(|record| record.file.as_str()).chain([CONFIG_FILE]);
        let stamp = |name: &str| {
            let path = self.folder.join(name);
            let metadata = path.metadata().or_input(path.display())?;
            Ok((name.to_string(), (metadata.len(), metadata.modified().or_run(path.display())?)))
        };
        files.map(stamp).collect()
    }

    /// The records of all files but `config.json`.
    fn records(&self) -> impl Iterator<Item = &FileRecord> {
        let table = self.manifest.quantization.iter().map(|quantization| &quantization.calibration);
        self.manifest.graphs.values().map(|graph| &graph.file).chain([&self.manifest.weights]).chain(table)
    }

    fn check_files(&self) -> Result<()> {
        let config = self.folder.join(CONFIG_FILE);
        for record in self.records() {
            let plain = Path::new(&record.file).components().count() == 1 && !record.file.contains(['/', '\\']);
            if !plain || record.file.starts_with('.') {
                return Err(Error::input(
                    config.display(),
                    format!("names a file outside of the bundle: {}", record.file),
                ));
            }
        }
        for stage in Stage::ALL {
            let graph = self.graph(stage)?;
            let model = &self.manifest.model;
            if graph.inputs != stage.inputs(model) || graph.outputs != stage.outputs(model) {
                return Err(Error::input(
                    config.display(),
                    format!("describes a {} with other inputs or outputs: export the bundle again", stage.name()),
                ));
            }
            graph.file.verify(&self.folder)?;
        }
        if let Some(quantization) = &self.manifest.quantization {
            quantization.calibration.verify(&self.folder)?;
        }
        self.check_weights()
    }

    /// Checks the length of the weights, and that their file belongs to this model and precision.
    fn check_weights(&self) -> Result<()> {
        let path = self.weights_path();
        let bad = |problem: String| Err(Error::input(path.display(), problem));
        let found = files::open(&path)?.metadata().or_input(path.display())?.len();
        let expected = self.manifest.weights.bytes;
        if found != expected {
            self.manifest.weights.refuse_pointer(&self.folder)?;
            return bad(format!("has {found} bytes, {CONFIG_FILE} says {expected}: truncated?"));
        }
        let file = TensorFile::open(&path)?;
        if !checkpoint::stored_config(&file)?.is_same_model(&self.manifest.model) {
            return bad(format!("was written for another model than {CONFIG_FILE}: export the bundle again"));
        }
        let dtype = self.manifest.precision.dtype();
        let fits = |found: Dtype| found == dtype || self.manifest.quantization.is_some() && is_integer(found);
        match file.tensors().into_iter().find(|(_, info)| !fits(info.dtype)) {
            Some((name, info)) => bad(format!(
                "tensor {name} is of type {}, and {CONFIG_FILE} says {}",
                info.dtype, self.manifest.precision
            )),
            None => Ok(()),
        }
    }

    /// Loads the weights. Their contents are checked first: the file must be the one that was exported.
    ///
    /// # Errors
    /// [`Error::input`] naming the file and the tensor, if the weights have changed or are not those of the model.
    pub fn load_weights(&self) -> Result<(Config, Weights)> {
        self.manifest.weights.verify(&self.folder)?;
        checkpoint::load_safetensors(&self.weights_path())
    }

    /// Record of a stage's graph.
    ///
    /// # Errors
    /// [`Error::input`] if the bundle has no graph for the stage.
    pub fn graph(&self, stage: Stage) -> Result<&GraphRecord> {
        let missing =
            || Error::input(self.folder.join(CONFIG_FILE).display(), format!("has no {} graph", stage.name()));
        self.manifest.graphs.get(stage.name()).ok_or_else(missing)
    }

    /// Path of a stage's graph.
    ///
    /// # Errors
    /// [`Error::input`] if the bundle has no graph for the stage.
    pub fn graph_path(&self, stage: Stage) -> Result<PathBuf> {
        Ok(self.folder.join(&self.graph(stage)?.file.file))
    }

    /// Path of the weights file.
    pub fn weights_path(&self) -> PathBuf {
        self.folder.join(&self.manifest.weights.file)
    }
}

/// Whether a data type is the one of INT8 weights (`i8`) or of their biases (`i32`).
fn is_integer(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::I8 | Dtype::I32)
}

/// The only field that every version of `config.json` has.
#[derive(Deserialize)]
struct Version {
    format: u32,
}
