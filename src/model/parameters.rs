//! Which weights the model asks for, whether some weights are those, and what a stage costs.

use std::collections::BTreeSet;

use candle_core::{Device, Tensor};
use rand_mt::Mt;

use super::stage::{Axis, BATCH, Stage};
use crate::ops::cost::{Cost, Shape};
use crate::weights::Weights;
use crate::{Config, Error, Result};

/// Names and shapes of all weights of a model, in the order of first use: what a checkpoint has to contain.
///
/// # Errors
/// When the configuration is not consistent.
pub fn parameters(config: &Config) -> Result<Vec<(String, Vec<usize>)>> {
    parameters_of(config, &Stage::ALL)
}

/// Names and shapes of the weights of some stages, in the order of first use.
///
/// # Errors
/// When the configuration is not consistent.
pub fn parameters_of(config: &Config, stages: &[Stage]) -> Result<Vec<(String, Vec<usize>)>> {
    let mut cost = Cost::default();
    for &stage in stages {
        stage.run(&mut cost, config, &stage.input_shapes(config, 1, 2, 1))?;
    }
    Ok(cost.into_parameters())
}

impl Stage {
    /// What the stage costs at a batch of `batch` rows without guidance, `tokens` columns and `steps` evaluations of the
    /// velocity.
    ///
    /// # Errors
    /// When the configuration is not consistent.
    pub fn cost(self, config: &Config, batch: usize, tokens: usize, steps: usize) -> Result<Cost> {
        let mut cost = Cost::default();
        self.run(&mut cost, config, &self.input_shapes(config, batch, tokens, steps))?;
        Ok(cost)
    }

    /// Shapes of the stage's inputs at these sizes.
    pub fn input_shapes(self, config: &Config, batch: usize, tokens: usize, steps: usize) -> Vec<Shape> {
        let (width, _) = config.image_size(tokens);
        let sizes = [(BATCH, batch), ("rows", batch), ("evaluations", steps), ("tokens", tokens), ("width", width)];
        let known = |name: &str| sizes.iter().find(|(known, _)| *known == name).map_or(1, |(_, size)| *size);
        let size = |axis: &Axis| axis.size(known);
        self.inputs(config).iter().map(|port| port.shape.iter().map(size).collect()).collect()
    }
}

impl Weights {
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
        let mut extra: BTreeSet<&str> = self.iter().map(|(name, _)| name).collect();
        for (name, shape) in parameters_of(config, stages)? {
            let Ok(tensor) = self.find(&name) else {
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
