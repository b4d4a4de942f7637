//! An interpreter that wraps another one and runs products in INT8 as a [`Policy`] specifies, and the list of weights
//! that a model then requires.

use std::collections::{BTreeMap, BTreeSet};

use eqim::model::Stage;
use eqim::ops::cost::Cost;
use eqim::ops::{Binary, Conv, Dim, Dropped, Iteration, Ops, OpsExt, Unary, scoped};
use eqim::{Config, Error, Result};

use crate::int8::Int8;
use crate::policy::{Policy, Product, Scheme};

/// Runs a stage on `O`. Products with weights run in the scheme that the policy chooses.
#[derive(Debug)]
pub struct Quantize<'a, O> {
    inner: O,
    policy: &'a Policy,
    stage: Stage,
    scope: Vec<String>,
    chosen: QuantizationPlan,
}

/// Weights that a stage requires, quantized or not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QuantizationPlan {
    /// Schemes of all products with weights, by scope.
    pub schemes: BTreeMap<String, Scheme>,
    /// Names of the weights that the stage requires without quantization.
    pub floats: BTreeSet<String>,
}

impl<'a, O: Int8> Quantize<'a, O> {
    /// Wraps an interpreter to run one stage.
    pub fn new(inner: O, policy: &'a Policy, stage: Stage) -> Self {
        Self { inner, policy, stage, scope: vec![], chosen: QuantizationPlan::default() }
    }

    /// The wrapped interpreter.
    pub fn into_inner(self) -> O {
        self.inner
    }

    /// Chooses the scheme of the product with the current scope's weight, which has this shape, and records the weights
    /// that the product requires.
    fn decide(&mut self, shape: &[usize]) -> Result<Scheme> {
        let scope = self.scope.join(".");
        let scheme = self.policy.scheme(Product { stage: self.stage, scope: &scope, shape })?;
        let floats: &[&str] = match scheme {
            Scheme::Float => &["weight", "bias"],
            Scheme::WeightOnly | Scheme::Static { .. } | Scheme::Dynamic => &["bias"],
            Scheme::Integer { .. } => &[],
        };
        self.chosen.floats.extend(floats.iter().map(|name| format!("{scope}.{name}")));
        self.chosen.schemes.insert(scope, scheme);
        Ok(scheme)
    }
}

/// Weights that every stage of a model requires under a policy.
///
/// # Errors
/// [`Error::input`] if the policy's table lacks a scope, or one of its patterns matches no scope.
pub fn plan(config: &Config, policy: &Policy) -> Result<BTreeMap<Stage, QuantizationPlan>> {
    let mut plans = BTreeMap::new();
    for stage in Stage::ALL {
        let inputs = stage.input_shapes(config, 1, 2, 1);
        let mut quantize = Quantize::new(Cost::default(), policy, stage);
        stage.run(&mut quantize, config, &inputs)?;
        plans.insert(stage, quantize.chosen);
    }
    let scopes: Vec<&String> = plans.values().flat_map(|plan: &QuantizationPlan| plan.schemes.keys()).collect();
    for (field, patterns) in [("exclude", &policy.exclude), ("w8a8", &policy.w8a8)] {
        if let Some(pattern) = patterns.iter().find(|pattern| !scopes.iter().any(|scope| pattern.is_match(scope))) {
            let problem = format!("is {pattern}, which fits no scope: the calibration table lists them");
            return Err(Error::setting(field, problem));
        }
    }
    Ok(plans)
}

impl<O: Int8> Ops for Quantize<'_, O> {
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
        self.chosen.floats.insert(scoped(&self.scope, name));
        self.inner.param(name, shape)
    }

    fn gemm(&mut self, x: &O::Tensor, input: usize, output: usize) -> Result<O::Tensor> {
        match self.decide(&[output, input])? {
            Scheme::Float => self.inner.gemm(x, input, output),
            Scheme::WeightOnly => self.inner.dequantized_gemm(x, input, output),
            Scheme::Static { scale } => {
                let x = self.inner.quantize_dequantize(x, scale)?;
                self.inner.dequantized_gemm(&x, input, output)
            }
            Scheme::Dynamic => self.inner.dynamic_gemm(x, &[output, input]),
            scheme @ Scheme::Integer { .. } => Err(unfit("matrix product", scheme)),
        }
    }

    fn conv(&mut self, x: &O::Tensor, conv: Conv) -> Result<O::Tensor> {
        match self.decide(&conv.weight_shape())? {
            Scheme::Float => self.inner.conv(x, conv),
            Scheme::Static { scale } => {
                let x = self.inner.reflected(x, conv)?;
                let x = self.inner.quantize_dequantize(&x, scale)?;
                self.inner.dequantized_conv(&x, conv.after_reflection())
            }
            Scheme::Integer { input, output } => self.inner.integer_conv(x, conv, (input, output)),
            Scheme::Dynamic if conv.spatial == 1 && conv.stride == 1 && conv.groups == 1 => {
                dynamic_conv1d(&mut self.inner, x, conv)
            }
            scheme @ (Scheme::WeightOnly | Scheme::Dynamic) => Err(unfit("convolution", scheme)),
        }
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
        self.inner.matmul(a, b)
    }

    fn layer_normalization(
        &mut self,
        x: &O::Tensor,
        affine: Option<(&O::Tensor, &O::Tensor)>,
        width: usize,
        eps: f32,
    ) -> Result<O::Tensor> {
        self.inner.layer_normalization(x, affine, width, eps)
    }

    fn group_normalization(
        &mut self,
        x: &O::Tensor,
        affine: (&O::Tensor, &O::Tensor),
        groups: usize,
        eps: f32,
    ) -> Result<O::Tensor> {
        self.inner.group_normalization(x, affine, groups, eps)
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

/// A convolution over the columns of `x [batch, input, columns]` as a matrix product of one row per column.
fn dynamic_conv1d<O: Int8>(o: &mut O, x: &O::Tensor, conv: Conv) -> Result<O::Tensor> {
    let Conv { input, output, kernel, .. } = conv;
    let padded = o.reflected(x, conv)?;
    let mut taps = vec![];
    for tap in 0..kernel as i64 {
        let end = match tap - kernel as i64 + 1 {
            0 => i64::MAX,
            from_end => from_end,
        };
        let columns = o.slice(&padded, 2, tap, end)?;
        taps.push(o.reshape(&columns, &[Dim::Of(x, 0), Dim::Is(input), Dim::Rest, Dim::Is(1)])?);
    }
    let taps = o.concat(&taps.iter().collect::<Vec<_>>(), 3)?;
    let rows = o.permute(&taps, &[0, 2, 1, 3])?;
    let rows = o.reshape(&rows, &[Dim::Rest, Dim::Is(input * kernel)])?;
    let y = o.dynamic_gemm(&rows, &conv.weight_shape())?;
    let y = o.reshape(&y, &[Dim::Of(x, 0), Dim::Rest, Dim::Is(output)])?;
    o.permute(&y, &[0, 2, 1])
}

fn unfit(what: &str, scheme: Scheme) -> Error {
    Error::run("policy", format!("gives a {what} the scheme {scheme:?}, which it does not have"))
}
