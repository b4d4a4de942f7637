//! PyTorch's zip checkpoints: an archive with `data.pkl` and one file per storage.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use zip::ZipArchive;

use super::pickle::{self, Id, Pickle, Value};
use crate::{Error, Result, ResultExt, files};

// A pickle holds only names and numbers. The largest published one is smaller than 1 MB.
const LARGEST_PICKLE: u64 = 256 << 20;

/// An open checkpoint. Each tensor is read on request.
#[derive(Debug)]
pub struct TorchFile {
    path: PathBuf,
    archive: ZipArchive<BufReader<File>>,
    prefix: String,
    pickle: Pickle,
    root: Id,
}

/// Location, type and shape of a tensor's values.
struct Layout {
    storage: String,
    dtype: DType,
    offset: usize,
    shape: Vec<usize>,
}

impl TorchFile {
    /// Opens a checkpoint and reads everything except its tensors.
    ///
    /// # Errors
    /// [`Error::input`] if the file is truncated or not in the format.
    pub fn open(path: &Path) -> Result<Self> {
        let bad = || Error::input(path.display(), "is not a PyTorch checkpoint");
        let file = BufReader::new(files::open(path)?);
        let mut archive = ZipArchive::new(file).map_err(|error| bad().because(error))?;
        let name = archive.file_names().flatten().find(|name| name.ends_with("data.pkl")).map(String::from);
        let name = name.ok_or_else(|| bad().advise(": the archive has no data.pkl"))?;
        let mut bytes = vec![];
        let entry = archive.by_name(&name).map_err(|error| bad().because(error))?;
        entry.take(LARGEST_PICKLE).read_to_end(&mut bytes).map_err(|error| bad().because(error))?;
        let (pickle, root) = pickle::read(&bytes).map_err(|error| bad().because(error))?;
        let prefix = name.trim_end_matches("data.pkl").to_string();
        Ok(Self { path: path.to_path_buf(), archive, prefix, pickle, root })
    }

    /// The value of `key` in the checkpoint's dictionary.
    pub fn item(&self, key: &str) -> Option<Id> {
        self.pickle.item(self.root, key)
    }

    /// The keys of the checkpoint's dictionary.
    pub fn keys(&self) -> Vec<&str> {
        let entries = self.pickle.entries(self.root).unwrap_or_default();
        entries.iter().filter_map(|(key, _)| self.pickle.text(*key)).collect()
    }

    /// The pickle of the checkpoint.
    pub fn pickle(&self) -> &Pickle {
        &self.pickle
    }

    /// Names of the tensors in the state dict at `id`, with their indices in the pickle.
    pub fn state_dict(&self, id: Id) -> Result<BTreeMap<String, Id>> {
        let entries = self.pickle.entries(id).ok_or_else(|| self.bad("a state dict is not a dictionary"))?;
        let named = entries.iter().filter_map(|(name, tensor)| Some((self.pickle.text(*name)?.to_string(), *tensor)));
        Ok(named.collect())
    }

    /// Shape of the tensor `name` at `id`.
    ///
    /// # Errors
    /// [`Error::input`] if the tensor is not contiguous or has an unsupported type.
    pub fn shape(&self, name: &str, id: Id) -> Result<Vec<usize>> {
        Ok(self.named_layout(name, id)?.shape)
    }

    fn named_layout(&self, name: &str, id: Id) -> Result<Layout> {
        self.layout(id).ok_or_else(|| {
            self.bad(format!(
                "tensor {name} cannot be read: expected a contiguous tensor of float32, float64, float16 or \
                 bfloat16"
            ))
        })
    }

    /// Reads the tensor `name` at `id`.
    ///
    /// # Errors
    /// [`Error::input`] if the tensor's storage is missing or too short, or if its type is not supported.
    pub fn tensor(&mut self, name: &str, id: Id) -> Result<Tensor> {
        let layout =
            self.layout(id).ok_or_else(|| self.bad(format!("tensor {name} has a layout that cannot be read")))?;
        let size = layout.dtype.size_in_bytes();
        let elements = layout.shape.iter().try_fold(size, |all, &n| all.checked_mul(n));
        let range = elements.and_then(|length| Some((layout.offset.checked_mul(size)? as u64, length)));
        let (start, length) =
            range.ok_or_else(|| self.bad(format!("tensor {name} is too large: its size in bytes overflows")))?;
        let storage = format!("{}data/{}", self.prefix, layout.storage);
        let bytes = read_range(&mut self.archive, &storage, start, length)
            .map_err(|error| error.about(format!("{}: tensor {name}", self.path.display())))?;
        Ok(Tensor::from_raw_buffer(&bytes, layout.dtype, &layout.shape, &Device::Cpu)?)
    }

    /// Reads the arguments of `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, …)`. Returns `None` if
    /// the tensor is not contiguous or has an unsupported type.
    fn layout(&self, id: Id) -> Option<Layout> {
        let (mut function, mut arguments) = self.pickle.call(id)?;
        if function == "torch._utils._rebuild_parameter" {
            (function, arguments) = self.pickle.call(*self.pickle.sequence(arguments)?.first()?)?;
        }
        if function != "torch._utils._rebuild_tensor_v2" {
            return None;
        }
        let &[storage, offset, size, stride, ..] = self.pickle.sequence(arguments)? else { return None };
        let sizes = |id| -> Option<Vec<usize>> {
            self.pickle.sequence(id)?.iter().map(|&id| usize::try_from(self.pickle.int(id)?).ok()).collect()
        };
        let (shape, stride) = (sizes(size)?, sizes(stride)?);
        if !contiguous(&shape, &stride) {
            return None;
        }
        let Value::Persistent(storage) = self.pickle.get(storage) else { return None };
        let &[_, kind, key, ..] = self.pickle.sequence(*storage)? else { return None };
        let Value::Global(kind) = self.pickle.get(kind) else { return None };
        let dtype = match kind.as_str() {
            "torch.FloatStorage" => DType::F32,
            "torch.DoubleStorage" => DType::F64,
            "torch.HalfStorage" => DType::F16,
            "torch.BFloat16Storage" => DType::BF16,
            _ => return None,
        };
        let storage = self.pickle.text(key)?.to_string();
        Some(Layout { storage, dtype, offset: usize::try_from(self.pickle.int(offset)?).ok()?, shape })
    }

    /// An input error about this file.
    pub fn bad(&self, problem: impl std::fmt::Display) -> Error {
        Error::input(self.path.display(), problem)
    }
}

/// Reads bytes `start..start + length` of an entry.
fn read_range(archive: &mut ZipArchive<BufReader<File>>, name: &str, start: u64, length: usize) -> Result<Vec<u8>> {
    let storage = format!("storage {name}");
    let mut entry = archive.by_name(name).or_input(&storage)?;
    let end = start.saturating_add(length as u64);
    if entry.size() < end {
        return Err(Error::input(storage, format!("has {} bytes, expected at least {end}", entry.size())));
    }
    std::io::copy(&mut entry.by_ref().take(start), &mut std::io::sink()).or_input(&storage)?;
    let mut bytes = vec![];
    entry.take(length as u64).read_to_end(&mut bytes).or_input(&storage)?;
    if bytes.len() < length {
        return Err(Error::input(storage, format!("ends after {} of {length} bytes", bytes.len())));
    }
    Ok(bytes)
}

fn contiguous(shape: &[usize], stride: &[usize]) -> bool {
    let mut expected = 1usize;
    shape.len() == stride.len()
        && shape.iter().zip(stride).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected = expected.saturating_mul(size);
            fits
        })
}
