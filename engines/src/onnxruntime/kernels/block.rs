//! The kernel of one transformer block for one token: [`TRANSFORMER_BLOCK`](eqim::ops::function::TRANSFORMER_BLOCK).

use std::ops::Range;

use eqim::model::transformer::{BLOCK_EPS, CROSS_EPS};

use super::linear::{Activations, Buffers, Linear};
use super::rows::{self, Norm};
use super::team::{Shared, Worker};

/// Inputs of a block, for B tokens, H heads and heads of width hd.
pub struct Block<'a> {
    /// The weights.
    pub weights: &'a BlockWeights<'a>,
    /// Number of heads.
    pub heads: usize,
    /// Keys and values of the tokens before, `[B, H, window, hd]`.
    pub past: [&'a [f32]; 2],
    /// Keys and values of the class, `[B, H, buffer, hd]`.
    pub cross: [&'a [f32]; 2],
    /// Cosines and sines of the positions, `[B, hd/2]`.
    pub rope: [&'a [f32]; 2],
    /// Added to the scores, `[B, window+1]`.
    pub bias: &'a [f32],
}

/// Weights of a block.
pub struct BlockWeights<'a> {
    /// Norm before self-attention.
    pub norm: Norm<'a>,
    /// Queries, keys and values of self-attention.
    pub qkv: Linear<'a>,
    /// Projection of self-attention.
    pub proj: Linear<'a>,
    /// Norm before cross-attention.
    pub cross_norm: Norm<'a>,
    /// Queries of cross-attention.
    pub cross_q: Linear<'a>,
    /// Projection of cross-attention.
    pub cross_proj: Linear<'a>,
    /// Norm before the MLP.
    pub mlp_norm: Norm<'a>,
    /// First layer of the MLP.
    pub fc1: Linear<'a>,
    /// Second layer of the MLP.
    pub fc2: Linear<'a>,
}

/// Buffers of a call.
#[derive(Debug, Default)]
pub struct BlockBuffers {
    projected: Vec<f32>,
    attended: Vec<f32>,
    activations: Buffers,
}

impl BlockBuffers {
    /// Shares the buffers among the workers of a team, for `rows` tokens.
    pub fn share(&mut self, rows: usize, dim: usize, mlp_dim: usize) -> SharedBuffers<'_> {
        let widest = mlp_dim.max(3 * dim);
        SharedBuffers {
            projected: Shared::fit(&mut self.projected, rows * widest),
            attended: Shared::fit(&mut self.attended, rows * dim),
            activations: self.activations.share(rows, mlp_dim.max(dim), widest),
        }
    }
}

/// Buffers of a team.
pub struct SharedBuffers<'a> {
    projected: Shared<'a, f32>,
    attended: Shared<'a, f32>,
    activations: Activations<'a>,
}

/// Outputs of a block.
pub struct Outputs<'a> {
    /// The tokens `[B, D]`: first those of the input.
    pub x: Shared<'a, f32>,
    /// Keys and values for the next token, `[B, H, window, hd]`.
    pub present: [Shared<'a, f32>; 2],
}

impl Block<'_> {
    /// Runs the block as one worker of a team.
    pub fn run(&self, worker: &mut Worker, outputs: &Outputs, buffers: &SharedBuffers) {
        // In every phase of this function, an element is either only read, or used by one part.
        let SharedBuffers { projected, attended, activations } = buffers;
        let (x, dim) = (&outputs.x, self.weights.proj.outputs);
        let normed = |row: usize, norm: Norm, eps: f32, y: &mut [f32]| {
            // SAFETY: see above.
            rows::layer_norm(unsafe { x.row(row, dim) }, norm, eps, y);
        };
        let keep = |row: usize, width: usize, column: usize, y: &[f32]| {
            // SAFETY: see above.
            unsafe { projected.columns_mut(row, width, column, y.len()) }.copy_from_slice(y);
        };
        let add = |row: usize, column: usize, y: &mut [f32]| {
            // SAFETY: see above.
            rows::add(unsafe { x.columns_mut(row, dim, column, y.len()) }, y);
        };
        let attention = |row: usize, y: &mut [f32]| {
            // SAFETY: see above.
            y.copy_from_slice(unsafe { attended.row(row, dim) });
        };

        let input = |row: usize, y: &mut [f32]| normed(row, self.weights.norm, BLOCK_EPS, y);
        self.weights.qkv.apply(worker, activations, input, |row, column, y| keep(row, 3 * dim, column, y));
        worker.phase(activations.rows * self.heads, |part| self.attend_to_tokens(part, outputs, buffers));
        self.weights.proj.apply(worker, activations, attention, add);

        let input = |row: usize, y: &mut [f32]| normed(row, self.weights.cross_norm, CROSS_EPS, y);
        self.weights.cross_q.apply(worker, activations, input, |row, column, y| keep(row, dim, column, y));
        worker.phase(activations.rows * self.heads, |part| self.attend_to_class(part, buffers));
        self.weights.cross_proj.apply(worker, activations, attention, add);

        let input = |row: usize, y: &mut [f32]| normed(row, self.weights.mlp_norm, BLOCK_EPS, y);
        let hidden = self.weights.fc1.outputs;
        self.weights.fc1.apply(worker, activations, input, |row, column, y| {
            rows::gelu(y);
            keep(row, hidden, column, y);
        });
        let input = |row: usize, y: &mut [f32]| {
            // SAFETY: see above.
            y.copy_from_slice(unsafe { projected.row(row, hidden) });
        };
        self.weights.fc2.apply(worker, activations, input, add);
    }

    fn head_dim(&self) -> usize {
        self.weights.proj.outputs / self.heads
    }

    /// Self-attention of one head of one token. Writes the keys and values for the next token. `part` is the index in
    /// `[B, H]`.
    fn attend_to_tokens(&self, part: usize, outputs: &Outputs, buffers: &SharedBuffers) {
        let (dim, width) = (self.weights.proj.outputs, self.head_dim());
        let (row, head) = (part / self.heads, part % self.heads);
        let length = self.past[0].len() / (buffers.activations.rows * self.heads);
        let at = |third: usize| row * 3 * dim + third * dim + head * width;
        // SAFETY: the projections are complete, and every part uses only its own head.
        let [q, k, v] = [0, 1, 2].map(|third| unsafe { buffers.projected.get_mut(at(third)..at(third) + width) });
        self.rotate(row, q);
        self.rotate(row, k);
        let [past_k, past_v] = self.past.map(|cache| &cache[part * length..(part + 1) * length]);
        // SAFETY: every part writes only its own head.
        let [present_k, present_v] =
            outputs.present.each_ref().map(|cache| unsafe { cache.get_mut(part * length..(part + 1) * length) });
        for (present, past, new) in [(&mut *present_k, past_k, k), (&mut *present_v, past_v, v)] {
            present[..length - width].copy_from_slice(&past[width..]);
            present[length - width..].copy_from_slice(new);
        }
        let slots = length / width + 1;
        let bias = &self.bias[row * slots..(row + 1) * slots];
        let keys = past_k.chunks(width).take(1).chain(present_k.chunks(width));
        let values = past_v.chunks(width).take(1).chain(present_v.chunks(width));
        // SAFETY: every part writes only its own head.
        rows::attend(q, keys, values, bias, unsafe { buffers.attended.get_mut(self.head(row, head)) });
    }

    /// Cross-attention of one head of one token. `part` is the index in `[B, H]`.
    fn attend_to_class(&self, part: usize, buffers: &SharedBuffers) {
        let width = self.head_dim();
        let (row, head) = (part / self.heads, part % self.heads);
        let length = self.cross[0].len() / (buffers.activations.rows * self.heads);
        // SAFETY: the projections are complete, and every part uses only its own head.
        let q = unsafe { buffers.projected.get_mut(self.head(row, head)) };
        self.rotate(row, q);
        let [keys, values] = self.cross.map(|cache| cache[part * length..(part + 1) * length].chunks(width));
        // SAFETY: every part writes only its own head.
        rows::attend(q, keys, values, &[], unsafe { buffers.attended.get_mut(self.head(row, head)) });
    }

    /// Range of one head of one token in a buffer `[B, D]`.
    fn head(&self, row: usize, head: usize) -> Range<usize> {
        let width = self.head_dim();
        let start = row * self.weights.proj.outputs + head * width;
        start..start + width
    }

    /// Rotary position embedding of a head, in place.
    fn rotate(&self, row: usize, head: &mut [f32]) {
        let half = head.len() / 2;
        let [cos, sin] = self.rope.map(|table| &table[row * half..(row + 1) * half]);
        for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
            let [a, b] = *pair;
            *pair = [a * cos - b * sin, b * cos + a * sin];
        }
    }
}
