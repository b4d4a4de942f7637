//! Reads `.safetensors` files tensor by tensor, and writes them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo, View};

use crate::{Error, Result, ResultExt, files, kind};

/// Largest header that is read. The header of the largest published model has 0.1 MB.
const LARGEST_HEADER: u64 = 16 << 20;

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
    /// [`Error::input`] if the file is truncated or not in the format.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_as(path, "a safetensors file")
    }

    /// Opens a file whose place may also be taken by files of other formats: `expected` names all of them.
    ///
    /// # Errors
    /// Those of [`TensorFile::open`].
    pub(super) fn open_as(path: &Path, expected: &str) -> Result<Self> {
        let bad = |problem: &str| match kind::of(path) {
            Some(kind) => Error::input(path.display(), kind.instead_of(expected)),
            None => Error::input(path.display(), format!("is not {expected}{problem}")),
        };
        let mut file = files::open(path)?;
        let length = file.metadata().map_err(|error| bad("").because(error))?.len();
        if length < 8 {
            return Err(bad(&format!(": it has {length} bytes, too few for a header")));
        }
        let mut header = vec![0; 8];
        file.read_exact(&mut header).map_err(|error| bad("").because(error))?;
        let header_length = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| header[i]));
        if header_length > LARGEST_HEADER && header_length <= length - 8 {
            return Err(bad(&format!(": its header has {header_length} bytes, at most {LARGEST_HEADER} are read")));
        }
        // The first bytes of other files give any number.
        if header_length > LARGEST_HEADER {
            return Err(bad(""));
        }
        if header_length > length - 8 {
            let problem =
                format!(": its header of {header_length} bytes does not fit in its {length} bytes: truncated?");
            return Err(bad(&problem));
        }
        header.resize(8 + header_length as usize, 0);
        file.read_exact(&mut header[8..]).map_err(|error| bad("").because(error))?;
        let metadata: Metadata = serde_json::from_slice(&header[8..]).map_err(|error| bad("").because(error))?;
        let data_start = header.len() as u64;
        let end = metadata.tensors().values().map(|info| info.data_offsets.1).max().unwrap_or(0) as u64;
        if data_start.checked_add(end) != Some(length) {
            return Err(bad(&format!(
                ": its tensors take {end} bytes, but the file has {} bytes of them: truncated?",
                length - data_start
            )));
        }
        Ok(Self { path: path.to_path_buf(), file, metadata, data_start })
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names, types, shapes and offsets of all tensors.
    pub fn tensors(&self) -> HashMap<String, &TensorInfo> {
        self.metadata.tensors()
    }

    /// Type, shape and offsets of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.metadata.info(name)
    }

    /// The text stored under `key` in the file's metadata.
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
    /// [`Error::input`] if there is no tensor of this name, or if Candle does not support its type.
    pub fn read(&mut self, name: &str) -> Result<Tensor> {
        self.read_part(name, None)
    }

    /// Reads these rows of the first axis of a tensor.
    ///
    /// # Errors
    /// Those of [`TensorFile::read`]; [`Error::input`] if the tensor does not have these rows.
    pub fn read_rows(&mut self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        self.read_part(name, Some(rows))
    }

    fn read_part(&mut self, name: &str, rows: Option<Range<usize>>) -> Result<Tensor> {
        let bad = |problem: String| Error::input(self.path.display(), format!("tensor {name}: {problem}"));
        let info = self.metadata.info(name).ok_or_else(|| bad("is missing".into()))?;
        let dtype = DType::try_from(info.dtype).or_input(format!("{}: tensor {name}", self.path.display()))?;
        let (mut start, mut length) = self.place(info);
        let mut shape = info.shape.clone();
        if let Some(rows) = rows {
            let count = shape.first_mut().filter(|count| rows.start < rows.end && rows.end <= **count);
            let count = count.ok_or_else(|| bad(format!("is {:?}, expected rows {rows:?}", info.shape)))?;
            let row = length / *count as u64;
            (start, length) = (start + row * rows.start as u64, row * rows.len() as u64);
            *count = rows.len();
        }
        let mut bytes = vec![0; length as usize];
        let read = self.file.seek(SeekFrom::Start(start)).and_then(|_| self.file.read_exact(&mut bytes));
        read.or_input(format!("{}: tensor {name}", self.path.display()))?;
        Ok(Tensor::from_raw_buffer(&bytes, dtype, &shape, &Device::Cpu)?)
    }
}

/// Values to write to a file.
#[derive(Clone, Debug)]
pub enum Values {
    /// A tensor of `f32`, `f16` or `bf16`.
    Tensor(Tensor),
    /// Values of a type that Candle does not support.
    Raw {
        /// Type of the values.
        dtype: Dtype,
        /// Shape of the values.
        shape: Vec<usize>,
        /// Little-endian bytes of the values.
        bytes: Vec<u8>,
    },
}

/// Values and their type, which has been checked.
struct Stored<'a> {
    dtype: Dtype,
    values: &'a Values,
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        match self.values {
            Values::Tensor(tensor) => tensor.dims(),
            Values::Raw { shape, .. } => shape,
        }
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        match self.values {
            // The type has been checked and the tensor is on the CPU, so this cannot fail. If it did, the length would
            // be wrong and the file could not be read.
            Values::Tensor(tensor) => bytes(tensor).unwrap_or_default().into(),
            Values::Raw { bytes, .. } => bytes.into(),
        }
    }

    fn data_len(&self) -> usize {
        match self.values {
            Values::Tensor(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Values::Raw { bytes, .. } => bytes.len(),
        }
    }
}

/// Little-endian bytes of a tensor of `f32`, `f16` or `bf16`.
fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    let mut bytes = Vec::with_capacity(flat.elem_count() * flat.dtype().size_in_bytes());
    match flat.dtype() {
        DType::F16 => flat.to_vec1::<half::f16>()?.iter().for_each(|value| bytes.extend(value.to_le_bytes())),
        DType::BF16 => flat.to_vec1::<half::bf16>()?.iter().for_each(|value| bytes.extend(value.to_le_bytes())),
        _ => flat.to_vec1::<f32>()?.iter().for_each(|value| bytes.extend(value.to_le_bytes())),
    }
    Ok(bytes)
}

/// Writes tensors of `f32`, `f16` or `bf16`, with `text` as metadata. `path` is replaced only once the file is
/// complete.
///
/// # Errors
/// [`Error::run`] for a tensor of another type, or if the file cannot be written.
pub fn write(path: &Path, tensors: &[(&str, Tensor)], text: HashMap<String, String>) -> Result<()> {
    let values: Vec<(&str, Values)> =
        tensors.iter().map(|(name, tensor)| (*name, Values::Tensor(tensor.clone()))).collect();
    write_values(path, &values, text)
}

/// Writes like [`write()`], but also accepts values of other types ([`Values::Raw`]).
///
/// # Errors
/// [`Error::run`] for a tensor of another type, or if the file cannot be written.
pub fn write_values(path: &Path, values: &[(&str, Values)], text: HashMap<String, String>) -> Result<()> {
    let failed = |problem: String| Error::run(path.display(), format!("cannot be written: {problem}"));
    let stored = |(name, values): &'_ (&'_ str, Values)| match values {
        Values::Raw { dtype, .. } => Ok(*dtype),
        Values::Tensor(tensor) => match tensor.dtype() {
            DType::F32 => Ok(Dtype::F32),
            DType::F16 => Ok(Dtype::F16),
            DType::BF16 => Ok(Dtype::BF16),
            other => Err(failed(format!("tensor {name} is of type {other:?}, expected F32, F16 or BF16"))),
        },
    };
    let dtypes = values.iter().map(stored).collect::<Result<Vec<_>>>()?;
    let views = values.iter().zip(dtypes).map(|((name, values), dtype)| (*name, Stored { dtype, values }));
    files::write_beside(path, |beside| {
        // The library replaces the file by one that only the owner may read, so the permissions are restored.
        let permissions = std::fs::metadata(beside).map_err(|error| failed(error.to_string()))?.permissions();
        safetensors::serialize_to_file(views, Some(text), beside).map_err(|error| failed(error.to_string()))?;
        std::fs::set_permissions(beside, permissions).map_err(|error| failed(error.to_string()))
    })
}
