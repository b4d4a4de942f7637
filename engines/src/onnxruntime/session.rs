//! A batch on ONNX Runtime. The inputs and outputs of the step graph are bound once. The past and present caches swap
//! places after each step, so that no step allocates or copies a cache. They are in the memory of the execution provider.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::fmt::Debug;
use std::iter::zip;
use std::mem::swap;
use std::rc::Rc;

use eqim::engine::{PrefillCache, Row, Session, lerp};
use eqim::model::{Sizes, Stage, ValueInfo};
use eqim::{Error, Result, ResultExt};
use half::f16;
use ndarray::{Array1, Array2, ArrayView2, Ix2};
use ort::memory::Allocator;
use ort::session::IoBinding;
use ort::value::{DynValue, PrimitiveTensorElementType, Tensor};

use super::device::DeviceMemory;
use super::failure::failed;
use super::graphs::Graphs;
use super::values::{float_output, integer_input};

/// Element type of a tensor.
pub(super) trait Value: PrimitiveTensorElementType + Copy + Debug + Default + 'static {}

impl<T: PrimitiveTensorElementType + Copy + Debug + Default + 'static> Value for T {}

/// Element type of a cache.
pub(super) trait Element: Value {
    /// Interpolates linearly: `self + share * (other - self)`.
    fn lerp(self, other: Self, share: f32) -> Self;
}

impl Element for f32 {
    fn lerp(self, other: Self, share: f32) -> Self {
        lerp(self, other, share)
    }
}

impl Element for f16 {
    fn lerp(self, other: Self, share: f32) -> Self {
        Self::from_f32(lerp(self.to_f32(), other.to_f32(), share))
    }
}

/// A batch with caches of type `T`.
pub(super) struct OrtSession<'a, T: Element> {
    graphs: &'a Graphs,
    /// Number of rows of the batch.
    rows: usize,
    classes: PrefillCache<Class>,
    /// The memory of the device that runs the step, where the caches are; `None` inside if that is the memory of the CPU.
    memory: OnceCell<Option<DeviceMemory>>,
    /// `None` until the batch has rows.
    bound: Option<Bound<T>>,
}

/// One row of the outputs of a prefill.
struct Class {
    outputs: Rc<Vec<DynValue>>,
    row: usize,
}

/// Tensors that the step graph is bound to.
struct Bound<T: Element> {
    token: Tensor<f32>,
    position: Tensor<i64>,
    z: Tensor<f32>,
    /// Names of the inputs for `token` and `position`.
    names: [String; 2],
    past: Vec<Tensor<T>>,
    present: Vec<Tensor<T>>,
    /// Two bindings that alternate. The binding of the next step reads `past` and writes `present`. The binding of the
    /// step after it reads `present` and writes `past`.
    bindings: Vec<IoBinding>,
}

impl<'a, T: Element> OrtSession<'a, T> {
    /// A batch without rows.
    pub(super) fn new(graphs: &'a Graphs) -> Self {
        Self { graphs, rows: 0, classes: PrefillCache::default(), memory: OnceCell::new(), bound: None }
    }

    /// The memory of the device; `None` if that is the memory of the CPU.
    fn memory(&self) -> Result<Option<&DeviceMemory>> {
        if self.memory.get().is_none() {
            let memory = self.graphs.device_memory::<T>()?;
            self.memory.get_or_init(|| memory);
        }
        Ok(self.memory.get().and_then(Option::as_ref))
    }

    /// Keys and values of the last tokens. Rows that were already in the batch keep theirs; new rows have zeros.
    fn past(&self, infos: &[ValueInfo], rows: &[Row]) -> Result<Vec<Tensor<T>>> {
        let cache = |(index, info): (usize, &ValueInfo)| {
            let mut tensor = zeros(info, rows.len())?;
            let Some(bound) = self.bound.as_ref().filter(|_| rows.iter().any(|row| row.kept.is_some())) else {
                return Ok(tensor);
            };
            let past = match self.memory()? {
                Some(memory) => Cow::Owned(memory.to_cpu(&bound.past[index])?),
                None => Cow::Borrowed(&bound.past[index]),
            };
            let values = past.extract_tensor().1;
            for (to, row) in rows.iter().enumerate() {
                if let Some(from) = row.kept {
                    let target = row_mut(&mut tensor, to, rows.len());
                    target.copy_from_slice(row_of(values, from, self.rows));
                }
            }
            Ok(tensor)
        };
        infos.iter().enumerate().map(cache).collect()
    }

    /// Cross-attention keys and values of the classes of a batch.
    fn cross(&self, infos: &[ValueInfo], rows: &[Row]) -> Result<Vec<Tensor<T>>> {
        let cache = |(index, info): (usize, &ValueInfo)| {
            let mut tensor = zeros(info, rows.len())?;
            for (to, row) in rows.iter().enumerate() {
                let (class, blend) = self.classes.get(row.condition)?;
                let target: &mut [T] = row_mut(&mut tensor, to, rows.len());
                target.copy_from_slice(class.output(index + 1)?);
                if let Some((other, share)) = blend {
                    zip(target, other.output::<T>(index + 1)?).for_each(|(to, &other)| *to = to.lerp(other, share));
                }
            }
            Ok(tensor)
        };
        infos.iter().enumerate().map(cache).collect()
    }

    /// Allocates the tensors of a step of these rows and binds the graph to them.
    fn bind(&self, rows: &[Row]) -> Result<Bound<T>> {
        let config = self.graphs.config();
        let (inputs, outputs) = (Stage::Step.inputs(config), Stage::Step.outputs(config));
        let (past, cross) = inputs[2..].split_at(2 * config.generator.depth);
        let graph = self.graphs.graph(Stage::Step)?;
        let memory = self.memory()?;
        let place = |tensors: Vec<Tensor<T>>| -> Result<Vec<Tensor<T>>> {
            let Some(memory) = memory else { return Ok(tensors) };
            tensors.iter().map(|tensor| memory.to_device(tensor)).collect()
        };
        let zeroed = past.iter().map(|info| zeros(info, rows.len())).collect::<Result<_>>()?;
        let cross_values = place(self.cross(cross, rows)?)?;
        let mut bound = Bound {
            token: zeros(&inputs[0], rows.len())?,
            position: zeros(&inputs[1], rows.len())?,
            z: zeros(&outputs[0], rows.len())?,
            names: [&inputs[0], &inputs[1]].map(|info| info.name.clone()),
            past: place(self.past(past, rows)?)?,
            present: place(zeroed)?,
            bindings: vec![],
        };
        for _ in 0..2 {
            let mut binding = graph.binding()?;
            let bind = || -> ort::Result<IoBinding> {
                binding.bind_input(&inputs[0].name, &bound.token)?;
                binding.bind_input(&inputs[1].name, &bound.position)?;
                for (info, value) in zip(past, &bound.past).chain(zip(cross, &cross_values)) {
                    binding.bind_input(&info.name, value)?;
                }
                binding.bind_output(&outputs[0].name, &mut bound.z)?;
                for (info, value) in zip(&outputs[1..], &mut bound.present) {
                    binding.bind_output(&info.name, value)?;
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

impl Class {
    /// This row of output `index`, which is a cache.
    fn output<T: Element>(&self, index: usize) -> Result<&[T]> {
        let (shape, values) = self.outputs[index].try_extract_tensor().map_err(failed("prefill"))?;
        Ok(row_of(values, self.row, shape[0] as usize))
    }

    /// Condition of the first token, `[D]`.
    fn z(&self) -> Result<Array1<f32>> {
        Ok(float_output::<Ix2>(&self.outputs[0])?.row(self.row).to_owned())
    }
}

impl Graphs {
    fn prefill(&self, labels: &[i64]) -> Result<Vec<Class>> {
        let sizes = Sizes::of_batch(labels.len());
        let outputs = Rc::new(self.run(Stage::Prefill, &[integer_input(labels)?.into()], &sizes)?);
        Ok((0..labels.len()).map(|row| Class { outputs: Rc::clone(&outputs), row }).collect())
    }
}

/// A tensor of zeros in the shape of an input or output, for a batch of `rows` rows.
fn zeros<T: Value>(info: &ValueInfo, rows: usize) -> Result<Tensor<T>> {
    let shape = info.shape(&Sizes::of_batch(rows));
    let mut tensor = Tensor::new(&Allocator::default(), shape).map_err(failed(&info.name))?;
    tensor.extract_tensor_mut().1.fill(T::default());
    Ok(tensor)
}

/// Row `row` of a tensor of `rows` rows.
fn row_of<T>(values: &[T], row: usize, rows: usize) -> &[T] {
    let length = values.len() / rows;
    &values[row * length..][..length]
}

/// Row `row` of a tensor of `rows` rows, mutable.
fn row_mut<T: Element>(tensor: &mut Tensor<T>, row: usize, rows: usize) -> &mut [T] {
    let values = tensor.extract_tensor_mut().1;
    let length = values.len() / rows;
    &mut values[row * length..][..length]
}

impl<T: Element> Session for OrtSession<'_, T> {
    fn arrange(&mut self, rows: &[Row]) -> Result<Array2<f32>> {
        self.classes.update(rows, |new| self.graphs.prefill(new))?;
        self.bound = Some(self.bind(rows)?);
        self.rows = rows.len();
        let new: Vec<&Row> = rows.iter().filter(|row| row.kept.is_none()).collect();
        let mut z = Array2::zeros((new.len(), self.graphs.config().generator.dim));
        for (row, mut z) in zip(new, z.rows_mut()) {
            let (class, blend) = self.classes.get(row.condition)?;
            z.assign(&class.z()?);
            if let Some((other, share)) = blend {
                zip(&mut z, &other.z()?).for_each(|(to, &other)| *to = lerp(*to, other, share));
            }
        }
        Ok(z)
    }

    fn step(&mut self, tokens: ArrayView2<f32>, positions: &[i64]) -> Result<Array2<f32>> {
        let bound = self.bound.as_mut().ok_or_else(|| Error::run("transformer step", "the batch has no rows"))?;
        zip(bound.token.extract_tensor_mut().1, tokens).for_each(|(to, &value)| *to = value);
        bound.position.extract_tensor_mut().1.copy_from_slice(positions);
        if let Some(Some(_)) = self.memory.get() {
            // ONNX Runtime copies an input to the device when it is bound.
            let ([token, position], binding) = (&bound.names, &mut bound.bindings[0]);
            let copied = binding.bind_input(token, &bound.token);
            let copied = copied.and_then(|()| binding.bind_input(position, &bound.position));
            copied.map_err(failed("transformer step"))?;
        }
        self.graphs.graph(Stage::Step)?.run_bound(&bound.bindings[0])?;
        bound.bindings.swap(0, 1);
        swap(&mut bound.past, &mut bound.present);
        let z = bound.z.extract_tensor().1.to_vec();
        Array2::from_shape_vec((self.rows, z.len() / self.rows), z).or_run("z")
    }
}
