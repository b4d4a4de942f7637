//! The interpreter that counts multiply-adds, weights and activations of every scope, without computing any values.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Binary, Conv, Dim, Dropped, Iteration, Ops, OpsExt, Padding, Unary, modulate_by_parts, position, residual_by_parts,
    scoped, shuffle_by_transpose,
};
use crate::{Error, Result};

/// Shape of a tensor. This interpreter computes only shapes.
pub type Shape = Vec<usize>;

/// Cost of one scope.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Row {
    /// Multiply-adds of matrix products and convolutions.
    pub multiply_adds: u64,
    /// Matrix products and convolutions, counted in every iteration of a loop.
    pub products: u64,
    /// Elements of the weights that are first used in this scope.
    pub parameters: u64,
    /// Elements of the weights that are read, counted in every iteration of a loop.
    pub weights_read: u64,
    /// Elements of all results, counted in every iteration of a loop.
    pub activations: u64,
}

impl std::ops::AddAssign for Row {
    fn add_assign(&mut self, other: Self) {
        // Sizes of a configuration that no machine can run would overflow.
        self.multiply_adds = self.multiply_adds.saturating_add(other.multiply_adds);
        self.products = self.products.saturating_add(other.products);
        self.parameters = self.parameters.saturating_add(other.parameters);
        self.weights_read = self.weights_read.saturating_add(other.weights_read);
        self.activations = self.activations.saturating_add(other.activations);
    }
}

/// Counts the cost of primitives by scope.
#[derive(Debug)]
pub struct Cost {
    scope: Vec<String>,
    repeat: u64,
    rows: BTreeMap<String, Row>,
    parameters: Vec<(String, Shape)>,
    seen: BTreeSet<String>,
}

impl Default for Cost {
    fn default() -> Self {
        Self { scope: vec![], repeat: 1, rows: BTreeMap::new(), parameters: vec![], seen: BTreeSet::new() }
    }
}

impl Cost {
    /// Names and shapes of all weights that were used, in the order of first use.
    pub fn into_parameters(self) -> Vec<(String, Shape)> {
        self.parameters
    }

    /// Cost of every scope, without the scopes inside it.
    pub fn rows(&self) -> &BTreeMap<String, Row> {
        &self.rows
    }

    /// Total cost of all scopes.
    pub fn total(&self) -> Row {
        let mut total = Row::default();
        self.rows.values().for_each(|row| total += *row);
        total
    }

    fn count(&mut self, row: Row) {
        *self.rows.entry(self.scope.join(".")).or_default() += row;
    }

    fn result(&mut self, shape: Shape) -> Result<Shape> {
        let activations = elements(&shape).saturating_mul(self.repeat);
        self.count(Row { activations, ..Row::default() });
        Ok(shape)
    }

    fn product(&mut self, shape: Shape, inner: usize) -> Result<Shape> {
        let multiply_adds = elements(&shape).saturating_mul(inner as u64).saturating_mul(self.repeat);
        self.count(Row { multiply_adds, products: self.repeat, ..Row::default() });
        self.result(shape)
    }
}

/// A loop whose body is counted once and multiplied by the number of iterations.
#[derive(Debug)]
pub struct Counted {
    element: Option<Vec<Shape>>,
    iterations: u64,
    state: Shape,
}

fn elements(shape: &[usize]) -> u64 {
    shape.iter().fold(1, |product: u64, &size| product.saturating_mul(size as u64))
}

fn mismatch(op: &str, shapes: &[&Shape]) -> Error {
    Error::run(op, format!("shapes {shapes:?} do not fit"))
}

fn broadcast(a: &Shape, b: &Shape) -> Result<Shape> {
    let rank = a.len().max(b.len());
    let at = |shape: &Shape, axis: usize| (axis + shape.len()).checked_sub(rank).map_or(1, |axis| shape[axis]);
    (0..rank)
        .map(|axis| match (at(a, axis), at(b, axis)) {
            (x, y) if x == y || y == 1 => Ok(x),
            (1, y) => Ok(y),
            _ => Err(mismatch("broadcast", &[a, b])),
        })
        .collect()
}

fn sizes(x: &Shape, shape: &[Dim<Shape>]) -> Result<Shape> {
    let known = |dim: &Dim<Shape>| match dim {
        Dim::Is(size) => Some(*size),
        Dim::Of(other, axis) => Some(other[*axis]),
        Dim::Rest => None,
    };
    let product = elements(&shape.iter().filter_map(known).collect::<Shape>());
    let rest = (elements(x) / product.max(1)) as usize;
    let sizes: Shape = shape.iter().map(|dim| known(dim).unwrap_or(rest)).collect();
    if elements(&sizes) == elements(x) { Ok(sizes) } else { Err(mismatch("reshape", &[x, &sizes])) }
}

impl Ops for Cost {
    type Tensor = Shape;
    type Loop = Counted;

    fn enter(&mut self, name: &str) {
        self.scope.push(name.to_string());
    }

    fn leave(&mut self) {
        self.scope.pop();
    }

    fn param(&mut self, name: &str, shape: &[usize]) -> Result<Shape> {
        let name = scoped(&self.scope, name);
        let size = elements(shape);
        let mut row = Row { weights_read: size.saturating_mul(self.repeat), ..Row::default() };
        if self.seen.insert(name.clone()) {
            self.parameters.push((name, shape.to_vec()));
            row.parameters = size;
        }
        self.count(row);
        Ok(shape.to_vec())
    }

    fn constant(&mut self, shape: &[usize], _data: &[f32]) -> Result<Shape> {
        Ok(shape.to_vec())
    }

    fn reshape(&mut self, x: &Shape, shape: &[Dim<Shape>]) -> Result<Shape> {
        sizes(x, shape)
    }

    fn expand(&mut self, x: &Shape, shape: &[Dim<Shape>]) -> Result<Shape> {
        let target: Shape = shape
            .iter()
            .map(|dim| match dim {
                Dim::Is(size) => Ok(*size),
                Dim::Of(other, axis) => Ok(other[*axis]),
                Dim::Rest => Err(mismatch("expand", &[x])),
            })
            .collect::<Result<_>>()?;
        let target = broadcast(x, &target)?;
        self.result(target)
    }

    fn permute(&mut self, x: &Shape, axes: &[usize]) -> Result<Shape> {
        self.result(axes.iter().map(|&axis| x[axis]).collect())
    }

    fn slice(&mut self, x: &Shape, axis: usize, start: i64, end: i64) -> Result<Shape> {
        let mut shape = x.clone();
        shape[axis] = position(end, x[axis]).saturating_sub(position(start, x[axis]));
        self.result(shape)
    }

    fn concat(&mut self, xs: &[&Shape], axis: usize) -> Result<Shape> {
        let mut shape = xs[0].clone();
        shape[axis] = xs.iter().map(|x| x[axis]).sum();
        self.result(shape)
    }

    fn gather(&mut self, table: &Shape, indices: &Shape) -> Result<Shape> {
        self.result([indices, &table[1..]].concat())
    }

    fn unary(&mut self, _op: Unary, x: &Shape) -> Result<Shape> {
        self.result(x.clone())
    }

    fn binary(&mut self, _op: Binary, a: &Shape, b: &Shape) -> Result<Shape> {
        let shape = broadcast(a, b)?;
        self.result(shape)
    }

    fn clamp(&mut self, x: &Shape, _low: f32, _high: f32) -> Result<Shape> {
        self.result(x.clone())
    }

    fn mean(&mut self, x: &Shape, axes: &[usize]) -> Result<Shape> {
        self.result((0..x.len()).filter(|axis| !axes.contains(axis)).map(|axis| x[axis]).collect())
    }

    fn softmax(&mut self, x: &Shape) -> Result<Shape> {
        self.result(x.clone())
    }

    fn matmul(&mut self, a: &Shape, b: &Shape) -> Result<Shape> {
        let ([.., rows, inner], [.., inner_b, columns]) = (&a[..], &b[..]) else {
            return Err(mismatch("matmul", &[a, b]));
        };
        if inner != inner_b {
            return Err(mismatch("matmul", &[a, b]));
        }
        let mut shape = broadcast(&a[..a.len() - 2].to_vec(), &b[..b.len() - 2].to_vec())?;
        shape.extend([rows, columns]);
        self.product(shape, *inner)
    }

    fn gemm(&mut self, x: &Shape, input: usize, output: usize) -> Result<Shape> {
        let weight = self.param("weight", &[output, input])?;
        self.param("bias", &[output])?;
        match x[..] {
            [rows, inner] if inner == input => self.product(vec![rows, output], input),
            _ => Err(mismatch("gemm", &[x, &weight])),
        }
    }

    fn layer_normalization(
        &mut self,
        x: &Shape,
        _: Option<(&Shape, &Shape)>,
        width: usize,
        _eps: f32,
    ) -> Result<Shape> {
        if x.last() != Some(&width) {
            return Err(mismatch("layer_normalization", &[x, &vec![width]]));
        }
        self.result(x.clone())
    }

    fn group_normalization(
        &mut self,
        x: &Shape,
        (weight, _): (&Shape, &Shape),
        groups: usize,
        _eps: f32,
    ) -> Result<Shape> {
        if weight[0] != x[1] || !x[1].is_multiple_of(groups) {
            return Err(mismatch("group_normalization", &[x, weight]));
        }
        self.result(x.clone())
    }

    fn conv(&mut self, x: &Shape, conv: Conv) -> Result<Shape> {
        let x = &self.reflected(x, conv)?;
        let weight = self.param("weight", &conv.weight_shape())?;
        self.param("bias", &[conv.output])?;
        if x.len() != 2 + conv.spatial || x[1] != conv.input {
            return Err(mismatch("conv", &[x, &weight]));
        }
        let mut shape = vec![x[0], conv.output];
        for &size in &x[2..] {
            let places = match conv.padding {
                Padding::Same => size.div_ceil(conv.stride),
                Padding::Valid | Padding::Reflect => {
                    let last = size.checked_sub(conv.kernel).ok_or_else(|| mismatch("conv", &[x, &weight]))?;
                    last / conv.stride + 1
                }
            };
            shape.push(places);
        }
        self.product(shape, weight[1..].iter().product())
    }

    fn pad_reflect(&mut self, x: &Shape, spatial: usize) -> Result<Shape> {
        let mut shape = x.clone();
        shape[2..2 + spatial].iter_mut().for_each(|size| *size += 2);
        self.result(shape)
    }

    fn modulate(&mut self, x: &Shape, shift: &Shape, scale: &Shape) -> Result<Shape> {
        modulate_by_parts(self, x, shift, scale)
    }

    fn gated_residual(&mut self, x: &Shape, gate: &Shape, y: &Shape) -> Result<Shape> {
        residual_by_parts(self, x, gate, y)
    }

    fn pixel_shuffle(&mut self, x: &Shape, channels: usize, rows: usize, factors: (usize, usize)) -> Result<Shape> {
        shuffle_by_transpose(self, x, channels, rows, factors)
    }

    fn dropout(&mut self, x: Shape, _what: Dropped) -> Result<Shape> {
        Ok(x)
    }

    fn begin_function(&mut self, _name: &str, inputs: &[&Shape]) -> Result<Vec<Shape>> {
        Ok(inputs.iter().map(|&input| input.clone()).collect())
    }

    fn end_function(&mut self, outputs: Vec<Shape>) -> Result<Vec<Shape>> {
        Ok(outputs)
    }

    fn begin_loop(&mut self, sequences: &[&Shape], state: &Shape) -> Result<Counted> {
        let now = sequences.iter().map(|sequence| sequence[1..].to_vec()).collect();
        let iterations = sequences.first().map_or(0, |sequence| sequence[0] as u64);
        Ok(Counted { element: (iterations > 0).then_some(now), iterations, state: state.clone() })
    }

    fn next_iteration(&mut self, open: &mut Counted) -> Result<Option<Iteration<Shape>>> {
        let Some(now) = open.element.take() else { return Ok(None) };
        self.repeat *= open.iterations;
        Ok(Some((now, open.state.clone())))
    }

    fn end_iteration(&mut self, open: &mut Counted, state: Shape) -> Result<()> {
        self.repeat /= open.iterations;
        open.state = state;
        Ok(())
    }

    fn end_loop(&mut self, open: Counted) -> Result<Shape> {
        Ok(open.state)
    }
}
