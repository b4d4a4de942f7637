//! The convolutional tokenizer, which converts between images and rows of column tokens
//! (reference: `tokenizer/models/tokenizer.py`, `tokenizer/modules/diffusionmodules/model.py`).

use crate::Result;
use crate::config::{TokenizerConfig, Tower};
use crate::ops::{Dim, Ops, OpsExt, Unary};

const EPS: f32 = 1e-6;

/// Name of the encoder's module.
pub const ENCODER: &str = "encoder";
/// Name of the decoder's module.
pub const DECODER: &str = "decoder";
/// Name of the encoder's levels.
pub const DOWN: &str = "down";
/// Name of the decoder's levels.
pub const UP: &str = "up";
/// Name of the first convolution of an encoder or decoder.
pub const CONV_IN: &str = "conv_in";
/// Name of the last convolution of an encoder or decoder.
pub const CONV_OUT: &str = "conv_out";
/// Name of the convolution in the shortcut of a residual block, which changes the number of channels.
pub const SHORTCUT: &str = "nin_shortcut";
/// Name of the convolution that computes the latents at the end of the encoder.
pub const QUANT_LAYER: &str = "quant_layer";
/// Name of the convolution that projects the latents at the beginning of the decoder.
pub const POST_QUANT_LAYER: &str = "post_quant_layer";

/// Norm, swish and convolution, as in residual blocks and in the last layer of an encoder or decoder.
fn norm_conv<O: Ops>(
    o: &mut O,
    config: &TokenizerConfig,
    (norm, conv): (&str, &str),
    x: &O::Tensor,
    (input, output): (usize, usize),
) -> Result<O::Tensor> {
    let h = o.group_norm(norm, x, input, config.groups, EPS)?;
    let h = o.unary(Unary::Silu, &h)?;
    o.conv2d(conv, &h, input, output)
}

fn res_block<O: Ops>(
    o: &mut O,
    config: &TokenizerConfig,
    name: &str,
    x: &O::Tensor,
    (input, output): (usize, usize),
) -> Result<O::Tensor> {
    o.scope(name, |o| {
        let h = norm_conv(o, config, ("norm1", "conv1"), x, (input, output))?;
        let h = norm_conv(o, config, ("norm2", "conv2"), &h, (output, output))?;
        if input == output {
            return o.add(x, &h);
        }
        let x = o.conv1x1(SHORTCUT, x, input, output)?;
        o.add(&x, &h)
    })
}

/// Attention among all pixels of `x [B, C, rows, width]`.
fn attention_block<O: Ops>(
    o: &mut O,
    config: &TokenizerConfig,
    name: &str,
    x: &O::Tensor,
    channels: usize,
    rows: usize,
) -> Result<O::Tensor> {
    o.scope(name, |o| {
        let h = o.group_norm("norm", x, channels, config.groups, EPS)?;
        let mut qkv = vec![];
        for part in ["q", "k", "v"] {
            let part = o.conv1x1(part, &h, channels, channels)?;
            let part = o.reshape(&part, &[Dim::Of(&part, 0), Dim::Is(1), Dim::Is(channels), Dim::Rest])?;
            qkv.push(o.permute(&part, &[0, 1, 3, 2])?);
        }
        let h = o.attention(&qkv[0], &qkv[1], &qkv[2], None, channels)?;
        let h = o.permute(&h, &[0, 1, 3, 2])?;
        let h = o.reshape(&h, &[Dim::Of(&h, 0), Dim::Is(channels), Dim::Is(rows), Dim::Rest])?;
        let h = o.conv1x1("proj_out", &h, channels, channels)?;
        o.add(x, &h)
    })
}

/// Downsampling of `x [B, C, rows, width]` by `(fy, fx)`: a convolution to fewer channels and pixel-unshuffle, plus a
/// shortcut. In the reference, the shortcut is the mean over groups of channels of the unshuffled input, which is the
/// mean over each `fy × fx` patch.
fn downsample<O: Ops>(
    o: &mut O,
    x: &O::Tensor,
    channels: usize,
    rows: usize,
    (fy, fx): (usize, usize),
) -> Result<O::Tensor> {
    let patches = |o: &mut O, x: &O::Tensor, channels: usize| {
        let shape = [Dim::Is(channels), Dim::Is(rows / fy), Dim::Is(fy), Dim::Rest, Dim::Is(fx)];
        o.reshape(x, &[Dim::Of(x, 0), shape[0], shape[1], shape[2], shape[3], shape[4]])
    };
    o.scope("downsample", |o| {
        let h = o.conv2d("conv.conv", x, channels, channels / (fy * fx))?;
        let h = patches(o, &h, channels / (fy * fx))?;
        let h = o.permute(&h, &[0, 1, 3, 5, 2, 4])?;
        let h = o.reshape(&h, &[Dim::Of(&h, 0), Dim::Is(channels), Dim::Is(rows / fy), Dim::Rest])?;
        let shortcut = patches(o, x, channels)?;
        let shortcut = o.mean(&shortcut, &[3, 5])?;
        o.add(&h, &shortcut)
    })
}

/// Upsampling of `x [B, C, rows, width]` by `(fy, fx)`: a convolution to more channels and pixel-shuffle, plus a
/// shortcut. The shortcut repeats every channel for the pixels of its patch, which is a broadcast before the shuffle.
fn upsample<O: Ops>(
    o: &mut O,
    x: &O::Tensor,
    channels: usize,
    rows: usize,
    (fy, fx): (usize, usize),
) -> Result<O::Tensor> {
    o.scope("upsample", |o| {
        let h = o.conv2d("conv.conv", x, channels, channels * fy * fx)?;
        let h = o.reshape(&h, &[Dim::Of(&h, 0), Dim::Is(channels), Dim::Is(fy * fx), Dim::Is(rows), Dim::Rest])?;
        let shortcut = o.reshape(x, &[Dim::Of(x, 0), Dim::Is(channels), Dim::Is(1), Dim::Is(rows), Dim::Rest])?;
        let h = o.add(&h, &shortcut)?;
        let h = o.reshape(&h, &[Dim::Of(&h, 0), Dim::Is(channels * fy * fx), Dim::Is(rows), Dim::Rest])?;
        o.pixel_shuffle(&h, channels, rows, (fy, fx))
    })
}

/// The residual and attention blocks of one level.
fn level<O: Ops>(
    o: &mut O,
    config: &TokenizerConfig,
    tower: &Tower,
    level: usize,
    mut h: O::Tensor,
    mut channels: usize,
    rows: usize,
) -> Result<O::Tensor> {
    let output = tower.levels[level].channels;
    for block in 0..tower.res_blocks {
        h = res_block(o, config, &format!("block.{block}"), &h, (channels, output))?;
        channels = output;
        if tower.levels[level].attention {
            h = attention_block(o, config, &format!("attn.{block}"), &h, channels, rows)?;
        }
    }
    Ok(h)
}

fn middle<O: Ops>(
    o: &mut O,
    config: &TokenizerConfig,
    h: &O::Tensor,
    channels: usize,
    rows: usize,
) -> Result<O::Tensor> {
    o.scope("mid", |o| {
        let h = res_block(o, config, "block_1", h, (channels, channels))?;
        let h = attention_block(o, config, "attn_1", &h, channels, rows)?;
        res_block(o, config, "block_2", &h, (channels, channels))
    })
}

/// Encodes `image [B, 3, height, tokens·width]` with values in -1..1 to the mean of the posterior, `[B, tokens, E]`.
/// There must be at least two tokens.
///
/// # Errors
/// Errors of the interpreter.
pub fn encode<O: Ops>(o: &mut O, config: &TokenizerConfig, image: &O::Tensor) -> Result<O::Tensor> {
    let columns = encode_columns(o, config, image)?;
    let width = config.encoder.z_channels * config.rows;
    let latent = o.conv1d(QUANT_LAYER, &columns, width, config.embed)?;
    o.permute(&latent, &[0, 2, 1])
}

/// The encoder without the last projection. It encodes an image to columns `[B, Z·R, tokens]`, transposed with respect
/// to the reference.
///
/// # Errors
/// Errors of the interpreter.
pub fn encode_columns<O: Ops>(o: &mut O, config: &TokenizerConfig, image: &O::Tensor) -> Result<O::Tensor> {
    o.scope(ENCODER, |o| encoder(o, config, image))
}

fn encoder<O: Ops>(o: &mut O, config: &TokenizerConfig, image: &O::Tensor) -> Result<O::Tensor> {
    let tower = &config.encoder;
    let mut rows = config.image_height();
    let mut channels = tower.conv_in;
    let mut h = o.conv2d(CONV_IN, image, config.image_channels, channels)?;
    for i in 0..tower.levels.len() {
        h = o.scope(&format!("{DOWN}.{i}"), |o| level(o, config, tower, i, h, channels, rows))?;
        channels = tower.levels[i].channels;
        if i + 1 < tower.levels.len() {
            let factors = config.downsampling(i);
            h = o.scope(&format!("{DOWN}.{i}"), |o| downsample(o, &h, channels, rows, factors))?;
            rows /= factors.0;
        }
    }
    let h = middle(o, config, &h, channels, rows)?;
    let h = norm_conv(o, config, ("norm_out", CONV_OUT), &h, (channels, tower.z_channels))?;
    let width = tower.z_channels * rows;
    let columns = o.reshape(&h, &[Dim::Of(&h, 0), Dim::Is(width), Dim::Rest])?;
    o.conv1d("encoder1d", &columns, width, width)
}

/// Decodes latents `[B, tokens, E]`, which are generated tokens divided by `vae_norm`, to
/// `image [B, 3, height, tokens·width]` with values of about -1..1. There must be at least two tokens.
///
/// # Errors
/// Errors of the interpreter.
pub fn decode<O: Ops>(o: &mut O, config: &TokenizerConfig, latents: &O::Tensor) -> Result<O::Tensor> {
    Ok(decode_with_features(o, config, latents)?.0)
}

/// Decodes like [`decode`]. Also returns the features of the coarsest level before they are upsampled,
/// `[B, C, rows, tokens]`, which are the input of the semantic decoder in training.
///
/// # Errors
/// Errors of the interpreter.
pub fn decode_with_features<O: Ops>(
    o: &mut O,
    config: &TokenizerConfig,
    latents: &O::Tensor,
) -> Result<(O::Tensor, O::Tensor)> {
    let width = config.decoder.z_channels * config.rows;
    let columns = o.permute(latents, &[0, 2, 1])?;
    let columns = o.conv1d(POST_QUANT_LAYER, &columns, config.embed, width)?;
    o.scope(DECODER, |o| decoder(o, config, &columns))
}

fn decoder<O: Ops>(o: &mut O, config: &TokenizerConfig, columns: &O::Tensor) -> Result<(O::Tensor, O::Tensor)> {
    let tower = &config.decoder;
    let mut rows = config.rows;
    let width = tower.z_channels * rows;
    let mut channels = tower.conv_in;
    let h = o.conv1d("decoder1d", columns, width, width)?;
    let h = o.reshape(&h, &[Dim::Of(&h, 0), Dim::Is(tower.z_channels), Dim::Is(rows), Dim::Rest])?;
    let h = o.conv2d(CONV_IN, &h, tower.z_channels, channels)?;
    let mut h = middle(o, config, &h, channels, rows)?;
    let mut features = h.clone();
    for i in (0..tower.levels.len()).rev() {
        h = o.scope(&format!("{UP}.{i}"), |o| level(o, config, tower, i, h, channels, rows))?;
        channels = tower.levels[i].channels;
        if i + 1 == tower.levels.len() {
            features = h.clone();
        }
        if i > 0 {
            let factors = config.downsampling(i - 1);
            h = o.scope(&format!("{UP}.{i}"), |o| upsample(o, &h, channels, rows, factors))?;
            rows *= factors.0;
        }
    }
    let image = norm_conv(o, config, ("norm_out", CONV_OUT), &h, (channels, config.image_channels))?;
    Ok((image, features))
}

/// Sizes of the semantic decoder, which only training uses (reference: `EquivariantTokenizerSemanticDecoder1D`).
#[derive(Clone, Copy, Debug)]
pub struct Semantics {
    /// Number of levels.
    pub levels: usize,
    /// Number of channels of every level.
    pub channels: usize,
    /// Number of residual blocks per level.
    pub res_blocks: usize,
    /// Number of channels of the predicted features, `F`.
    pub features: usize,
}

/// Predicts semantic features `[B, F, rows, tokens]` of the image from the features of [`decode_with_features`].
///
/// # Errors
/// Errors of the interpreter.
pub fn semantics<O: Ops>(
    o: &mut O,
    config: &TokenizerConfig,
    semantics: Semantics,
    features: &O::Tensor,
) -> Result<O::Tensor> {
    let Semantics { levels, channels, res_blocks, features: predicted } = semantics;
    let mut input = config.decoder.levels.last().map_or(config.decoder.conv_in, |level| level.channels);
    o.scope("semantic_decoder", |o| {
        let mut h = features.clone();
        for level in 0..levels {
            for block in 0..res_blocks {
                h = res_block(o, config, &format!("down.{level}.block.{block}"), &h, (input, channels))?;
                input = channels;
            }
        }
        norm_conv(o, config, ("norm_out", CONV_OUT), &h, (channels, predicted))
    })
}
