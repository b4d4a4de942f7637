//! The reference's random weights to start from.

use candle_core::{Device, Tensor};
use eqim::Result;
use rand::Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::data::{Purpose, randomness};

/// How a tensor starts.
enum Start {
    Constant(f32),
    /// Normal, with this standard deviation.
    Normal(f32),
    /// Uniform between plus and minus this.
    Uniform(f32),
    /// Of `[output, input, 3]`, at the center tap: the identity, or `min(output, input)` orthonormal vectors, the same for
    /// a shape and its transpose.
    Orthogonal,
}

// Standard deviation of embeddings.
const EMBEDDING: f32 = 0.02;

/// Weights of the generator (reference: `initialize_weights` in `equ_modeling.py` and `diffloss.py`): Xavier's uniform
/// for products, so that layers keep the variance; nothing at first from the flow head's modulations and last layer.
fn generator(name: &str, shape: &[usize]) -> Start {
    let zero = ["adaLN_modulation.1.", "final_layer.linear."].iter().any(|part| name.contains(part));
    let embedding = ["class_emb.weight", "fake_latent", "encoder_pos_embed_learned"].contains(&name);
    match shape {
        _ if zero => Start::Constant(0.0),
        _ if embedding || name.contains("time_embed.mlp.") && shape.len() == 2 => Start::Normal(EMBEDDING),
        [output, input] => Start::Uniform((6.0 / (input + output) as f32).sqrt()),
        _ if name.ends_with("weight") => Start::Constant(1.0),
        _ => Start::Constant(0.0),
    }
}

/// Weights of the tokenizer. The reference leaves PyTorch's own, which take long to let an image through so many layers.
/// With few steps to learn in, the way through the shortcuts alone is the better start: layers that keep the variance,
/// nothing from the last layer of every residual branch (Goyal et al. 2017), and orthogonal maps at the center of the
/// row's convolutions (Xiao et al. 2018), the decoder's the transpose of the encoder's.
fn tokenizer(name: &str, shape: &[usize]) -> Start {
    let branch = [".conv2.", ".proj_out.", ".conv.conv."].iter().any(|part| name.contains(part));
    match shape {
        _ if branch => Start::Constant(0.0),
        [_] if name.contains("norm") && name.ends_with("weight") => Start::Constant(1.0),
        [_] => Start::Constant(0.0),
        [_, _, _] => Start::Orthogonal,
        _ => Start::Uniform((3.0 / shape[1..].iter().product::<usize>() as f32).sqrt()),
    }
}

/// Draws the generator's weights of these names and shapes.
///
/// # Errors
/// When Candle refuses.
pub fn generator_weights(parameters: &[(String, Vec<usize>)], seed: u64) -> Result<Vec<(String, Tensor)>> {
    draw(parameters, seed, generator)
}

/// Draws the tokenizer's weights of these names and shapes.
///
/// # Errors
/// When Candle refuses.
pub fn tokenizer_weights(parameters: &[(String, Vec<usize>)], seed: u64) -> Result<Vec<(String, Tensor)>> {
    draw(parameters, seed, tokenizer)
}

fn draw(
    parameters: &[(String, Vec<usize>)],
    seed: u64,
    start: impl Fn(&str, &[usize]) -> Start,
) -> Result<Vec<(String, Tensor)>> {
    let mut random = randomness(seed, Purpose::Initial, 0);
    let mut weights = Vec::with_capacity(parameters.len());
    for (name, shape) in parameters {
        let count = shape.iter().product();
        let values: Vec<f32> = match start(name, shape) {
            Start::Constant(value) => vec![value; count],
            Start::Normal(deviation) => normal(&mut random, count).into_iter().map(|x| x * deviation).collect(),
            Start::Orthogonal => orthogonal(shape, seed),
            Start::Uniform(limit) => (0..count).map(|_| random.random_range(-limit..=limit)).collect(),
        };
        weights.push((name.clone(), Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?));
    }
    Ok(weights)
}

fn orthogonal(shape: &[usize], seed: u64) -> Vec<f32> {
    let (output, input, taps) = (shape[0], shape[1], shape[2]);
    let mut random = randomness(seed, Purpose::Initial, 1);
    let length = output.max(input);
    let mut vectors: Vec<Vec<f32>> = vec![];
    while vectors.len() < output.min(input) {
        let mut vector = match output == input {
            true => (0..length).map(|place| if place == vectors.len() { 1.0 } else { 0.0 }).collect(),
            false => normal(&mut random, length),
        };
        // Gram-Schmidt, twice against what rounding leaves.
        for other in vectors.iter().chain(&vectors) {
            let along: f32 = vector.iter().zip(other).map(|(a, b)| a * b).sum();
            vector.iter_mut().zip(other).for_each(|(value, other)| *value -= along * other);
        }
        let norm = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
        vector.iter_mut().for_each(|value| *value /= norm);
        vectors.push(vector);
    }
    let mut values = vec![0.0; output * input * taps];
    for (place, values) in values.chunks_mut(taps).enumerate() {
        let (row, column) = (place / input, place % input);
        values[taps / 2] = if output <= input { vectors[row][column] } else { vectors[column][row] };
    }
    values
}

/// Draws from the normal distribution.
pub fn normal(random: &mut impl Rng, count: usize) -> Vec<f32> {
    StandardNormal.sample_iter(random).take(count).collect()
}
