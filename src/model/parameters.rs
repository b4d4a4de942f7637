//! Lists the weights of the model, checks loaded weights, and computes the cost of a stage.

use candle_core::{Device, Tensor};
use rand_mt::Mt;

use super::stage::{Sizes, Stage};
use super::{flow, tokenizer, transformer};
use crate::ops::cost::{Cost, Shape};
use crate::weights::Weights;
use crate::{Config, Error, Result};

/// Names and shapes of all weights of a model, in the order of first use. A checkpoint must contain all of them.
///
/// # Errors
/// If the configuration is not consistent.
pub fn parameters(config: &Config) -> Result<Vec<(String, Vec<usize>)>> {
    parameters_of(config, &Stage::ALL)
}

/// Names and shapes of the weights of some stages, in the order of first use.
///
/// # Errors
/// If the configuration is not consistent.
pub fn parameters_of(config: &Config, stages: &[Stage]) -> Result<Vec<(String, Vec<usize>)>> {
    let mut cost = Cost::default();
    for &stage in stages {
        stage.run(&mut cost, config, &stage.input_shapes(config, 1, 2, 1))?;
    }
    Ok(cost.into_parameters())
}

impl Stage {
    /// Cost of the stage for a batch of `batch` rows without guidance, `tokens` columns and `steps` evaluations of the
    /// velocity.
    ///
    /// # Errors
    /// If the configuration is not consistent.
    pub fn cost(self, config: &Config, batch: usize, tokens: usize, steps: usize) -> Result<Cost> {
        let mut cost = Cost::default();
        self.run(&mut cost, config, &self.input_shapes(config, batch, tokens, steps))?;
        Ok(cost)
    }

    /// Shapes of the stage's inputs for these sizes.
    pub fn input_shapes(self, config: &Config, batch: usize, tokens: usize, steps: usize) -> Vec<Shape> {
        let (width, _) = config.image_size(tokens);
        let sizes = Sizes { batch, rows: batch, evaluations: steps, tokens, width };
        self.inputs(config).iter().map(|input| input.shape(&sizes)).collect()
    }
}

/// Checks that all values of the tensor `name` are finite.
///
/// # Errors
/// [`Error::input`] naming the tensor.
pub fn check_finite(name: &str, tensor: &Tensor) -> Result<()> {
    let largest = tensor.abs()?.max_all()?.to_scalar::<f32>()?;
    // A maximum can miss a NaN; a sum cannot.
    if !largest.is_finite() || tensor.sum_all()?.to_scalar::<f32>()?.is_nan() {
        return Err(Error::input(format!("tensor {name}"), "has a value that is not finite"));
    }
    Ok(())
}

impl Weights {
    /// Random weights from `seed`, for benchmarks without a download. They are scaled so that activations stay near 1.
    ///
    /// # Errors
    /// If the configuration is not consistent.
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

/// Names of modules whose products stay in full precision when a model is quantized. A module is in this list for one
/// of two reasons: values enter or leave the model or one of its parts there, or the module is in a shortcut around a
/// block, so that its input has not passed a norm. These modules hold few weights, and no later layer corrects their
/// error. The times of the flow are embedded once per token, and every evaluation depends on them.
pub const FULL_PRECISION_MODULES: [&str; 10] = [
    transformer::Z_PROJ,
    flow::INPUT_PROJ,
    flow::COND_EMBED,
    flow::TIME_EMBED,
    flow::OUTPUT,
    tokenizer::CONV_IN,
    tokenizer::CONV_OUT,
    tokenizer::SHORTCUT,
    tokenizer::QUANT_LAYER,
    tokenizer::POST_QUANT_LAYER,
];

/// Whether the module of a scope, or a module that contains it, is one of the [`FULL_PRECISION_MODULES`].
pub fn keeps_full_precision(scope: &str) -> bool {
    let scope = format!(".{scope}.");
    FULL_PRECISION_MODULES.iter().any(|module| scope.contains(&format!(".{module}.")))
}

/// The part of the model under which a scope is reported: `encoder_blocks` for `encoder_blocks.3.attn.qkv`,
/// `decoder.up.2` for `decoder.up.2.block.0`.
pub fn report_group(scope: &str) -> String {
    let parts: Vec<&str> = scope.split('.').collect();
    let length = match parts[..] {
        [tokenizer::ENCODER | tokenizer::DECODER, tokenizer::DOWN | tokenizer::UP, ..] => 3,
        [flow::FLOW_HEAD, ..] => 3,
        [tokenizer::ENCODER | tokenizer::DECODER, ..] => 2,
        _ => 1,
    };
    parts[..length.min(parts.len())].join(".")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::Preset;

    fn scopes() -> Vec<String> {
        let names = parameters(&Preset::Large.config()).unwrap();
        names.iter().filter_map(|(name, _)| name.strip_suffix(".weight").map(String::from)).collect()
    }

    #[test]
    fn modules_in_full_precision_exist() {
        for module in FULL_PRECISION_MODULES {
            let holds = |scope: &String| format!(".{scope}.").contains(&format!(".{module}."));
            assert!(scopes().iter().any(holds), "no scope of the model is in {module}");
        }
    }

    #[test]
    fn scopes_are_grouped_by_parts() {
        assert_eq!(report_group("encoder_blocks.3.attn.qkv"), "encoder_blocks");
        assert_eq!(report_group("decoder.up.2.block.0.conv1"), "decoder.up.2");
        assert_eq!(report_group("diffloss.net.res_blocks.1.mlp.0"), "diffloss.net.res_blocks");
        let groups: BTreeSet<String> = scopes().iter().map(|scope| report_group(scope)).collect();
        assert!(groups.contains("encoder.down.4") && groups.contains("decoder.mid") && groups.len() < 40, "{groups:?}");
    }
}
