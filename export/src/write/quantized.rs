//! The weights of a bundle in INT8.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::Tensor;
use eqim::bundle::{FileRecord, Precision, Quantization};
use eqim::checkpoint::tensors::Values;
use eqim::checkpoint::{self, StoredConfig};
use eqim::model::Stage;
use eqim::ops::function::{GROUP, LANES, block_order};
use eqim::weights::Weights;
use eqim::{Config, Result};
use eqim_calibration::int8::{Rounded, round_bias, round_weight};
use eqim_calibration::{Policy, QuantizationPlan, Scheme, levels};
use safetensors::Dtype;

use super::convert::convert;
use crate::lower::int8::{bias_name, scale_name, sum_name, weight_name};

/// Scopes in INT8 with their schemes. A scope that several stages use has the same weights in all of them.
fn schemes(plans: &BTreeMap<Stage, QuantizationPlan>) -> BTreeMap<&str, Scheme> {
    let all = plans.values().flat_map(|plan| &plan.schemes);
    all.filter(|(_, scheme)| **scheme != Scheme::Float).map(|(scope, scheme)| (scope.as_str(), *scheme)).collect()
}

/// The manifest's description of a policy.
pub fn describe(policy: &Policy, plans: &BTreeMap<Stage, QuantizationPlan>, calibration: FileRecord) -> Quantization {
    let quantized = |plan: &QuantizationPlan| plan.schemes.values().any(|scheme| *scheme != Scheme::Float);
    let stages = plans.iter().filter(|(_, plan)| quantized(plan)).map(|(stage, _)| stage.name().to_string());
    let scopes = schemes(plans).into_keys().map(str::to_string).collect();
    Quantization { target: policy.target, stages: stages.collect(), scopes, calibration }
}

/// Writes the weights that the plans require: floating-point weights in `precision`, and quantized weights as integers
/// with their scales.
///
/// # Errors
/// [`eqim::Error::input`] if a weight is beyond the range of the precision; [`eqim::Error::run`] if the file cannot be
/// written.
pub fn write_weights(
    path: &Path,
    config: &Config,
    weights: &Weights,
    plans: &BTreeMap<Stage, QuantizationPlan>,
    precision: Precision,
) -> Result<()> {
    let floats: BTreeSet<&String> = plans.values().flat_map(|plan| &plan.floats).collect();
    let mut stored: Vec<(String, Values)> = vec![];
    for name in floats {
        stored.push((name.clone(), Values::Tensor(convert(name, weights.find(name)?, precision)?)));
    }
    for (scope, scheme) in schemes(plans) {
        let [weight, bias] = ["weight", "bias"].map(|part| format!("{scope}.{part}"));
        let tensor = weights.find(&weight)?;
        let rounded = round_weight(tensor, levels(scheme))?;
        if let Scheme::Integer { input, .. } = scheme {
            let values = weights.find(&bias)?.to_vec1::<f32>()?;
            let biases = values.iter().zip(&rounded.scales).map(|(&bias, &scale)| round_bias(bias, input.scale, scale));
            let bytes = biases.flat_map(i32::to_le_bytes).collect();
            stored.push((bias_name(&bias), Values::Raw { dtype: Dtype::I32, shape: vec![values.len()], bytes }));
        }
        if scheme == Scheme::Dynamic {
            stored.push((sum_name(&weight), sums(&rounded)));
        }
        let scales = Tensor::from_slice(&rounded.scales, rounded.scales.len(), &candle_core::Device::Cpu)?;
        let name = scale_name(&weight);
        stored.push((name.clone(), Values::Tensor(convert(&name, &scales, precision)?)));
        stored.push((weight_name(&weight), integers(rounded, tensor.dims(), scheme)));
    }
    let config = StoredConfig { generator: Some(config.generator.clone()), tokenizer: Some(config.tokenizer.clone()) };
    let (names, values): (Vec<String>, Vec<Values>) = stored.into_iter().unzip();
    let stored: Vec<(&str, Values)> = names.iter().map(String::as_str).zip(values).collect();
    checkpoint::write_values(path, &config, &stored)
}

/// Levels of a weight in the layout that its operator requires: blocks for `DynamicLinear`, and the layout of the
/// checkpoint for all others.
fn integers(rounded: Rounded, shape: &[usize], scheme: Scheme) -> Values {
    let (shape, levels) = match scheme {
        Scheme::Dynamic => {
            let (outputs, inputs) = (shape[0], shape[1..].iter().product());
            let levels = block_order(outputs, inputs).map(|index| rounded.levels[index]).collect();
            (vec![outputs / LANES, inputs / GROUP, LANES, GROUP], levels)
        }
        _ => (shape.to_vec(), rounded.levels),
    };
    Values::Raw { dtype: Dtype::I8, shape, bytes: levels.into_iter().map(i8::cast_unsigned).collect() }
}

/// Sums of the levels of every output channel, `[1, out]`. (ONNX's checker reads integers with one axis as shapes, which
/// cannot be in another file.)
fn sums(rounded: &Rounded) -> Values {
    let channels = rounded.scales.len();
    let sum = |channel: &[i8]| channel.iter().map(|&level| i32::from(level)).sum::<i32>();
    let sums = rounded.levels.chunks(rounded.levels.len() / channels).map(sum);
    Values::Raw { dtype: Dtype::I32, shape: vec![1, channels], bytes: sums.flat_map(i32::to_le_bytes).collect() }
}
