//! One `.safetensors` file, or several with an index (`model.safetensors.index.json`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use safetensors::Dtype;
use serde::Deserialize;

use super::tensors::TensorFile;
use crate::{Error, Result, ResultExt, files};

/// End of the name of an index.
const INDEX: &str = ".safetensors.index.json";

/// The index of a model that is split into several files.
#[derive(Deserialize)]
struct Index {
    /// File of every tensor, by the tensor's name.
    weight_map: BTreeMap<String, String>,
}

/// Open `.safetensors` files.
#[derive(Debug)]
pub struct Shards {
    path: PathBuf,
    files: Vec<TensorFile>,
    /// Number of the file of every tensor.
    places: BTreeMap<String, usize>,
}

impl Shards {
    /// Opens a file, or the files of an index.
    ///
    /// # Errors
    /// [`Error::input`] if a file is missing, truncated or not in the format, or lacks a tensor of the index.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.to_string_lossy().ends_with(INDEX) {
            let is_named = path.extension().is_some_and(|extension| extension == "safetensors");
            let any = "a checkpoint of torch.save or a safetensors file";
            let file = TensorFile::open_as(path, if is_named { "a safetensors file" } else { any })?;
            let places = file.tensors().into_keys().map(|name| (name, 0)).collect();
            return Ok(Self { path: path.to_path_buf(), files: vec![file], places });
        }
        let bad = |problem: String| Error::input(path.display(), problem);
        let index: Index = serde_json::from_slice(&files::read(path)?).or_input(path.display())?;
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        if let Some(name) = names.iter().find(|name| name.contains(['/', '\\']) || name.starts_with('.')) {
            return Err(bad(format!("names a file outside of its folder: {name}")));
        }
        let names: Vec<&String> = names.into_iter().collect();
        let open = |name: &&String| TensorFile::open(&files::folder(path).join(name));
        let files = names.iter().map(open).collect::<Result<Vec<_>>>()?;
        let held: Vec<BTreeSet<String>> = files.iter().map(|file| file.tensors().into_keys().collect()).collect();
        let numbers: HashMap<&String, usize> = names.iter().copied().zip(0..).collect();
        let mut places = BTreeMap::new();
        for (tensor, name) in &index.weight_map {
            let number = numbers[name];
            if !held[number].contains(tensor) {
                return Err(bad(format!("says that {name} has the tensor {tensor}, and it has not")));
            }
            places.insert(tensor.clone(), number);
        }
        Ok(Self { path: path.to_path_buf(), files, places })
    }

    /// Path of the file or index.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// The text stored under `key` in the metadata of a single file.
    pub fn only(&self) -> Option<&TensorFile> {
        if let [file] = &self.files[..] { Some(file) } else { None }
    }

    /// Shape of a tensor.
    ///
    /// # Errors
    /// [`Error::input`] if there is no tensor of this name, or it has no floating-point values.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        let bad = |problem: String| Error::input(self.path.display(), format!("tensor {name} {problem}"));
        let number = self.places.get(name).ok_or_else(|| bad("is missing".into()))?;
        let info = self.files[*number].info(name).ok_or_else(|| bad("is missing".into()))?;
        if !matches!(info.dtype, Dtype::F32 | Dtype::F64 | Dtype::F16 | Dtype::BF16) {
            return Err(bad(format!("is of type {}, expected F32, F64, F16 or BF16", info.dtype)));
        }
        Ok(info.shape.clone())
    }

    /// Reads a tensor.
    ///
    /// # Errors
    /// [`Error::input`] if there is no tensor of this name.
    pub fn read(&mut self, name: &str) -> Result<Tensor> {
        let missing = || Error::input(self.path.display(), format!("tensor {name} is missing"));
        let number = *self.places.get(name).ok_or_else(missing)?;
        self.files[number].read(name)
    }
}
