//! The decorator that puts products into INT8 as a [`Policy`] says, and what a model then needs of its weights.

use std::collections::{BTreeMap, BTreeSet};

use eqim::model::Stage;
use eqim::ops::cost::Cost;
use eqim::ops::{Binary, Dim, Ops, Turn, Unary, scoped};
use eqim::{Config, Error, Result};

use crate::int8::Int8;
use crate::policy::{Policy, Product, Scheme};

/// Runs a stage on `O`, products with weights in the form that the policy gives them.
#[derive(Debug)]
pub struct Quantize<'a, O> {
    inner: O,
    policy: &'a Policy,
    stage: Stage,
    scope: Vec<String>,
    /// Shape of the weight that the scope asked for last.
    shape: Vec<usize>,
    chosen: Plan,
}

/// What a stage needs of its weights.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Schemes of all products with weights, by scope.
    pub schemes: BTreeMap<String, Scheme>,
    /// Names of the weights that are needed as they are.
    pub floats: BTreeSet<String>,
}

impl<'a, O: Int8> Quantize<'a, O> {
    /// A decorated interpreter of one stage.
    pub fn new(inner: O, policy: &'a Policy, stage: Stage) -> Self {
        Self { inner, policy, stage, scope: vec![], shape: vec![], chosen: Plan::default() }
    }

    /// The interpreter inside.
    pub fn into_inner(self) -> O {
        self.inner
    }

    /// Looks up how the product with the scope's weight runs, and notes it.
    fn scheme(&mut self) -> Result<Scheme> {
        let scope = self.scope.join(".");
        let scheme = self.policy.scheme(Product { stage: self.stage, scope: &scope, shape: &self.shape })?;
        if scheme != Scheme::Float {
            self.chosen.floats.remove(&format!("{scope}.weight"));
        }
        if matches!(scheme, Scheme::Integer { .. }) {
            self.chosen.floats.remove(&format!("{scope}.bias"));
        }
        self.chosen.schemes.insert(scope, scheme);
        Ok(scheme)
    }

    /// A convolution, mirrored at the borders first where it is `padded`.
    fn convolve(
        &mut self,
        x: &O::Tensor,
        weight: &O::Tensor,
        bias: &O::Tensor,
        spatial: usize,
        padded: bool,
    ) -> Result<O::Tensor> {
        let scheme = self.scheme()?;
        if let Scheme::Integer { input, output } = scheme {
            return self.inner.integer_conv(x, weight, bias, spatial, padded, (input, output));
        }
        let x = &if padded { self.inner.pad_reflect(x, spatial)? } else { x.clone() };
        match scheme {
            Scheme::Float => self.inner.conv(x, weight, bias, spatial),
            Scheme::Static { scale } => {
                let x = self.inner.quantize_dequantize(x, scale)?;
                let weight = self.inner.dequantize(weight)?;
                self.inner.conv(&x, &weight, bias, spatial)
            }
            _ => Err(unfit("convolution", scheme)),
        }
    }
}

/// What every stage of a model needs of its weights under a policy.
///
/// # Errors
/// [`Error::Input`] when the policy's table lacks a scope, or one of its patterns fits none.
pub fn plan(config: &Config, policy: &Policy) -> Result<BTreeMap<Stage, Plan>> {
    let mut plans = BTreeMap::new();
    for stage in Stage::ALL {
        let inputs = stage.input_shapes(config, 1, 2, 1);
        let mut quantize = Quantize::new(Cost::default(), policy, stage);
        stage.run(&mut quantize, config, &inputs)?;
        plans.insert(stage, quantize.chosen);
    }
    let scopes: Vec<&String> = plans.values().flat_map(|plan: &Plan| plan.schemes.keys()).collect();
    for (flag, patterns) in [("--exclude", &policy.keep), ("--w8a8", &policy.w8a8)] {
        if let Some(pattern) = patterns.iter().find(|pattern| !scopes.iter().any(|scope| pattern.is_match(scope))) {
            let problem = format!("{pattern} fits no scope: the calibration table lists them");
            return Err(Error::input(flag, problem));
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
        if name == "weight" {
            self.shape = shape.to_vec();
        }
        self.chosen.floats.insert(scoped(&self.scope, name));
        self.inner.param(name, shape)
    }

    fn gemm(&mut self, x: &O::Tensor, weight: &O::Tensor, bias: &O::Tensor) -> Result<O::Tensor> {
        match self.scheme()? {
            Scheme::Float => self.inner.gemm(x, weight, bias),
            Scheme::WeightOnly => {
                let weight = self.inner.dequantize(weight)?;
                self.inner.gemm(x, &weight, bias)
            }
            Scheme::Static { scale } => {
                let x = self.inner.quantize_dequantize(x, scale)?;
                let weight = self.inner.dequantize(weight)?;
                self.inner.gemm(&x, &weight, bias)
            }
            Scheme::Dynamic => self.inner.dynamic_gemm(x, weight, bias),
            scheme @ Scheme::Integer { .. } => Err(unfit("matrix product", scheme)),
        }
    }

    fn conv(&mut self, x: &O::Tensor, weight: &O::Tensor, bias: &O::Tensor, spatial: usize) -> Result<O::Tensor> {
        self.convolve(x, weight, bias, spatial, false)
    }

    fn mirrored_conv(
        &mut self,
        x: &O::Tensor,
        weight: &O::Tensor,
        bias: &O::Tensor,
        spatial: usize,
    ) -> Result<O::Tensor> {
        self.convolve(x, weight, bias, spatial, true)
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

    fn layer_norm(
        &mut self,
        x: &O::Tensor,
        affine: Option<(&O::Tensor, &O::Tensor)>,
        width: usize,
        eps: f32,
    ) -> Result<O::Tensor> {
        self.inner.layer_norm(x, affine, width, eps)
    }

    fn group_norm(
        &mut self,
        x: &O::Tensor,
        affine: (&O::Tensor, &O::Tensor),
        groups: usize,
        eps: f32,
    ) -> Result<O::Tensor> {
        self.inner.group_norm(x, affine, groups, eps)
    }

    fn pad_reflect(&mut self, x: &O::Tensor, spatial: usize) -> Result<O::Tensor> {
        self.inner.pad_reflect(x, spatial)
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

fn unfit(what: &str, scheme: Scheme) -> Error {
    Error::run("policy", format!("gives a {what} the scheme {scheme:?}, which it does not have"))
}
