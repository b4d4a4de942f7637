//! The engine that runs the model on Candle: no native library, and the yardstick of the others.

use candle_core::{Device, Tensor};
use ndarray::{Array, Array2, Array3, Array4, ArrayView, ArrayView2, ArrayView3, ArrayView4, Dimension};

use crate::engine::{Engine, Session};
use crate::model::transformer::KeyValue;
use crate::model::{flow, tokenizer, transformer};
use crate::ops::eager::Eager;
use crate::weights::Weights;
use crate::{Config, Error, Result};

/// A model on Candle's CPU backend.
#[derive(Debug)]
pub struct CandleEngine {
    config: Config,
    weights: Weights,
}

impl CandleEngine {
    /// An engine of weights that have been [checked](Weights::check) against `config`.
    pub fn new(config: Config, weights: Weights) -> Self {
        Self { config, weights }
    }

    /// The model's weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    fn ops(&self) -> Eager<'_> {
        Eager::new(&self.weights)
    }
}

/// An array as a Candle tensor.
///
/// # Errors
/// When Candle refuses its shape.
pub fn to_tensor<D: Dimension>(array: ArrayView<f32, D>) -> Result<Tensor> {
    let values: Vec<f32> = array.iter().copied().collect();
    Ok(Tensor::from_vec(values, array.shape(), &Device::Cpu)?)
}

/// A Candle tensor as an array of as many axes.
///
/// # Errors
/// When it has another number of axes or is not of `f32`.
pub fn to_array<D: Dimension>(tensor: &Tensor) -> Result<Array<f32, D>> {
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    let array = Array::from_shape_vec(tensor.dims().to_vec(), values).and_then(Array::into_dimensionality);
    array.map_err(|error| Error::run("tensor", error))
}

/// Integers `[rows]` as a Candle tensor.
fn integers(values: &[i64]) -> Result<Tensor> {
    Ok(Tensor::from_slice(values, values.len(), &Device::Cpu)?)
}

impl Engine for CandleEngine {
    fn config(&self) -> &Config {
        &self.config
    }

    fn name(&self) -> &str {
        "Candle"
    }

    fn start(&self, labels: &[i64]) -> Result<(Box<dyn Session + '_>, Array2<f32>)> {
        let generator = &self.config.generator;
        let prefill = transformer::prefill(&mut self.ops(), generator, &integers(labels)?)?;
        let shape = (labels.len(), generator.heads, generator.window, generator.head_dim());
        let empty = Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu)?;
        let past = vec![KeyValue { key: empty.clone(), value: empty }; generator.depth];
        let session = CandleSession { engine: self, past, cross: prefill.cross };
        Ok((Box::new(session), to_array(&prefill.z)?))
    }

    fn sample(
        &self,
        z: ArrayView2<f32>,
        noise: ArrayView2<f32>,
        guidance: &[f32],
        timesteps: &[f32],
    ) -> Result<Array2<f32>> {
        let guidance = Tensor::from_slice(guidance, guidance.len(), &Device::Cpu)?;
        let timesteps = Tensor::from_slice(timesteps, timesteps.len(), &Device::Cpu)?;
        let (z, noise) = (to_tensor(z)?, to_tensor(noise)?);
        to_array(&flow::sample(&mut self.ops(), &self.config.generator, &z, &noise, &guidance, &timesteps)?)
    }

    fn decode(&self, latents: ArrayView3<f32>) -> Result<Array4<f32>> {
        to_array(&tokenizer::decode(&mut self.ops(), &self.config.tokenizer, &to_tensor(latents)?)?)
    }

    fn encode(&self, images: ArrayView4<f32>) -> Result<Array3<f32>> {
        to_array(&tokenizer::encode(&mut self.ops(), &self.config.tokenizer, &to_tensor(images)?)?)
    }
}

struct CandleSession<'a> {
    engine: &'a CandleEngine,
    past: Vec<KeyValue<Tensor>>,
    cross: Vec<KeyValue<Tensor>>,
}

impl Session for CandleSession<'_> {
    fn step(&mut self, tokens: ArrayView2<f32>, positions: &[i64]) -> Result<Array2<f32>> {
        let generator = &self.engine.config.generator;
        let (token, position) = (to_tensor(tokens)?, integers(positions)?);
        let ops = &mut self.engine.ops();
        let step = transformer::step(ops, generator, &token, &position, &self.past, &self.cross)?;
        self.past = step.present;
        to_array(&step.z)
    }
}
