//! Checkpoints of `torch.save`: the tensors that a pickle describes, and their values.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::container::Container;
use super::pickle::{Id, Pickle, Value};
use super::{numpy, storage_type};
use crate::{Error, Result};

/// Calls around the description of a tensor: parameters, subclasses. More are refused, since a hostile parameter can
/// contain itself.
const MOST_WRAPPERS: usize = 8;
/// A tensor that is not contiguous is read with everything between its values. It must have at least one value in this
/// many, or lie within [`NARROW_SPAN`] bytes.
const WIDEST_SPREAD: usize = 16;
const NARROW_SPAN: usize = 16 << 20;

/// An open checkpoint. Tensors are read on request.
#[derive(Debug)]
pub struct TorchFile {
    path: PathBuf,
    container: Container,
    pickle: Pickle,
    root: Id,
}

/// Where the values of a tensor are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    /// In the storage with this key.
    Storage(String),
    /// In the pickle, as the bytes of an array of NumPy's.
    Pickle(Id),
}

/// Location, type and shape of a tensor's values.
#[derive(Clone, Debug)]
pub struct Layout {
    place: Place,
    dtype: DType,
    big_endian: bool,
    /// Index of the first value.
    offset: usize,
    shape: Vec<usize>,
    /// Distance between neighbours along each axis, in values.
    stride: Vec<usize>,
}

impl Layout {
    /// Sizes of the tensor's axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1usize;
        self.shape.iter().zip(&self.stride).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected = expected.saturating_mul(size);
            fits
        })
    }

    /// Bytes from the first to the last value of the tensor, as a range of its storage. `None` if they overflow.
    fn span(&self) -> Option<(u64, usize)> {
        let size = self.dtype.size_in_bytes();
        let elements = self.shape.iter().try_fold(1usize, |all, &n| all.checked_mul(n))?;
        elements.checked_mul(size)?;
        let last =
            self.shape.iter().zip(&self.stride).try_fold(0usize, |last, (&size, &stride)| {
                last.checked_add(size.saturating_sub(1).checked_mul(stride)?)
            });
        let values = if elements == 0 { 0 } else { last?.checked_add(1)? };
        let (start, length) = (self.offset.checked_mul(size)?, values.checked_mul(size)?);
        start.checked_add(length)?;
        Some((start as u64, length))
    }

    /// Makes the tensor of the bytes of its [span](Self::span).
    fn tensor(&self, mut bytes: Vec<u8>) -> Result<Tensor> {
        if self.big_endian {
            bytes.chunks_exact_mut(self.dtype.size_in_bytes()).for_each(<[u8]>::reverse);
        }
        if !self.is_contiguous() {
            bytes = self.gather(&bytes);
        }
        Ok(Tensor::from_raw_buffer(&bytes, self.dtype, &self.shape, &Device::Cpu)?)
    }

    /// The values in row-major order.
    fn gather(&self, bytes: &[u8]) -> Vec<u8> {
        let size = self.dtype.size_in_bytes();
        let mut starts = vec![0];
        for (&length, &stride) in self.shape.iter().zip(&self.stride) {
            let inner = |start: usize| (0..length).map(move |index| start + index * stride);
            starts = starts.into_iter().flat_map(inner).collect();
        }
        starts.into_iter().flat_map(|start| &bytes[start * size..(start + 1) * size]).copied().collect()
    }
}

impl TorchFile {
    /// Opens a checkpoint and reads everything except its tensors.
    ///
    /// # Errors
    /// [`Error::input`] if the file is truncated or not in the format.
    pub fn open(path: &Path) -> Result<Self> {
        let (container, pickle, root) = Container::open(path)?;
        Ok(Self { path: path.to_path_buf(), container, pickle, root })
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pickle of the checkpoint.
    pub fn pickle(&self) -> &Pickle {
        &self.pickle
    }

    /// The saved object.
    pub fn root(&self) -> Id {
        self.root
    }

    /// The keys of the checkpoint's dictionary.
    pub fn keys(&self) -> Vec<&str> {
        let entries = self.pickle.entries(self.root).unwrap_or_default();
        entries.iter().filter_map(|(key, _)| self.pickle.text(*key)).collect()
    }

    /// Location, type and shape of the tensor `name` at `id`.
    ///
    /// # Errors
    /// [`Error::input`] if the value is not a tensor, or is one that is not supported.
    pub fn layout(&self, name: &str, id: Id) -> Result<Layout> {
        let layout = self.described(id);
        layout.map_err(|problem| self.bad(format!("tensor {name} {problem}")))
    }

    /// Finds the description of a tensor below the calls around it: `_rebuild_parameter(tensor, …)` and
    /// `_rebuild_from_type(function, type, arguments, state)`.
    fn described(&self, id: Id) -> Result<Layout, String> {
        let refused =
            || format!("is {}, expected a tensor of float32, float64, float16 or bfloat16", self.pickle.describe(id));
        let (mut function, mut arguments) = self.pickle.call(id).ok_or_else(refused)?;
        for _ in 0..MOST_WRAPPERS {
            let items = self.pickle.sequence(arguments).ok_or_else(refused)?;
            let name = function.rsplit('.').next().unwrap_or_default();
            match (name, items) {
                _ if !function.starts_with("torch.") => return Err(refused()),
                ("_rebuild_parameter" | "_rebuild_parameter_with_state", &[tensor, ..])
                | ("_rebuild_device_tensor_from_cpu_tensor", &[tensor, ..]) => {
                    (function, arguments) = self.pickle.call(tensor).ok_or_else(refused)?;
                }
                ("_rebuild_from_type" | "_rebuild_from_type_v2", &[inner, _, inner_arguments, ..]) => {
                    (function, arguments) = (self.pickle.global(inner).ok_or_else(refused)?, inner_arguments);
                }
                ("_rebuild_device_tensor_from_numpy", &[array, dtype, ..]) => return self.in_pickle(array, dtype),
                (
                    "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3",
                    &[storage, offset, shape, stride, ..],
                ) => {
                    let dtype = if name == "_rebuild_tensor_v3" { items.get(6).copied() } else { None };
                    let metadata = items.get(if dtype.is_some() { 7 } else { 6 });
                    if metadata.is_some_and(|&id| self.pickle.entries(id).is_some_and(|entries| !entries.is_empty())) {
                        return Err("is a view with negated or conjugated values: save a copy of it".into());
                    }
                    return self.in_storage(storage, offset, (shape, stride), dtype);
                }
                _ => return Err(format!("is saved by {function}, which is not supported: save a plain tensor")),
            }
        }
        Err("is wrapped too many times".into())
    }

    fn in_storage(&self, storage: Id, offset: Id, sizes: (Id, Id), dtype: Option<Id>) -> Result<Layout, String> {
        let pickle = &self.pickle;
        let lies = || "has sizes, strides or an offset that cannot be read".to_string();
        let (Some(shape), Some(stride)) = (pickle.sizes(sizes.0), pickle.sizes(sizes.1)) else { return Err(lies()) };
        let offset = pickle.int(offset).and_then(|offset| usize::try_from(offset).ok()).ok_or_else(lies)?;
        if shape.len() != stride.len() {
            return Err(lies());
        }
        let unknown = || "has no storage of a known type".to_string();
        let Value::Persistent(storage) = pickle.get(storage) else { return Err(unknown()) };
        let Some(&[_, kind, key, ref rest @ ..]) = pickle.sequence(*storage) else { return Err(unknown()) };
        if rest.get(2).is_some_and(|view| !matches!(pickle.get(*view), Value::None)) {
            return Err("is in a view of a storage: load it with torch.load and save it again".into());
        }
        let (Some(kind), Some(key)) = (pickle.global(dtype.unwrap_or(kind)), pickle.text(key)) else {
            return Err(unknown());
        };
        let dtype = storage_type::dtype(kind);
        let dtype = dtype.ok_or_else(|| format!("is of {kind}, expected float32, float64, float16 or bfloat16"))?;
        let place = Place::Storage(key.to_string());
        let layout = Layout { place, dtype, big_endian: self.container.is_big_endian(), offset, shape, stride };
        let (_, span) = layout.span().ok_or("is too large: its size in bytes overflows")?;
        let values = layout.shape.iter().product::<usize>() * dtype.size_in_bytes();
        if span > NARROW_SPAN && span / WIDEST_SPREAD > values {
            return Err(format!("has {values} bytes spread over {span} bytes of its storage: save a copy of it"));
        }
        Ok(layout)
    }

    /// The layout of an array of NumPy's. Tensors of devices without storages are saved as such.
    fn in_pickle(&self, array: Id, dtype: Id) -> Result<Layout, String> {
        let refused = || "is not a plain array of float32, float64 or float16".to_string();
        let numpy::Array { code, big_endian, shape, bytes } = numpy::array(&self.pickle, array).ok_or_else(refused)?;
        let found = match code {
            "f4" => DType::F32,
            "f8" => DType::F64,
            "f2" => DType::F16,
            _ => return Err(refused()),
        };
        let declared = self.pickle.global(dtype).and_then(storage_type::dtype);
        // NumPy has no bfloat16, so such tensors are saved as arrays of float32.
        if declared.is_none() {
            return Err(refused());
        }
        let mut stride = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            stride[axis - 1] = shape[axis].saturating_mul(stride[axis]);
        }
        let layout = Layout { place: Place::Pickle(bytes), dtype: found, big_endian, offset: 0, shape, stride };
        layout.span().map(|_| layout).ok_or_else(|| "is too large: its size in bytes overflows".into())
    }

    /// Reads tensors, in the order of their storages. Each storage is read once, from start to end.
    ///
    /// # Errors
    /// [`Error::input`] naming a tensor whose storage is missing, too short or damaged; errors of `each`.
    pub fn read(
        &mut self,
        tensors: Vec<(String, Layout)>,
        mut each: impl FnMut(String, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let mut places: BTreeMap<Place, Vec<(String, Layout)>> = BTreeMap::new();
        for (name, layout) in tensors {
            places.entry(layout.place.clone()).or_default().push((name, layout));
        }
        for (place, tensors) in places {
            let bytes = match &place {
                Place::Storage(key) => self.ranges(key, &tensors)?,
                Place::Pickle(id) => vec![self.pickle.bytes(*id).unwrap_or_default(); tensors.len()],
            };
            for ((name, layout), bytes) in tensors.into_iter().zip(bytes) {
                let expected = layout.span().map_or(0, |(_, length)| length);
                if bytes.len() != expected {
                    return Err(self.bad(format!("tensor {name} has {} bytes, expected {expected}", bytes.len())));
                }
                each(name, &layout.tensor(bytes)?)?;
            }
        }
        Ok(())
    }

    /// The bytes of tensors that share the storage `key`.
    fn ranges(&mut self, key: &str, tensors: &[(String, Layout)]) -> Result<Vec<Vec<u8>>> {
        let spans: Vec<(u64, usize)> = tensors.iter().map(|(_, layout)| layout.span().unwrap_or_default()).collect();
        let end = |&(start, length): &(u64, usize)| start + length as u64;
        // The tensor that needs most of the storage is the one to name.
        let farthest = (0..spans.len()).max_by_key(|&index| end(&spans[index])).unwrap_or_default();
        let least = spans.get(farthest).map_or(0, end);
        let mut order: Vec<usize> = (0..spans.len()).collect();
        order.sort_by_key(|&index| spans[index].0);
        let (mut bytes, mut at, mut begun, mut open) = (vec![vec![]; spans.len()], 0u64, 0, vec![]);
        let read = self.container.read(key, least, |chunk| {
            let next = at + chunk.len() as u64;
            while let Some(&index) = order.get(begun).filter(|&&index| spans[index].0 < next) {
                open.push(index);
                begun += 1;
            }
            open.retain(|&index| {
                let (start, length) = spans[index];
                let from = start.max(at) - at;
                let to = end(&spans[index]).min(next).saturating_sub(at);
                if from < to {
                    bytes[index].extend_from_slice(&chunk[from as usize..to as usize]);
                }
                bytes[index].len() < length
            });
            at = next;
        });
        let more = match tensors.len() - 1 {
            0 => String::new(),
            more => format!(" (and {more} others in the same storage)"),
        };
        read.map_err(|error| error.about(format!("{}: tensor {}{more}", self.path.display(), tensors[farthest].0)))?;
        Ok(bytes)
    }

    /// An input error about this file.
    pub fn bad(&self, problem: impl std::fmt::Display) -> Error {
        Error::input(self.path.display(), problem)
    }
}
