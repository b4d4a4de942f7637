//! The interpreter that runs the model on Candle, with gradients. All other interpreters are compared with it.

use candle_core::{D, DType, Device, Tensor};
use rand_mt::Mt;

use super::{
    Binary, Conv, Dim, Dropped, Iteration, Ops, OpsExt, Padding, Unary, kernels, position, scoped, shuffle_by_transpose,
};
use crate::weights::Weights;
use crate::{Error, Result};

/// Runs primitives on Candle tensors of `f32`, with given weights.
#[derive(Debug)]
pub struct Eager<'a> {
    weights: &'a Weights,
    device: Device,
    scope: Vec<String>,
    training: Option<Training>,
}

/// Settings of the interpreter in training.
#[derive(Clone, Debug)]
pub struct Training {
    /// Dropout, if it is used.
    pub dropout: Option<Dropout>,
    /// Data type of products and convolutions with weights. Everything else is computed in `f32`.
    pub products: DType,
}

/// Probabilities of dropout and its random numbers.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// Probability that an attention weight is dropped.
    pub attention: f64,
    /// Probability that an element of a projection is dropped.
    pub projection: f64,
    /// Random number generator that selects the dropped elements.
    pub random: Mt,
}

impl<'a> Eager<'a> {
    /// Creates an interpreter outside any scope, on the device of the weights.
    pub fn new(weights: &'a Weights) -> Self {
        Self { weights, device: weights.device(), scope: vec![], training: None }
    }

    /// Creates an interpreter for training.
    pub fn training(weights: &'a Weights, training: Training) -> Self {
        Self { training: Some(training), ..Self::new(weights) }
    }

    /// Data type of products with weights.
    fn products(&self) -> DType {
        self.training.as_ref().map_or(DType::F32, |training| training.products)
    }
}

/// State of a loop between two iterations.
#[derive(Debug)]
pub struct Running {
    sequences: Vec<Tensor>,
    state: Tensor,
    iterations: usize,
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

/// Pads the last axes of `x` with the zeros that `conv` asks for.
fn padded(x: &Tensor, conv: Conv) -> Result<Tensor> {
    let mut x = x.clone();
    if conv.padding == Padding::Same {
        for axis in 2..2 + conv.spatial {
            let (before, after) = conv.same_padding(x.dim(axis)?);
            x = x.pad_with_zeros(axis, before, after)?;
        }
    }
    Ok(x)
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
        Ok(Tensor::from_slice(data, shape, &self.device)?)
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
            Unary::Silu => kernels::silu(x),
            Unary::Gelu => kernels::gelu(x),
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
        Ok(kernels::clamp(x, low, high)?)
    }

    fn mean(&mut self, x: &Tensor, axes: &[usize]) -> Result<Tensor> {
        Ok(x.mean(axes)?)
    }

    fn softmax(&mut self, x: &Tensor) -> Result<Tensor> {
        Ok(kernels::softmax(x)?)
    }

    fn matmul(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Ok(a.contiguous()?.broadcast_matmul(&b.contiguous()?)?)
    }

    fn gemm(&mut self, x: &Tensor, input: usize, output: usize) -> Result<Tensor> {
        let (weight, bias) = (self.param("weight", &[output, input])?, self.param("bias", &[output])?);
        let products = self.products();
        Ok(kernels::linear(&x.to_dtype(products)?, &weight.to_dtype(products)?, &bias)?)
    }

    fn layer_normalization(
        &mut self,
        x: &Tensor,
        affine: Option<(&Tensor, &Tensor)>,
        _width: usize,
        eps: f32,
    ) -> Result<Tensor> {
        Ok(kernels::layer_norm(x, affine, eps)?)
    }

    fn group_normalization(
        &mut self,
        x: &Tensor,
        (weight, bias): (&Tensor, &Tensor),
        groups: usize,
        eps: f32,
    ) -> Result<Tensor> {
        Ok(kernels::group_norm(x, weight, bias, groups, eps)?)
    }

    fn conv(&mut self, x: &Tensor, conv: Conv) -> Result<Tensor> {
        let (weight, bias) = (self.param("weight", &conv.weight_shape())?, self.param("bias", &[conv.output])?);
        let products = self.products();
        let x = &padded(&self.reflected(x, conv)?, conv)?.to_dtype(products)?;
        let weight = &weight.to_dtype(products)?;
        let Conv { input, output, kernel, spatial, stride, groups, .. } = conv;
        if spatial == 2 && (kernel > 1 || stride > 1) {
            let bias = bias.to_dtype(products)?;
            let y = match (kernel, stride, groups) {
                (3, 1, 1) => kernels::conv3x3(x, weight, &bias),
                (_, _, 1) => kernels::conv2d(x, weight, &bias, stride),
                _ if groups == input && groups == output => kernels::depthwise(x, weight, &bias, stride),
                _ => return Err(Error::run("conv", format!("{groups} groups of {input} channels are not supported"))),
            };
            return Ok(y?.to_dtype(DType::F32)?);
        }
        // Other convolutions are matrix products over the pixels. If there are several taps, the shifted inputs are
        // concatenated along the channels.
        let (batch, length) = (x.dim(0)?, x.dim(D::Minus1)? + 1 - kernel);
        let shifted = (0..kernel).map(|tap| x.narrow(D::Minus1, tap, length)).collect::<Result<Vec<_>, _>>()?;
        let shifted = Tensor::cat(&shifted, 1)?.reshape((batch, kernel * input, ()))?;
        let weight = weight.reshape((output, input, kernel))?.transpose(1, 2)?.reshape((1, output, kernel * input))?;
        let y = weight.broadcast_matmul(&shifted)?.to_dtype(DType::F32)?.broadcast_add(&bias.reshape((output, 1))?)?;
        let mut shape = x.dims().to_vec();
        (shape[1], shape[1 + spatial]) = (output, length);
        Ok(y.reshape(shape)?)
    }

    fn pad_reflect(&mut self, x: &Tensor, spatial: usize) -> Result<Tensor> {
        for axis in 2..2 + spatial {
            let length = x.dim(axis)?;
            if length < 2 {
                return Err(Error::run("reflect padding", format!("axis {axis} has {length} elements, needs 2")));
            }
        }
        if spatial == 2 {
            return Ok(kernels::pad_reflect(x)?);
        }
        Ok(Tensor::cat(&[&x.narrow(2, 1, 1)?, x, &x.narrow(2, x.dim(2)? - 2, 1)?], 2)?)
    }

    fn modulate(&mut self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        Ok(kernels::modulate(x, shift, scale)?)
    }

    fn gated_residual(&mut self, x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
        Ok(kernels::gated_residual(x, gate, y)?)
    }

    fn pixel_shuffle(&mut self, x: &Tensor, channels: usize, rows: usize, factors: (usize, usize)) -> Result<Tensor> {
        shuffle_by_transpose(self, x, channels, rows, factors)
    }

    fn dropout(&mut self, x: Tensor, what: Dropped) -> Result<Tensor> {
        let dropout = self.training.as_mut().and_then(|training| training.dropout.as_mut());
        let Some(Dropout { attention, projection, random }) = dropout else { return Ok(x) };
        let probability = match what {
            Dropped::Attention => *attention,
            Dropped::Projection => *projection,
        };
        if probability == 0.0 {
            return Ok(x);
        }
        let threshold = (probability * f64::from(u32::MAX)) as u32;
        let kept = (1.0 / (1.0 - probability)) as f32;
        let mut draw = || if random.next_u32() < threshold { 0.0 } else { kept };
        let mask: Vec<f32> = (0..x.elem_count()).map(|_| draw()).collect();
        Ok((&x * Tensor::from_vec(mask, x.shape(), x.device())?)?)
    }

    fn begin_function(&mut self, _name: &str, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        Ok(inputs.iter().map(|&input| input.clone()).collect())
    }

    fn end_function(&mut self, outputs: Vec<Tensor>) -> Result<Vec<Tensor>> {
        Ok(outputs)
    }

    fn begin_loop(&mut self, sequences: &[&Tensor], state: &Tensor) -> Result<Running> {
        let iterations = sequences.first().map_or(Ok(0), |sequence| sequence.dim(0))?;
        let sequences = sequences.iter().map(|&sequence| sequence.clone()).collect();
        Ok(Running { sequences, state: state.clone(), iterations, done: 0 })
    }

    fn next_iteration(&mut self, open: &mut Running) -> Result<Option<Iteration<Tensor>>> {
        if open.done == open.iterations {
            return Ok(None);
        }
        let now = open.sequences.iter().map(|sequence| sequence.get(open.done)).collect::<Result<_, _>>()?;
        Ok(Some((now, open.state.clone())))
    }

    fn end_iteration(&mut self, open: &mut Running, state: Tensor) -> Result<()> {
        open.state = state;
        open.done += 1;
        Ok(())
    }

    fn end_loop(&mut self, open: Running) -> Result<Tensor> {
        Ok(open.state)
    }
}
