//! The decorator around an interpreter.

use eqim::Result;
use eqim::ops::{Binary, Dim, Ops, Turn, Unary};

/// Runs primitives on `O` and shows `probe`, under the name of the scope, every value that enters a matrix product, a
/// convolution or a norm, and every result of a product or convolution: what reduced precision has to hold.
#[derive(Debug)]
pub struct Observe<O, F> {
    inner: O,
    probe: F,
    scope: Vec<String>,
}

impl<O: Ops, F: FnMut(&str, &O::Tensor) -> Result<()>> Observe<O, F> {
    /// A decorated interpreter outside any scope.
    pub fn new(inner: O, probe: F) -> Self {
        Self { inner, probe, scope: vec![] }
    }

    fn show(&mut self, value: &O::Tensor) -> Result<()> {
        (self.probe)(&self.scope.join("."), value)
    }

    fn shown(&mut self, value: O::Tensor) -> Result<O::Tensor> {
        self.show(&value)?;
        Ok(value)
    }
}

impl<O: Ops, F: FnMut(&str, &O::Tensor) -> Result<()>> Ops for Observe<O, F> {
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
        self.show(a)?;
        self.show(b)?;
        let y = self.inner.matmul(a, b)?;
        self.shown(y)
    }

    fn gemm(&mut self, x: &O::Tensor, weight: &O::Tensor, bias: &O::Tensor) -> Result<O::Tensor> {
        self.show(x)?;
        let y = self.inner.gemm(x, weight, bias)?;
        self.shown(y)
    }

    fn layer_norm(
        &mut self,
        x: &O::Tensor,
        affine: Option<(&O::Tensor, &O::Tensor)>,
        width: usize,
        eps: f32,
    ) -> Result<O::Tensor> {
        self.show(x)?;
        self.inner.layer_norm(x, affine, width, eps)
    }

    fn group_norm(
        &mut self,
        x: &O::Tensor,
        affine: (&O::Tensor, &O::Tensor),
        groups: usize,
        eps: f32,
    ) -> Result<O::Tensor> {
        self.show(x)?;
        self.inner.group_norm(x, affine, groups, eps)
    }

    fn conv(&mut self, x: &O::Tensor, weight: &O::Tensor, bias: &O::Tensor, spatial: usize) -> Result<O::Tensor> {
        self.show(x)?;
        let y = self.inner.conv(x, weight, bias, spatial)?;
        self.shown(y)
    }

    fn pad_reflect(&mut self, x: &O::Tensor, spatial: usize) -> Result<O::Tensor> {
        self.inner.pad_reflect(x, spatial)
    }

    fn open_loop(&mut self, sequences: &[&O::Tensor], state: &O::Tensor) -> Result<O::Loop> {
        self.inner.open_loop(sequences, state)
    }

    fn turn(&mut self, open: &mut O::Loop) -> Result<Option<Turn<O::Tensor>>> {
        self.inner.turn(open)
    }

    fn carry(&mut self, open: &mut O::Loop, state: O::Tensor) -> Result<()> {
        self.inner.carry(open, state)
    }

    fn close_loop(&mut self, open: O::Loop) -> Result<O::Tensor> {
        self.inner.close_loop(open)
    }
}
