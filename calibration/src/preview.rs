//! Simulation of INT8 on Candle, without a graph or a GPU. It computes the same values as a quantized bundle.

use std::collections::BTreeMap;

use candle_core::Tensor;
use eqim::engine::candle::{Runner, StageEngine};
use eqim::model::Stage;
use eqim::ops::eager::Eager;
use eqim::weights::Weights;
use eqim::{Config, Error, Result};

use crate::int8::{self, CPU_WEIGHT_LEVELS, WEIGHT_LEVELS};
use crate::policy::{Policy, Scheme};
use crate::quantize::{QuantizationPlan, Quantize, plan};

/// A model whose weights are rounded for each stage as its policy specifies.
#[derive(Debug)]
pub struct Preview<'a> {
    policy: &'a Policy,
    stages: BTreeMap<Stage, Weights>,
}

impl<'a> Preview<'a> {
    /// Creates an engine that simulates the model in INT8.
    ///
    /// # Errors
    /// Errors of [`plan`]; [`Error::run`] if FP16 cannot represent the scale of a weight.
    pub fn engine(config: &Config, weights: &Weights, policy: &'a Policy) -> Result<StageEngine<Self>> {
        let rounded = |(stage, plan): (Stage, QuantizationPlan)| Ok((stage, round(weights, &plan)?));
        let stages = plan(config, policy)?.into_iter().map(rounded).collect::<Result<_>>()?;
        Ok(StageEngine::new(config.clone(), Self { policy, stages }))
    }
}

/// Rounds the weights to the values that the integers of one stage represent.
fn round(weights: &Weights, plan: &QuantizationPlan) -> Result<Weights> {
    let mut all = weights.clone();
    for (scope, scheme) in plan.schemes.iter().filter(|(_, scheme)| **scheme != Scheme::Float) {
        let [weight, bias] = ["weight", "bias"].map(|part| format!("{scope}.{part}"));
        let tensor = weights.find(&weight)?;
        let rounded = int8::round_weight(tensor, levels(*scheme))?;
        all.insert(weight, &rounded.tensor(tensor.dims())?)?;
        if let Scheme::Integer { input, .. } = scheme {
            let values = weights.find(&bias)?.to_vec1::<f32>()?;
            let rounded: Vec<f32> = values
                .iter()
                .zip(&rounded.scales)
                .map(|(&value, &scale)| int8::round_bias(value, input.scale, scale) as f32 * input.scale * scale)
                .collect();
            all.insert(bias, &Tensor::from_vec(rounded, values.len(), &candle_core::Device::Cpu)?)?;
        }
    }
    Ok(all)
}

/// Number of positive levels of the weights in a scheme.
pub fn levels(scheme: Scheme) -> f32 {
    match scheme {
        Scheme::Dynamic | Scheme::Integer { .. } => CPU_WEIGHT_LEVELS,
        Scheme::Float | Scheme::WeightOnly | Scheme::Static { .. } => WEIGHT_LEVELS,
    }
}

impl Runner for Preview<'_> {
    fn name(&self) -> &str {
        "Candle, INT8 preview"
    }

    fn run(&self, config: &Config, stage: Stage, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let weights = self.stages.get(&stage).ok_or_else(|| Error::run(stage.name(), "has no weights"))?;
        stage.run(&mut Quantize::new(Eager::new(weights), self.policy, stage), config, inputs)
    }
}
