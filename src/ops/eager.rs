//! The interpreter that runs the model on Candle, differentiably: the yardstick of every other one.

use candle_core::{D, DType, Device, Tensor};

use super::{Binary, Dim, Ops, Turn, Unary, position, scoped};
use crate::weights::Weights;
use crate::{Error, Result};

/// Runs primitives on Candle tensors of `f32`, with the weights it was given.
#[derive(Debug)]
pub struct Eager<'a> {
    weights: &'a Weights,
    scope: Vec<String>,
}

impl<'a> Eager<'a> {
    /// An interpreter outside any scope.
    pub fn new(weights: &'a Weights) -> Self {
        Self { weights, scope: vec![] }
    }
}

/// A loop between two turns.
#[derive(Debug)]
pub struct Running {
    sequences: Vec<Tensor>,
    state: Tensor,
    turns: usize,
    done: usize,
}

fn sizes(x: &Tensor, shape: &[Dim<Tensor>]) -> Result<Vec<usize>> {
    let mut sizes = Vec::with_capacity(shape.len());
    let mut rest = None;
    for (axis, dim) in shape.iter().enumerate() {
        sizes.push(match dim {
            Dim::Is(size) => *size,
            Dim::Of(other, axis) => other.dim(*axis)?,
            Dim::Rest => {
                rest = Some(axis);
                1
            }
        });
    }
    if let Some(axis) = rest {
        let known: usize = sizes.iter().product();
        if known == 0 || !x.elem_count().is_multiple_of(known) {
            return Err(Error::run("reshape", format!("{:?} does not divide into {shape:?}", x.shape())));
        }
        sizes[axis] = x.elem_count() / known;
    }
    Ok(sizes)
}

impl Ops for Eager<'_> {
    type Tensor = Tensor;
    type Loop = Running;

    fn enter(&mut self, name: &str) {
        self.scope.push(name.to_string());
    }

    fn leave(&mut self) {
        self.scope.pop();
    }

    fn param(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.get(&scoped(&self.scope, name), shape)
    }

    fn constant(&mut self, shape: &[usize], data: &[f32]) -> Result<Tensor> {
        Ok(Tensor::from_slice(data, shape, &Device::Cpu)?)
    }

    fn reshape(&mut self, x: &Tensor, shape: &[Dim<Tensor>]) -> Result<Tensor> {
        Ok(x.reshape(sizes(x, shape)?)?)
    }

    fn expand(&mut self, x: &Tensor, shape: &[Dim<Tensor>]) -> Result<Tensor> {
        Ok(x.broadcast_as(sizes(x, shape)?)?)
    }

    fn permute(&mut self, x: &Tensor, axes: &[usize]) -> Result<Tensor> {
        Ok(x.permute(axes)?)
    }

    fn slice(&mut self, x: &Tensor, axis: usize, start: i64, end: i64) -> Result<Tensor> {
        let length = x.dim(axis)?;
        let start = position(start, length);
        Ok(x.narrow(axis, start, position(end, length).saturating_sub(start))?)
    }

    fn concat(&mut self, xs: &[&Tensor], axis: usize) -> Result<Tensor> {
        Ok(Tensor::cat(xs, axis)?)
    }

    fn gather(&mut self, table: &Tensor, indices: &Tensor) -> Result<Tensor> {
        Ok(table.index_select(indices, 0)?)
    }

    fn unary(&mut self, op: Unary, x: &Tensor) -> Result<Tensor> {
        Ok(match op {
            Unary::Cos => x.cos(),
            Unary::Sin => x.sin(),
            Unary::Silu => x.silu(),
            Unary::Gelu => x.gelu_erf(),
            Unary::ToFloat => x.to_dtype(DType::F32),
        }?)
    }

    fn binary(&mut self, op: Binary, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Ok(match op {
            Binary::Add => a.broadcast_add(b),
            Binary::Sub => a.broadcast_sub(b),
            Binary::Mul => a.broadcast_mul(b),
        }?)
    }

    fn clamp(&mut self, x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
        Ok(x.clamp(low, high)?)
    }

    fn mean(&mut self, x: &Tensor, axes: &[usize]) -> Result<Tensor> {
        Ok(x.mean(axes)?)
    }

    fn softmax(&mut self, x: &Tensor) -> Result<Tensor> {
        let exp = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
        Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?)
    }

    fn matmul(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Ok(a.contiguous()?.broadcast_matmul(&b.contiguous()?)?)
    }

    fn gemm(&mut self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        Ok(x.matmul(&weight.t()?)?.broadcast_add(bias)?)
    }

    fn layer_norm(
        &mut self,
        x: &Tensor,
        affine: Option<(&Tensor, &Tensor)>,
        _width: usize,
        eps: f32,
    ) -> Result<Tensor> {
        let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
        let x = x.broadcast_div(&(variance + eps as f64)?.sqrt()?)?;
        let Some((weight, bias)) = affine else { return Ok(x) };
        Ok(x.broadcast_mul(weight)?.broadcast_add(bias)?)
    }

    fn group_norm(
        &mut self,
        x: &Tensor,
        (weight, bias): (&Tensor, &Tensor),
        groups: usize,
        eps: f32,
    ) -> Result<Tensor> {
        let (batch, channels, _, _) = x.dims4()?;
        let grouped = x.reshape((batch, groups, ()))?;
        let width = grouped.dim(2)?;
        let normed = self.layer_norm(&grouped, None, width, eps)?.reshape(x.shape())?;
        let affine = (1, channels, 1, 1);
        Ok(normed.broadcast_mul(&weight.reshape(affine)?)?.broadcast_add(&bias.reshape(affine)?)?)
    }

    fn conv(&mut self, x: &Tensor, weight: &Tensor, bias: &Tensor, spatial: usize) -> Result<Tensor> {
        let x = x.contiguous()?;
        let mut channels = vec![1; 2 + spatial];
        channels[1] = bias.elem_count();
        let y = if spatial == 1 { x.conv1d(weight, 0, 1, 1, 1)? } else { x.conv2d(weight, 0, 1, 1, 1)? };
        Ok(y.broadcast_add(&bias.reshape(channels)?)?)
    }

    fn pad_reflect(&mut self, x: &Tensor, spatial: usize) -> Result<Tensor> {
        let mut x = x.clone();
        for axis in 2..2 + spatial {
            let length = x.dim(axis)?;
            if length < 2 {
                return Err(Error::run("reflect padding", format!("axis {axis} has {length} elements, needs 2")));
            }
            x = Tensor::cat(&[&x.narrow(axis, 1, 1)?, &x, &x.narrow(axis, length - 2, 1)?], axis)?;
        }
        Ok(x)
    }

    fn open_loop(&mut self, sequences: &[&Tensor], state: &Tensor) -> Result<Running> {
        let turns = sequences.first().map_or(Ok(0), |sequence| sequence.dim(0))?;
        let sequences = sequences.iter().map(|&sequence| sequence.clone()).collect();
        Ok(Running { sequences, state: state.clone(), turns, done: 0 })
    }

    fn turn(&mut self, open: &mut Running) -> Result<Option<Turn<Tensor>>> {
        if open.done == open.turns {
            return Ok(None);
        }
        let now = open.sequences.iter().map(|sequence| sequence.get(open.done)).collect::<Result<_, _>>()?;
        Ok(Some((now, open.state.clone())))
    }

    fn carry(&mut self, open: &mut Running, state: Tensor) -> Result<()> {
        open.state = state;
        open.done += 1;
        Ok(())
    }

    fn close_loop(&mut self, open: Running) -> Result<Tensor> {
        Ok(open.state)
    }
}
