//! The weights of a model by their checkpoint names.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use rand_mt::Mt;

use crate::model::{Stage, parameters, parameters_of};
use crate::{Config, Error, Result};

/// Tensors of `f32` by checkpoint name.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    /// The tensor `name`.
    ///
    /// # Errors
    /// When there is none of that name and shape.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.find(name)?;
        if tensor.dims() != shape {
            return Err(misshapen("weights", name, shape, tensor.dims()));
        }
        Ok(tensor.clone())
    }

    /// The tensor `name`, whatever its shape.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn find(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::input(format!("tensor {name}"), "is missing"))
    }

    /// The device that the tensors are on.
    pub fn device(&self) -> Device {
        self.tensors.first_key_value().map_or(Device::Cpu, |(_, tensor)| tensor.device().clone())
    }

    /// The tensors on a device.
    ///
    /// # Errors
    /// When they do not fit there.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let moved = |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.to_device(device)?));
        Ok(Self { tensors: self.tensors.iter().map(moved).collect::<Result<_>>()? })
    }

    /// Adds a tensor, as `f32`.
    ///
    /// # Errors
    /// When its type cannot be converted.
    pub fn insert(&mut self, name: String, tensor: &Tensor) -> Result<()> {
        self.tensors.insert(name, tensor.to_dtype(DType::F32)?);
        Ok(())
    }

    /// All tensors, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Checks that these are the weights of `config`, all of them and no others, and that they are finite; `source` is
    /// the file or files they came from.
    ///
    /// # Errors
    /// [`Error::Input`] naming the tensor that is missing, extra, misshapen or not finite.
    pub fn check(&self, config: &Config, source: &str) -> Result<()> {
        self.check_stages(config, &Stage::ALL, source)
    }

    /// Checks as [`Weights::check`] that these are the weights of some stages.
    ///
    /// # Errors
    /// [`Error::Input`] naming the tensor that is missing, extra, misshapen or not finite.
    pub fn check_stages(&self, config: &Config, stages: &[Stage], source: &str) -> Result<()> {
        let mut extra: BTreeSet<&str> = self.tensors.keys().map(String::as_str).collect();
        for (name, shape) in parameters_of(config, stages)? {
            let Some(tensor) = self.tensors.get(&name) else {
                return Err(Error::input(source, format!("tensor {name} {shape:?} is missing")));
            };
            if tensor.dims() != shape {
                return Err(misshapen(source, &name, &shape, tensor.dims()));
            }
            let sum = tensor.abs()?.max_all()?.to_scalar::<f32>()?;
            let finite = sum.is_finite() && !tensor.sum_all()?.to_scalar::<f32>()?.is_nan();
            if !finite {
                return Err(Error::input(source, format!("tensor {name} has a value that is not finite")));
            }
            extra.remove(name.as_str());
        }
        match extra.first() {
            Some(name) => Err(Error::input(
                source,
                format!("tensor {name} is not part of this model ({} such tensors)", extra.len()),
            )),
            None => Ok(()),
        }
    }

    /// Weights drawn from `seed`, scaled so that activations stay near 1: for benchmarks without a download.
    ///
    /// # Errors
    /// When the configuration is not consistent.
    pub fn random(config: &Config, seed: u32) -> Result<Self> {
        let mut random = Mt::new(seed);
        let mut weights = Self::default();
        for (name, shape) in parameters(config)? {
            let fan_in: usize = shape[1..].iter().product();
            let norm = shape.len() == 1 && name.ends_with("weight");
            let (center, spread) = match shape.len() {
                1 if norm => (1.0, 0.1),
                1 => (0.0, 0.02),
                _ => (0.0, (1.0 / fan_in as f32).sqrt()),
            };
            let unit = 2.0 / u32::MAX as f32;
            let mut draw = || center + spread * (random.next_u32() as f32 * unit - 1.0);
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| draw()).collect();
            weights.insert(name, &Tensor::from_vec(values, shape, &Device::Cpu)?)?;
        }
        Ok(weights)
    }
}

fn misshapen(source: &str, name: &str, expected: &[usize], found: &[usize]) -> Error {
    Error::input(source, format!("tensor {name} has shape {found:?}, expected {expected:?}"))
}
