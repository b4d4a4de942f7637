//! Random initial weights.

use candle_core::{Device, Tensor};
use eqim::Result;
use eqim::checkpoint::adapter;
use rand::Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::random::{Purpose, randomness};

/// Initial values of a tensor.
enum Start {
    Constant(f32),
    /// Normal distribution with mean 0 and this standard deviation.
    Normal(f32),
    /// Uniform distribution between minus and plus this value.
    Uniform(f32),
    /// For weights `[output, input, 3]`: at the center tap the identity, or `min(output, input)` orthonormal vectors
    /// that are the same for a shape and its transpose; 0 at the other taps.
    Orthogonal,
}

// Standard deviation of the initial embeddings.
const EMBEDDING: f32 = 0.02;

/// Initial weights of the generator (reference: `initialize_weights` in `equ_modeling.py` and `diffloss.py`). Linear
/// layers have the Xavier uniform initialization, which keeps the variance. The modulations and the last layer of the
/// flow head start at 0.
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

/// Initial weights of the tokenizer. The reference keeps PyTorch's default initialization, with which a network of this
/// depth needs many steps until it passes an image through. A short training works better if at first only the residual
/// shortcuts pass the signal. Therefore the layers keep the variance, and the last layer of every residual branch
/// starts at 0 (Goyal et al. 2017). The 1-D convolutions along the row of tokens are orthogonal at the center tap (Xiao
/// et al. 2018), and the matrix of the decoder is the transpose of the matrix of the encoder.
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

/// Random initial weights of the generator for these names and shapes.
///
/// # Errors
/// If a Candle operation fails.
pub fn generator_weights(parameters: &[(String, Vec<usize>)], seed: u64) -> Result<Vec<(String, Tensor)>> {
    draw(parameters, seed, generator)
}

/// First matrices of adapters of rank `rank` for weights of these names and shapes `[output, input]`: `A` is random and `B`
/// is 0, so the adapters change nothing (as in `peft`).
///
/// # Errors
/// If a Candle operation fails.
pub fn adapters(weights: &[(String, Vec<usize>)], rank: usize, seed: u64) -> Result<Vec<(String, Tensor)>> {
    let matrices = |(name, shape): &(String, Vec<usize>)| {
        let [a, b] = adapter::names(name);
        [(a, vec![rank, shape[1]]), (b, vec![shape[0], rank])]
    };
    let parameters: Vec<_> = weights.iter().flat_map(matrices).collect();
    draw(&parameters, seed, |name, shape| match name.ends_with("lora_B.weight") {
        true => Start::Constant(0.0),
        false => Start::Uniform((shape[1] as f32).sqrt().recip()),
    })
}

/// Random initial weights of the tokenizer for these names and shapes.
///
/// # Errors
/// If a Candle operation fails.
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
        // Gram-Schmidt; the second pass removes the rounding errors of the first.
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

/// Draws `count` numbers from the standard normal distribution.
pub fn normal(random: &mut impl Rng, count: usize) -> Vec<f32> {
    StandardNormal.sample_iter(random).take(count).collect()
}
