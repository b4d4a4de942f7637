//! An interpreter that wraps another one and passes its activations to a callback.

use eqim::Result;
use eqim::ops::{Binary, Conv, Dim, Dropped, Iteration, Ops, OpsExt, Unary};

/// Role of a value in its scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Input of a product or convolution with the scope's weight.
    Input,
    /// Output of a product or convolution with the scope's weight.
    Output,
    /// Input of a norm, or operand or result of a product of two activations.
    Other,
}

/// Runs primitives on `O` and calls `probe` with the scope's name and the values that a reduced precision must
/// represent: every input of a matrix product, convolution or norm, and every result of a matrix product or
/// convolution.
#[derive(Debug)]
pub struct Observe<O, F> {
    inner: O,
    probe: F,
    scope: Vec<String>,
}

impl<O: Ops, F: FnMut(&str, Seen, &O::Tensor) -> Result<()>> Observe<O, F> {
    /// Wraps an interpreter that is outside any scope.
    pub fn new(inner: O, probe: F) -> Self {
        Self { inner, probe, scope: vec![] }
    }

    fn show(&mut self, seen: Seen, value: &O::Tensor) -> Result<()> {
        (self.probe)(&self.scope.join("."), seen, value)
    }

    fn shown(&mut self, seen: Seen, value: O::Tensor) -> Result<O::Tensor> {
        self.show(seen, &value)?;
        Ok(value)
    }
}

impl<O: Ops, F: FnMut(&str, Seen, &O::Tensor) -> Result<()>> Ops for Observe<O, F> {
    type Tensor = O::Tensor;
    type Loop = O::Loop;

    fn enter(&mut self, name: &str) {
        self.scope.push(name.to_string());
        self.inner.enter(name);
    }

    fn leave(&mut self) {
        self.scope.pop();
        self.inner.leave();
    }

    fn param(&mut self, name: &str, shape: &[usize]) -> Result<O::Tensor> {
        self.inner.param(name, shape)
    }

    fn constant(&mut self, shape: &[usize], data: &[f32]) -> Result<O::Tensor> {
        self.inner.constant(shape, data)
    }

    fn reshape(&mut self, x: &O::Tensor, shape: &[Dim<O::Tensor>]) -> Result<O::Tensor> {
        self.inner.reshape(x, shape)
    }

    fn expand(&mut self, x: &O::Tensor, shape: &[Dim<O::Tensor>]) -> Result<O::Tensor> {
        self.inner.expand(x, shape)
    }

    fn permute(&mut self, x: &O::Tensor, axes: &[usize]) -> Result<O::Tensor> {
        self.inner.permute(x, axes)
    }

    fn slice(&mut self, x: &O::Tensor, axis: usize, start: i64, end: i64) -> Result<O::Tensor> {
        self.inner.slice(x, axis, start, end)
    }

    fn concat(&mut self, xs: &[&O::Tensor], axis: usize) -> Result<O::Tensor> {
        self.inner.concat(xs, axis)
    }

    fn gather(&mut self, table: &O::Tensor, indices: &O::Tensor) -> Result<O::Tensor> {
        self.inner.gather(table, indices)
    }

    fn unary(&mut self, op: Unary, x: &O::Tensor) -> Result<O::Tensor> {
        self.inner.unary(op, x)
    }

    fn binary(&mut self, op: Binary, a: &O::Tensor, b: &O::Tensor) -> Result<O::Tensor> {
        self.inner.binary(op, a, b)
    }

    fn clamp(&mut self, x: &O::Tensor, low: f32, high: f32) -> Result<O::Tensor> {
        self.inner.clamp(x, low, high)
    }

    fn mean(&mut self, x: &O::Tensor, axes: &[usize]) -> Result<O::Tensor> {
        self.inner.mean(x, axes)
    }

    fn softmax(&mut self, x: &O::Tensor) -> Result<O::Tensor> {
        self.inner.softmax(x)
    }

    fn matmul(&mut self, a: &O::Tensor, b: &O::Tensor) -> Result<O::Tensor> {
        self.show(Seen::Other, a)?;
        self.show(Seen::Other, b)?;
        let y = self.inner.matmul(a, b)?;
        self.shown(Seen::Other, y)
    }

    fn gemm(&mut self, x: &O::Tensor, input: usize, output: usize) -> Result<O::Tensor> {
        self.show(Seen::Input, x)?;
        let y = self.inner.gemm(x, input, output)?;
        self.shown(Seen::Output, y)
    }

    fn layer_normalization(
        &mut self,
        x: &O::Tensor,
        affine: Option<(&O::Tensor, &O::Tensor)>,
        width: usize,
        eps: f32,
    ) -> Result<O::Tensor> {
        self.show(Seen::Other, x)?;
        self.inner.layer_normalization(x, affine, width, eps)
    }

    fn group_normalization(
        &mut self,
        x: &O::Tensor,
        affine: (&O::Tensor, &O::Tensor),
        groups: usize,
        eps: f32,
    ) -> Result<O::Tensor> {
        self.show(Seen::Other, x)?;
        self.inner.group_normalization(x, affine, groups, eps)
    }

    fn conv(&mut self, x: &O::Tensor, conv: Conv) -> Result<O::Tensor> {
        let x = self.inner.reflected(x, conv)?;
        self.show(Seen::Input, &x)?;
        let y = self.inner.conv(&x, conv.after_reflection())?;
        self.shown(Seen::Output, y)
    }

    fn pad_reflect(&mut self, x: &O::Tensor, spatial: usize) -> Result<O::Tensor> {
        self.inner.pad_reflect(x, spatial)
    }

    fn modulate(&mut self, x: &O::Tensor, shift: &O::Tensor, scale: &O::Tensor) -> Result<O::Tensor> {
        self.inner.modulate(x, shift, scale)
    }

    fn gated_residual(&mut self, x: &O::Tensor, gate: &O::Tensor, y: &O::Tensor) -> Result<O::Tensor> {
        self.inner.gated_residual(x, gate, y)
    }

    fn pixel_shuffle(
        &mut self,
        x: &O::Tensor,
        channels: usize,
        rows: usize,
        factors: (usize, usize),
    ) -> Result<O::Tensor> {
        self.inner.pixel_shuffle(x, channels, rows, factors)
    }

    fn dropout(&mut self, x: O::Tensor, what: Dropped) -> Result<O::Tensor> {
        self.inner.dropout(x, what)
    }

    fn begin_function(&mut self, name: &str, inputs: &[&O::Tensor]) -> Result<Vec<O::Tensor>> {
        self.inner.begin_function(name, inputs)
    }

    fn end_function(&mut self, outputs: Vec<O::Tensor>) -> Result<Vec<O::Tensor>> {
        self.inner.end_function(outputs)
    }

    fn begin_loop(&mut self, sequences: &[&O::Tensor], state: &O::Tensor) -> Result<O::Loop> {
        self.inner.begin_loop(sequences, state)
    }

    fn next_iteration(&mut self, open: &mut O::Loop) -> Result<Option<Iteration<O::Tensor>>> {
        self.inner.next_iteration(open)
    }

    fn end_iteration(&mut self, open: &mut O::Loop, state: O::Tensor) -> Result<()> {
        self.inner.end_iteration(open, state)
    }

    fn end_loop(&mut self, open: O::Loop) -> Result<O::Tensor> {
        self.inner.end_loop(open)
    }
}
