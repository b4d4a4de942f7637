//! The weights of a model, by checkpoint name.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// Tensors of `f32` by checkpoint name.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    /// The tensor `name`, which must have the shape `shape`.
    ///
    /// # Errors
    /// [`Error::input`] if there is no tensor of this name and shape.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.find(name)?;
        if tensor.dims() != shape {
            let problem = format!("has shape {:?}, expected {shape:?}", tensor.dims());
            return Err(Error::input(format!("tensor {name}"), problem));
        }
        Ok(tensor.clone())
    }

    /// The tensor `name`, of any shape.
    ///
    /// # Errors
    /// [`Error::input`] if there is no tensor of this name.
    pub fn find(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::input(format!("tensor {name}"), "is missing"))
    }

    /// The device that the tensors are on.
    pub fn device(&self) -> Device {
        self.tensors.first_key_value().map_or(Device::Cpu, |(_, tensor)| tensor.device().clone())
    }

    /// Copies the tensors to a device.
    ///
    /// # Errors
    /// If Candle fails, for example because they do not fit in the device's memory.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let moved = |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.to_device(device)?));
        Ok(Self { tensors: self.tensors.iter().map(moved).collect::<Result<_>>()? })
    }

    /// Adds a tensor, converted to `f32`.
    ///
    /// # Errors
    /// If the tensor's type cannot be converted.
    pub fn insert(&mut self, name: String, tensor: &Tensor) -> Result<()> {
        self.tensors.insert(name, tensor.to_dtype(DType::F32)?);
        Ok(())
    }

    /// All tensors, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }
}
