//! An optional patch discriminator (PatchGAN, Isola et al., CVPR 2017; reference:
//! `tokenizer/modules/discriminator/model.py`). It has group normalization instead of the batch normalization of the
//! reference, because batches are small and running statistics would have to be stored.

use candle_core::{DType, Device, Tensor};
use eqim::Result;
use eqim::ops::kernels;
use eqim::weights::Weights;
use rand::Rng;

use crate::initial::normal;

const KERNEL: usize = 4;
const GROUPS: usize = 32;
const EPS: f64 = 1e-5;
// Slope of the leaky ReLU below 0.
const SLOPE: f64 = 0.2;
// Standard deviation of the initial weights.
const DEVIATION: f32 = 0.02;

/// Output channels of each convolution, as a multiple of those of the first, and its stride. The last has one channel.
const LAYERS: [(usize, usize); 5] = [(1, 2), (2, 2), (4, 2), (8, 1), (0, 1)];

/// Output channels and stride of each convolution, for `channels` channels of the first.
fn layers(channels: usize) -> impl Iterator<Item = (usize, usize)> {
    LAYERS.into_iter().map(move |(factor, stride)| ((factor * channels).max(1), stride))
}

/// Initial weights, by name, with `channels` channels in the first layer.
///
/// # Errors
/// If a Candle operation fails.
pub fn initial(channels: usize, random: &mut impl Rng) -> Result<Vec<(String, Tensor)>> {
    let (mut weights, mut input) = (vec![], 3);
    for (layer, (output, _)) in layers(channels).enumerate() {
        let shape = (output, input, KERNEL, KERNEL);
        let values = normal(random, output * input * KERNEL * KERNEL).into_iter().map(|value| value * DEVIATION);
        let weight = Tensor::from_iter(values, &Device::Cpu)?.reshape(shape)?;
        weights.push((format!("{layer}.conv.weight"), weight));
        weights.push((format!("{layer}.conv.bias"), Tensor::zeros(output, DType::F32, &Device::Cpu)?));
        if normalized(layer) {
            weights.push((format!("{layer}.norm.weight"), Tensor::ones(output, DType::F32, &Device::Cpu)?));
            weights.push((format!("{layer}.norm.bias"), Tensor::zeros(output, DType::F32, &Device::Cpu)?));
        }
        input = output;
    }
    Ok(weights)
}

/// Whether a layer has normalization: all except the first and the last.
fn normalized(layer: usize) -> bool {
    (1..LAYERS.len() - 1).contains(&layer)
}

/// Logits `[batch, 1, rows, columns]` of overlapping patches of images `[batch, 3, height, width]`; they are large for
/// real images.
///
/// # Errors
/// If an image is smaller than a patch.
pub fn logits(weights: &Weights, image: &Tensor) -> Result<Tensor> {
    let (mut x, mut input) = (image.clone(), 3);
    let channels = weights.find("0.conv.bias")?.elem_count();
    for (layer, (output, stride)) in layers(channels).enumerate() {
        let weight = weights.get(&format!("{layer}.conv.weight"), &[output, input, KERNEL, KERNEL])?;
        let bias = weights.get(&format!("{layer}.conv.bias"), &[output])?;
        let padded = x.pad_with_zeros(2, 1, 1)?.pad_with_zeros(3, 1, 1)?;
        x = kernels::conv2d(&padded, &weight, &bias, stride)?;
        if normalized(layer) {
            let weight = weights.get(&format!("{layer}.norm.weight"), &[output])?.reshape((1, output, 1, 1))?;
            let bias = weights.get(&format!("{layer}.norm.bias"), &[output])?.reshape((1, output, 1, 1))?;
            x = group_norm(&x)?.broadcast_mul(&weight)?.broadcast_add(&bias)?;
        }
        if layer + 1 < LAYERS.len() {
            x = ((x.relu()? * (1.0 - SLOPE))? + (x * SLOPE)?)?;
        }
        input = output;
    }
    Ok(x)
}

fn group_norm(x: &Tensor) -> Result<Tensor> {
    let grouped = x.reshape((x.dim(0)?, GROUPS.min(x.dim(1)?), ()))?;
    let centered = grouped.broadcast_sub(&grouped.mean_keepdim(2)?)?;
    let deviation = (centered.sqr()?.mean_keepdim(2)? + EPS)?.sqrt()?;
    Ok(centered.broadcast_div(&deviation)?.reshape(x.shape())?)
}

/// Hinge loss of the discriminator (Lim & Ye 2017; reference: `hinge_d_loss`) for the logits of real images and of
/// reconstructions (`made`).
///
/// # Errors
/// If a Candle operation fails.
pub fn hinge(real: &Tensor, made: &Tensor) -> Result<Tensor> {
    let real = real.affine(-1.0, 1.0)?.relu()?.mean_all()?;
    let made = made.affine(1.0, 1.0)?.relu()?.mean_all()?;
    Ok(((real + made)? * 0.5)?)
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::adamw::Update;
    use crate::learner::{Learner, Losses};
    use crate::random::{Purpose, randomness};
    use crate::ranks::Ranks;

    #[test]
    fn it_learns_to_tell_images_apart() {
        let random = &mut randomness(1, Purpose::Initial, 0);
        let mut learner =
            Learner::new("discriminator", initial(64, random).unwrap(), &Device::Cpu, Rc::new(Ranks::alone()), false)
                .unwrap();
        let real = Tensor::from_vec(normal(random, 3 * 32 * 32), (1, 3, 32, 32), &Device::Cpu).unwrap();
        let made = Tensor::full(0.3f32, (1, 3, 32, 32), &Device::Cpu).unwrap();
        let mut found = vec![];
        for _ in 0..6 {
            let weights = learner.weights().unwrap();
            let loss = |_: &()| {
                let total = hinge(&logits(&weights, &real)?, &logits(&weights, &made)?)?;
                Ok(Losses { total: total.clone(), parts: vec![("loss", total)] })
            };
            let (gradients, measures) = learner.differentiate(&[(1.0, ())], 1, loss).unwrap();
            let update = Update {
                learning_rate: 1e-3,
                betas: [0.5, 0.9],
                weight_decay: 0.0,
                decays: &|_, _| false,
                clip: None,
                average: 0.0,
            };
            learner.update(&gradients, &update).unwrap();
            found.push(measures["loss"]);
        }
        assert!(found[0] > 0.3 && found[5] < 0.1, "{found:?}");
        assert_eq!(logits(&learner.weights().unwrap(), &real).unwrap().dims(), [1, 1, 2, 2]);
    }
}
