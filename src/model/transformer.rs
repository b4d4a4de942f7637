//! The windowed causal transformer. For every column, it predicts the condition of the flow head
//! (reference: `generator/equ_modeling.py`).
//!
//! Condition tokens `c` depend only on the class, so [`prefill`] computes them once, together with the cross-attention
//! keys and values of every block. Image tokens `x` then pass through [`step`] one at a time.

use crate::config::GeneratorConfig;
use crate::ops::{Dim, Dropped, Ops, OpsExt, Unary, function};
use crate::{Error, Result};

/// Name of the module that projects the tokens at the input.
pub const Z_PROJ: &str = "z_proj";

/// Constant that the norms of a block add to the variance.
pub const BLOCK_EPS: f32 = 1e-6;
/// Constant that the norms of cross-attention add to the variance.
pub const CROSS_EPS: f32 = 1e-5;
const ROPE_BASE: f32 = 10000.0;

// Added to the scores of slots that hold no token. It is so low that exp() gives 0, and it is within the range of FP16.
const MASKED: f32 = -10000.0;

/// Keys and values of one attention, each `[B, H, length, hd]`.
#[derive(Clone, Debug)]
pub struct KeyValue<T> {
    /// Keys.
    pub key: T,
    /// Values.
    pub value: T,
}

impl<T: Clone> KeyValue<T> {
    /// Keys and values from a list in which they alternate.
    pub fn pairs(caches: &[T]) -> Vec<Self> {
        caches.as_chunks().0.iter().map(|[key, value]| Self { key: key.clone(), value: value.clone() }).collect()
    }
}

/// Cosines and sines of rotary position embedding, which broadcast against `[B, N, H, hd/2, 1]`.
#[derive(Clone, Debug)]
pub struct Rope<T> {
    cos: T,
    sin: T,
}

/// Embeds the class as `buffer` condition tokens `[B·buffer, D]`, for `labels [B]` of integers (`class_num`:
/// unconditional).
///
/// # Errors
/// Errors of the interpreter.
pub fn embed_condition<O: Ops>(o: &mut O, config: &GeneratorConfig, labels: &O::Tensor) -> Result<O::Tensor> {
    let &GeneratorConfig { dim, buffer, class_num, .. } = config;
    let classes = o.param("class_emb.weight", &[class_num, dim])?;
    let unconditional = o.param("fake_latent", &[1, dim])?;
    let table = o.concat(&[&classes, &unconditional], 0)?;
    let class = o.gather(&table, labels)?;
    let class = o.reshape(&class, &[Dim::Rest, Dim::Is(1), Dim::Is(dim)])?;
    let positions = o.param("encoder_pos_embed_learned", &[1, buffer, dim])?;
    let c = o.add(&class, &positions)?;
    let c = o.reshape(&c, &[Dim::Rest, Dim::Is(dim)])?;
    o.layer_norm("z_proj_ln", &c, dim, BLOCK_EPS)
}

/// Projects image tokens `[rows, E]` to the transformer's width, `[rows, D]`.
///
/// # Errors
/// Errors of the interpreter.
pub fn embed_tokens<O: Ops>(o: &mut O, config: &GeneratorConfig, tokens: &O::Tensor) -> Result<O::Tensor> {
    let x = o.linear(Z_PROJ, tokens, config.embed, config.dim)?;
    o.layer_norm("z_proj_ln", &x, config.dim, BLOCK_EPS)
}

/// Rotary embedding for `positions`, a vector of floating-point numbers, with interleaved pairs and base 10000. The
/// vector becomes the axes `[B, N]` of `layout`, one of which is 1.
///
/// # Errors
/// Errors of the interpreter.
pub fn rope<O: Ops>(
    o: &mut O,
    config: &GeneratorConfig,
    positions: &O::Tensor,
    layout: [Dim<O::Tensor>; 2],
) -> Result<Rope<O::Tensor>> {
    let head_dim = config.head_dim();
    let half = head_dim / 2;
    let frequencies: Vec<f32> = (0..half).map(|k| 1.0 / ROPE_BASE.powf((2 * k) as f32 / head_dim as f32)).collect();
    let frequencies = o.constant(&[1, half], &frequencies)?;
    let positions = o.reshape(positions, &[Dim::Rest, Dim::Is(1)])?;
    let angles = o.mul(&positions, &frequencies)?;
    let shape = [layout[0], layout[1], Dim::Is(1), Dim::Is(half), Dim::Is(1)];
    let angles = o.reshape(&angles, &shape)?;
    Ok(Rope { cos: o.unary(Unary::Cos, &angles)?, sin: o.unary(Unary::Sin, &angles)? })
}

/// Rotates every pair (2k, 2k+1) of `x [B, N, heads, hd]` by its angle.
fn rotate<O: Ops>(
    o: &mut O,
    config: &GeneratorConfig,
    x: &O::Tensor,
    n: usize,
    heads: usize,
    rope: &Rope<O::Tensor>,
) -> Result<O::Tensor> {
    let head_dim = config.head_dim();
    let pairs = [Dim::Rest, Dim::Is(n), Dim::Is(heads), Dim::Is(head_dim / 2), Dim::Is(2)];
    let pairs = o.reshape(x, &pairs)?;
    let a = o.slice(&pairs, 4, 0, 1)?;
    let b = o.slice(&pairs, 4, 1, 2)?;
    let (a_cos, b_sin) = (o.mul(&a, &rope.cos)?, o.mul(&b, &rope.sin)?);
    let (b_cos, a_sin) = (o.mul(&b, &rope.cos)?, o.mul(&a, &rope.sin)?);
    let turned_a = o.sub(&a_cos, &b_sin)?;
    let turned_b = o.add(&b_cos, &a_sin)?;
    let turned = o.concat(&[&turned_a, &turned_b], 4)?;
    o.reshape(&turned, &[Dim::Rest, Dim::Is(n), Dim::Is(heads), Dim::Is(head_dim)])
}

/// Splits `[B·length, D]` into heads, `[B, H, length, hd]`.
fn split_heads<O: Ops>(o: &mut O, config: &GeneratorConfig, x: &O::Tensor, length: usize) -> Result<O::Tensor> {
    let x = o.reshape(x, &[Dim::Rest, Dim::Is(length), Dim::Is(config.heads), Dim::Is(config.head_dim())])?;
    o.permute(&x, &[0, 2, 1, 3])
}

/// Merges heads `[B, H, n, hd]` to `[B·n, D]`.
fn merge_heads<O: Ops>(o: &mut O, config: &GeneratorConfig, x: &O::Tensor) -> Result<O::Tensor> {
    let x = o.permute(x, &[0, 2, 1, 3])?;
    o.reshape(&x, &[Dim::Rest, Dim::Is(config.dim)])
}

fn mlp<O: Ops>(o: &mut O, config: &GeneratorConfig, x: &O::Tensor) -> Result<O::Tensor> {
    let h = o.layer_norm("norm2", x, config.dim, BLOCK_EPS)?;
    let h = o.scope("mlp", |o| {
        let h = o.linear("fc1", &h, config.dim, config.mlp_dim)?;
        let h = o.unary(Unary::Gelu, &h)?;
        let h = o.dropout(h, Dropped::Projection)?;
        let h = o.linear("fc2", &h, config.mlp_dim, config.dim)?;
        o.dropout(h, Dropped::Projection)
    })?;
    o.add(x, &h)
}

/// The part of a block that processes the condition tokens `c [B·buffer, D]`. Returns the block's cross-attention keys
/// and values, and `c` for the next block. Must be called inside the block's scope.
///
/// # Errors
/// Errors of the interpreter.
pub fn condition_block<O: Ops>(
    o: &mut O,
    config: &GeneratorConfig,
    c: &O::Tensor,
) -> Result<(KeyValue<O::Tensor>, O::Tensor)> {
    let &GeneratorConfig { dim, buffer, .. } = config;
    let normed = o.layer_norm("cross_cond_norm", c, dim, CROSS_EPS)?;
    let cross = o.scope("attn2", |o| {
        let key = o.linear("k", &normed, dim, dim)?;
        let value = o.linear("v", &normed, dim, dim)?;
        Ok(KeyValue { key: split_heads(o, config, &key, buffer)?, value: split_heads(o, config, &value, buffer)? })
    })?;
    Ok((cross, mlp(o, config, c)?))
}

/// Self-attention of `n` tokens `x [B·n, D]` to themselves and to `past`, whose keys and values come first. Returns the
/// result and all keys and values, `past` included.
fn self_attention<O: Ops>(
    o: &mut O,
    config: &GeneratorConfig,
    x: &O::Tensor,
    n: usize,
    past: Option<&KeyValue<O::Tensor>>,
    rope: &Rope<O::Tensor>,
    bias: &O::Tensor,
) -> Result<(O::Tensor, KeyValue<O::Tensor>)> {
    let &GeneratorConfig { dim, heads, .. } = config;
    let qkv = o.linear("qkv", x, dim, 3 * dim)?;
    let qkv = o.reshape(&qkv, &[Dim::Rest, Dim::Is(n), Dim::Is(3 * heads), Dim::Is(config.head_dim())])?;
    let split = heads as i64;
    let qk = o.slice(&qkv, 2, 0, 2 * split)?;
    let v = o.slice(&qkv, 2, 2 * split, 3 * split)?;
    let qk = rotate(o, config, &qk, n, 2 * heads, rope)?;
    let qk = o.permute(&qk, &[0, 2, 1, 3])?;
    let q = o.slice(&qk, 1, 0, split)?;
    let mut key = o.slice(&qk, 1, split, 2 * split)?;
    let mut value = o.permute(&v, &[0, 2, 1, 3])?;
    if let Some(past) = past {
        key = o.concat(&[&past.key, &key], 2)?;
        value = o.concat(&[&past.value, &value], 2)?;
    }
    let h = o.attention(&q, &key, &value, Some(bias), config.head_dim())?;
    let h = merge_heads(o, config, &h)?;
    let h = o.linear("proj", &h, dim, dim)?;
    Ok((o.dropout(h, Dropped::Projection)?, KeyValue { key, value }))
}

/// The part of a block that processes `n` image tokens `x [B·n, D]`. Returns the tokens and all keys and values of
/// self-attention, `past` included. Must be called inside the block's scope.
///
/// # Errors
/// Errors of the interpreter.
#[allow(clippy::too_many_arguments)]
pub fn token_block<O: Ops>(
    o: &mut O,
    config: &GeneratorConfig,
    x: &O::Tensor,
    n: usize,
    cross: &KeyValue<O::Tensor>,
    past: Option<&KeyValue<O::Tensor>>,
    rope: &Rope<O::Tensor>,
    bias: &O::Tensor,
) -> Result<(O::Tensor, KeyValue<O::Tensor>)> {
    let &GeneratorConfig { dim, heads, .. } = config;
    let h = o.layer_norm("norm1", x, dim, BLOCK_EPS)?;
    let (h, present) = o.scope("attn", |o| self_attention(o, config, &h, n, past, rope, bias))?;
    let x = o.add(x, &h)?;

    let h = o.layer_norm("cross_norm", &x, dim, CROSS_EPS)?;
    let h = o.scope("attn2", |o| {
        let q = o.linear("qkv", &h, dim, dim)?;
        let q = o.reshape(&q, &[Dim::Rest, Dim::Is(n), Dim::Is(heads), Dim::Is(config.head_dim())])?;
        let q = rotate(o, config, &q, n, heads, rope)?;
        let q = o.permute(&q, &[0, 2, 1, 3])?;
        let h = o.attention(&q, &cross.key, &cross.value, None, config.head_dim())?;
        let h = merge_heads(o, config, &h)?;
        let h = o.linear("proj", &h, dim, dim)?;
        o.dropout(h, Dropped::Projection)
    })?;
    let x = o.add(&x, &h)?;
    Ok((mlp(o, config, &x)?, present))
}

/// Results that depend only on the class.
#[derive(Clone, Debug)]
pub struct Prefill<T> {
    /// Condition of the flow head for the first token, `[B, D]`.
    pub z: T,
    /// Keys and values of every block's cross-attention, `[B, H, buffer, hd]`.
    pub cross: Vec<KeyValue<T>>,
}

/// Runs the condition tokens of `labels [B]` (integers; `class_num`: unconditional) through all blocks.
///
/// # Errors
/// Errors of the interpreter.
pub fn prefill<O: Ops>(o: &mut O, config: &GeneratorConfig, labels: &O::Tensor) -> Result<Prefill<O::Tensor>> {
    let &GeneratorConfig { dim, buffer, .. } = config;
    let mut c = embed_condition(o, config, labels)?;
    let mut cross = Vec::with_capacity(config.depth);
    for i in 0..config.depth {
        let (key_value, next) = o.scope(&format!("encoder_blocks.{i}"), |o| condition_block(o, config, &c))?;
        cross.push(key_value);
        c = next;
    }
    let c = o.reshape(&c, &[Dim::Rest, Dim::Is(buffer), Dim::Is(dim)])?;
    let last = o.slice(&c, 1, buffer as i64 - 1, buffer as i64)?;
    let last = o.reshape(&last, &[Dim::Rest, Dim::Is(dim)])?;
    let z = o.layer_norm("encoder_norm", &last, dim, BLOCK_EPS)?;
    Ok(Prefill { z, cross })
}

/// Results of one token.
#[derive(Clone, Debug)]
pub struct Step<T> {
    /// Condition of the flow head for the next token, `[B, D]`.
    pub z: T,
    /// Keys and values of the last `window` tokens in every block, `[B, H, window, hd]`. Keys are stored after rotary
    /// embedding.
    pub present: Vec<KeyValue<T>>,
}

/// Runs one `token [B, E]` at its `position [B]` (integers from 0) through all blocks.
///
/// `past` holds the keys and values of the previous step. For a row at position p, only the last p slots are used.
///
/// # Errors
/// Errors of the interpreter.
pub fn step<O: Ops>(
    o: &mut O,
    config: &GeneratorConfig,
    token: &O::Tensor,
    position: &O::Tensor,
    past: &[KeyValue<O::Tensor>],
    cross: &[KeyValue<O::Tensor>],
) -> Result<Step<O::Tensor>> {
    let window = config.window;
    let position = o.unary(Unary::ToFloat, position)?;
    let rope = rope(o, config, &position, [Dim::Rest, Dim::Is(1)])?;
    let bias = validity(o, window, &position)?;
    let mut x = embed_tokens(o, config, token)?;
    let mut present = Vec::with_capacity(config.depth);
    for i in 0..config.depth {
        let inputs = [&x, &past[i].key, &past[i].value, &cross[i].key, &cross[i].value, &rope.cos, &rope.sin, &bias];
        let [next, key, value] = o.scope(&format!("encoder_blocks.{i}"), |o| {
            o.function(function::TRANSFORMER_BLOCK, &inputs, |o, inputs| step_block(o, config, inputs))
        })?;
        present.push(KeyValue { key, value });
        x = next;
    }
    let z = o.layer_norm("encoder_norm", &x, config.dim, BLOCK_EPS)?;
    Ok(Step { z, present })
}

/// A block of [`step`]. `inputs` are the tokens `[B, D]`, the keys and values of the previous step and of the class, the
/// cosines and sines `[B, 1, 1, hd/2, 1]`, and the bias `[B, 1, 1, window+1]`. Returns the tokens for the next block, and
/// the keys and values for the next step.
fn step_block<O: Ops>(o: &mut O, config: &GeneratorConfig, inputs: &[O::Tensor]) -> Result<[O::Tensor; 3]> {
    let [x, past @ .., cos, sin, bias] = inputs else {
        return Err(Error::run(function::TRANSFORMER_BLOCK, "expected 8 inputs"));
    };
    let caches: Vec<KeyValue<O::Tensor>> = KeyValue::pairs(past);
    let rope = Rope { cos: cos.clone(), sin: sin.clone() };
    let (x, all) = token_block(o, config, x, 1, &caches[1], Some(&caches[0]), &rope, bias)?;
    let length = config.window as i64 + 1;
    let key = o.slice(&all.key, 2, 1, length)?;
    let value = o.slice(&all.value, 2, 1, length)?;
    Ok([x, key, value])
}

/// Bias `[B, 1, 1, window+1]` over cache slots. For a row at position p, slot j holds the token at position
/// `p - window + j`. If this position is negative, the slot holds no token and is masked.
fn validity<O: Ops>(o: &mut O, window: usize, position: &O::Tensor) -> Result<O::Tensor> {
    let offsets: Vec<f32> = (0..=window).map(|slot| slot as f32 - window as f32).collect();
    let offsets = o.constant(&[1, 1, 1, window + 1], &offsets)?;
    let position = o.reshape(position, &[Dim::Rest, Dim::Is(1), Dim::Is(1), Dim::Is(1)])?;
    let held = o.add(&position, &offsets)?;
    let before_start = o.clamp(&held, -1.0, 0.0)?;
    o.scale(&before_start, -MASKED)
}

/// The model with teacher forcing, as the reference computes it in training: conditions `z [B·n, D]` of all `n` tokens
/// `[B·n, E]` at once. Positions start at `shift` (training draws it from `0..shift_num`; sampling uses 0).
///
/// # Errors
/// Errors of the interpreter.
pub fn teacher_forced<O: Ops>(
    o: &mut O,
    config: &GeneratorConfig,
    labels: &O::Tensor,
    tokens: &O::Tensor,
    n: usize,
    shift: usize,
) -> Result<O::Tensor> {
    let dim = config.dim;
    let Prefill { z, cross } = prefill(o, config, labels)?;
    if n == 1 {
        return Ok(z);
    }
    let (rope, bias) = teacher_forcing(o, config, n, shift)?;
    let mut x = embed_tokens(o, config, tokens)?;
    for (i, cross) in cross.iter().enumerate() {
        (x, _) =
            o.scope(&format!("encoder_blocks.{i}"), |o| token_block(o, config, &x, n, cross, None, &rope, &bias))?;
    }
    let x = o.layer_norm("encoder_norm", &x, dim, BLOCK_EPS)?;
    let x = o.reshape(&x, &[Dim::Rest, Dim::Is(n), Dim::Is(dim)])?;
    let x = o.slice(&x, 1, 0, n as i64 - 1)?;
    let z = o.reshape(&z, &[Dim::Rest, Dim::Is(1), Dim::Is(dim)])?;
    let z = o.concat(&[&z, &x], 1)?;
    o.reshape(&z, &[Dim::Rest, Dim::Is(dim)])
}

/// Rotary embedding and attention bias `[n, n]` of `n` tokens. Each token sees itself and the `window` tokens before
/// it.
///
/// # Errors
/// [`Error::input`] if `n` is 0; errors of the interpreter.
pub fn teacher_forcing<O: Ops>(
    o: &mut O,
    config: &GeneratorConfig,
    n: usize,
    shift: usize,
) -> Result<(Rope<O::Tensor>, O::Tensor)> {
    if n == 0 {
        return Err(Error::input("tokens", "is empty, expected at least 1"));
    }
    let positions: Vec<f32> = (shift..shift + n).map(|position| position as f32).collect();
    let positions = o.constant(&[n], &positions)?;
    let rope = rope(o, config, &positions, [Dim::Is(1), Dim::Rest])?;
    let seen = |i: usize, j: usize| j <= i && i <= j + config.window;
    let bias: Vec<f32> = (0..n * n).map(|ij| if seen(ij / n, ij % n) { 0.0 } else { MASKED }).collect();
    Ok((rope, o.constant(&[n, n], &bias)?))
}
