//! A batch on ONNX Runtime. What a step reads and writes is bound to its graph once: past and present change places, and
//! nothing is allocated or copied from one step to the next.

use std::fmt::Debug;
use std::iter::zip;
use std::mem::swap;
use std::rc::Rc;

use eqim::engine::{Classes, Engine, Row, Session, arranged};
use eqim::model::{Port, Stage};
use eqim::{Error, Result};
use ndarray::{Array2, ArrayView2, Ix2};
use ort::memory::Allocator;
use ort::session::IoBinding;
use ort::value::{DynValue, PrimitiveTensorElementType, Tensor};

use super::{OrtEngine, failed, float_output, integer_input};

/// What caches are made of.
pub(super) trait Element: PrimitiveTensorElementType + Copy + Debug + Default + 'static {}

impl<T: PrimitiveTensorElementType + Copy + Debug + Default + 'static> Element for T {}

/// A batch whose caches are of `T`.
pub(super) struct OrtSession<'a, T: Element> {
    engine: &'a OrtEngine,
    labels: Vec<i64>,
    classes: Classes<Class>,
    /// Nothing while there are no rows.
    bound: Option<Bound<T>>,
}

/// A row of a prefill's outputs.
struct Class {
    outputs: Rc<Vec<DynValue>>,
    row: usize,
}

/// What a step's graph is bound to.
struct Bound<T: Element> {
    token: Tensor<f32>,
    position: Tensor<i64>,
    z: Tensor<f32>,
    past: Vec<Tensor<T>>,
    present: Vec<Tensor<T>>,
    /// The next step's, from past to present, and that of the step after it, from present to past.
    bindings: Vec<IoBinding>,
}

impl<'a, T: Element> OrtSession<'a, T> {
    /// A batch without rows.
    pub(super) fn new(engine: &'a OrtEngine) -> Self {
        Self { engine, labels: vec![], classes: Classes::default(), bound: None }
    }

    /// Keys and values of the last tokens, of rows that were in the batch before.
    fn past(&self, ports: &[Port], rows: &[Row]) -> Result<Vec<Tensor<T>>> {
        let cache = |(index, port): (usize, &Port)| {
            let mut tensor = zeros(port, rows.len())?;
            for (to, row) in rows.iter().enumerate() {
                if let (Row::Kept(from), Some(bound)) = (*row, &self.bound) {
                    let values = bound.past[index].extract_tensor().1;
                    copy_row((values, from, self.labels.len()), (&mut tensor, to, rows.len()));
                }
            }
            Ok(tensor)
        };
        ports.iter().enumerate().map(cache).collect()
    }

    /// Keys and values of the classes of a batch.
    fn cross(&self, ports: &[Port], labels: &[i64]) -> Result<Vec<Tensor<T>>> {
        let cache = |(index, port): (usize, &Port)| {
            let mut tensor = zeros(port, labels.len())?;
            for (to, &label) in labels.iter().enumerate() {
                let class = self.classes.get(label)?;
                let (shape, values) = class.outputs[index + 1].try_extract_tensor().map_err(failed(&port.name))?;
                copy_row((values, class.row, shape[0] as usize), (&mut tensor, to, labels.len()));
            }
            Ok(tensor)
        };
        ports.iter().enumerate().map(cache).collect()
    }

    /// Binds a step of rows with these labels.
    fn bind(&self, labels: &[i64], rows: &[Row]) -> Result<Bound<T>> {
        let config = self.engine.config();
        let (inputs, outputs) = (Stage::Step.inputs(config), Stage::Step.outputs(config));
        let (past, cross) = inputs[2..].split_at(2 * config.generator.depth);
        let cross_values = self.cross(cross, labels)?;
        let mut bound = Bound {
            token: zeros(&inputs[0], rows.len())?,
            position: zeros(&inputs[1], rows.len())?,
            z: zeros(&outputs[0], rows.len())?,
            past: self.past(past, rows)?,
            present: past.iter().map(|port| zeros(port, rows.len())).collect::<Result<_>>()?,
            bindings: vec![],
        };
        for _ in 0..2 {
            let mut binding = self.engine.graph(Stage::Step)?.binding()?;
            let bind = || -> ort::Result<IoBinding> {
                binding.bind_input(&inputs[0].name, &bound.token)?;
                binding.bind_input(&inputs[1].name, &bound.position)?;
                for (port, value) in zip(past, &bound.past).chain(zip(cross, &cross_values)) {
                    binding.bind_input(&port.name, value)?;
                }
                binding.bind_output(&outputs[0].name, &mut bound.z)?;
                for (port, value) in zip(&outputs[1..], &mut bound.present) {
                    binding.bind_output(&port.name, value)?;
                }
                Ok(binding)
            };
            let binding = bind().map_err(failed("transformer step"))?;
            bound.bindings.push(binding);
            swap(&mut bound.past, &mut bound.present);
        }
        Ok(bound)
    }
}

impl OrtEngine {
    fn prefill(&self, labels: &[i64]) -> Result<Vec<Class>> {
        let outputs = Rc::new(self.run(Stage::Prefill, &[integer_input(labels)?.into()])?);
        Ok((0..labels.len()).map(|row| Class { outputs: Rc::clone(&outputs), row }).collect())
    }
}

/// Zeros for a port of `rows` rows.
fn zeros<T: Element>(port: &Port, rows: usize) -> Result<Tensor<T>> {
    let shape: Vec<usize> = port.shape.iter().map(|axis| axis.size(|_| rows)).collect();
    let mut tensor = Tensor::new(&Allocator::default(), shape).map_err(failed(&port.name))?;
    tensor.extract_tensor_mut().1.fill(T::default());
    Ok(tensor)
}

/// Copies row `from.1` of `from.2` to row `to.1` of `to.2`.
fn copy_row<T: Element>(from: (&[T], usize, usize), to: (&mut Tensor<T>, usize, usize)) {
    let (source, target) = (from.0, to.0.extract_tensor_mut().1);
    let length = target.len() / to.2;
    debug_assert_eq!(source.len() / from.2, length);
    target[to.1 * length..][..length].copy_from_slice(&source[from.1 * length..][..length]);
}

impl<T: Element> Session for OrtSession<'_, T> {
    fn arrange(&mut self, rows: &[Row]) -> Result<Array2<f32>> {
        let labels = arranged(&self.labels, rows);
        self.classes.update(&labels, |new| self.engine.prefill(new))?;
        self.bound = Some(self.bind(&labels, rows)?);
        let new: Vec<i64> = zip(rows, &labels).filter(|(row, _)| row.is_new()).map(|(_, &label)| label).collect();
        let mut z = Array2::zeros((new.len(), self.engine.config().generator.dim));
        for (&label, mut z) in zip(&new, z.rows_mut()) {
            let class = self.classes.get(label)?;
            z.assign(&float_output::<Ix2>(&class.outputs[0])?.row(class.row));
        }
        self.labels = labels;
        Ok(z)
    }

    fn step(&mut self, tokens: ArrayView2<f32>, positions: &[i64]) -> Result<Array2<f32>> {
        let bound = self.bound.as_mut().ok_or_else(|| Error::run("transformer step", "the batch has no rows"))?;
        zip(bound.token.extract_tensor_mut().1, tokens).for_each(|(to, &value)| *to = value);
        bound.position.extract_tensor_mut().1.copy_from_slice(positions);
        self.engine.graph(Stage::Step)?.run_bound(&bound.bindings[0])?;
        bound.bindings.swap(0, 1);
        swap(&mut bound.past, &mut bound.present);
        let z = bound.z.extract_tensor().1.to_vec();
        Array2::from_shape_vec((self.labels.len(), z.len() / self.labels.len()), z)
            .map_err(|error| Error::run("z", error))
    }
}
