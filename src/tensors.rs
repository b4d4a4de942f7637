//! `.safetensors` files, read tensor by tensor.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo, View};

use crate::{Error, Result, files};

const LARGEST_HEADER: u64 = 100_000_000;

/// An open `.safetensors` file whose header has been checked against its length.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    data_start: u64,
}

impl TensorFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`Error::Input`] when it is truncated or not in the format.
    pub fn open(path: &Path) -> Result<Self> {
        let bad = |problem: String| Error::input(path.display(), format!("is not a safetensors file: {problem}"));
        let mut file = files::open(path)?;
        let length = file.metadata().map_err(|error| bad(error.to_string()))?.len();
        if length < 8 {
            return Err(bad(format!("it has {length} bytes, too few for a header")));
        }
        let mut header = vec![0; 8];
        file.read_exact(&mut header).map_err(|error| bad(error.to_string()))?;
        let header_length = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| header[i]));
        if header_length > LARGEST_HEADER.min(length - 8) {
            return Err(bad(format!("a header of {header_length} bytes does not fit its {length}")));
        }
        header.resize(8 + header_length as usize, 0);
        file.read_exact(&mut header[8..]).map_err(|error| bad(error.to_string()))?;
        let metadata: Metadata = serde_json::from_slice(&header[8..]).map_err(|error| bad(error.to_string()))?;
        let data_start = header.len() as u64;
        let end = metadata.tensors().values().map(|info| info.data_offsets.1).max().unwrap_or(0) as u64;
        if data_start.checked_add(end) != Some(length) {
            return Err(bad(format!("its tensors end at byte {end} of {}: truncated?", length - data_start)));
        }
        Ok(Self { path: path.to_path_buf(), file, metadata, data_start })
    }

    /// The path it was opened at.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names, types, shapes and places of all tensors.
    pub fn tensors(&self) -> HashMap<String, &TensorInfo> {
        self.metadata.tensors()
    }

    /// The text stored under `key` beside the tensors.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Position in the file and length, in bytes, of a tensor's values.
    pub fn place(&self, info: &TensorInfo) -> (u64, u64) {
        let (start, end) = info.data_offsets;
        (self.data_start + start as u64, (end - start) as u64)
    }

    /// Reads one tensor.
    ///
    /// # Errors
    /// [`Error::Input`] when there is none of that name, or of a type that Candle does not have.
    pub fn read(&mut self, name: &str) -> Result<Tensor> {
        let bad = |problem: String| Error::input(self.path.display(), format!("tensor {name}: {problem}"));
        let info = self.metadata.info(name).ok_or_else(|| bad("is missing".into()))?;
        let dtype = DType::try_from(info.dtype).map_err(|error| bad(error.to_string()))?;
        let (start, length) = self.place(info);
        let mut bytes = vec![0; length as usize];
        let read = self.file.seek(SeekFrom::Start(start)).and_then(|_| self.file.read_exact(&mut bytes));
        read.map_err(|error| bad(error.to_string()))?;
        Ok(Tensor::from_raw_buffer(&bytes, dtype, &info.shape, &Device::Cpu)?)
    }
}

/// A Candle tensor on its way into a `.safetensors` file.
struct Stored<'a>(&'a Tensor);

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        match self.0.dtype() {
            DType::F16 => Dtype::F16,
            DType::I64 => Dtype::I64,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        self.0.dims()
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        bytes(self.0).unwrap_or_default().into()
    }

    fn data_len(&self) -> usize {
        self.0.elem_count() * self.0.dtype().size_in_bytes()
    }
}

/// Little-endian values of a tensor of `f32`, `f16` or `i64`.
fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    Ok(match flat.dtype() {
        DType::F16 => flat.to_vec1::<half::f16>()?.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::I64 => flat.to_vec1::<i64>()?.iter().flat_map(|value| value.to_le_bytes()).collect(),
        _ => flat.to_dtype(DType::F32)?.to_vec1::<f32>()?.iter().flat_map(|value| value.to_le_bytes()).collect(),
    })
}

/// Writes tensors of `f32`, `f16` or `i64`, with `text` beside them, replacing `path` when all of it is written.
///
/// # Errors
/// [`Error::Run`] when it cannot be written.
pub fn write(path: &Path, tensors: &[(&str, Tensor)], text: HashMap<String, String>) -> Result<()> {
    let views = tensors.iter().map(|(name, tensor)| (*name, Stored(tensor)));
    files::write_beside(path, |beside| {
        safetensors::serialize_to_file(views, Some(text), beside)
            .map_err(|error| Error::run(path.display(), format!("cannot be written: {error}")))
    })
}
