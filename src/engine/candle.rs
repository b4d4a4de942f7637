//! The engine that runs the model on Candle. It needs no native library, and the other engines are compared with it.

use candle_core::{DType, Device, Tensor};
use ndarray::{Array, Array2, Array3, Array4, ArrayView, ArrayView2, ArrayView3, ArrayView4, Dimension};

use crate::engine::{Engine, PrefillCache, Row, Session};
use crate::model::Stage;
use crate::ops::eager::Eager;
use crate::request::solver::Tableau;
use crate::weights::Weights;
use crate::{Config, Error, Result, ResultExt};

/// A backend that runs a model's stages on Candle tensors.
pub trait Runner {
    /// Name of the backend, for display.
    fn name(&self) -> &str;

    /// Runs a stage, as [`Stage::run`] does.
    ///
    /// # Errors
    /// Errors of the interpreter.
    fn run(&self, config: &Config, stage: Stage, inputs: &[Tensor]) -> Result<Vec<Tensor>>;
}

impl Runner for Weights {
    fn name(&self) -> &str {
        if self.device().is_cuda() { "Candle on a GPU" } else { "Candle" }
    }

    fn run(&self, config: &Config, stage: Stage, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let device = self.device();
        let inputs = inputs.iter().map(|input| input.to_device(&device)).collect::<candle_core::Result<Vec<_>>>()?;
        stage.run(&mut Eager::new(self), config, &inputs)
    }
}

/// Opens a device of Candle: `cpu`, or `cuda:N` for GPU N if eqim was built with the feature `cuda`.
///
/// # Errors
/// An [`Error::setting`] of `device` if the name is another one, or if the GPU cannot be used.
pub fn open_device(name: &str) -> Result<Device> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let bad = |problem: &str| Error::setting("device", format!("is {name}, {problem}"));
    let number = name.strip_prefix("cuda:").and_then(|number| number.parse().ok());
    let number = number.ok_or_else(|| bad("expected cpu, or cuda:N for GPU N, from 0"))?;
    // One stream for all threads. Candle's default is a stream per thread, and nothing orders the work of two of them.
    let device = Device::new_cuda_with_stream(number).map_err(|error| match error {
        candle_core::Error::NotCompiledWithCudaSupport => bad("expected cpu: this build is without the feature cuda"),
        error => bad("which cannot be used").because(error),
    })?;
    #[cfg(feature = "cuda")]
    super::cuda::configure(&device).map_err(|error| bad("which cannot be used").because(error))?;
    Ok(device)
}

/// An engine that runs the stages with a [`Runner`].
#[derive(Debug)]
pub struct StageEngine<R> {
    config: Config,
    runner: R,
}

/// A model on Candle, in FP32, on the device of its weights.
pub type CandleEngine = StageEngine<Weights>;

impl<R: Runner> StageEngine<R> {
    /// Creates an engine. The weights must be those of `config`, as [`crate::checkpoint`] loads them.
    pub fn new(config: Config, runner: R) -> Self {
        Self { config, runner }
    }

    /// Runs a stage, as [`Stage::run`] does.
    ///
    /// # Errors
    /// Errors of the interpreter.
    pub fn run(&self, stage: Stage, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.runner.run(&self.config, stage, inputs)
    }

    /// Runs a stage that has one output.
    fn run_one<D: Dimension>(&self, stage: Stage, inputs: &[Tensor]) -> Result<Array<f32, D>> {
        to_array(&first(stage, &mut self.run(stage, inputs)?)?)
    }
}

impl StageEngine<Weights> {
    /// The model's weights.
    pub fn weights(&self) -> &Weights {
        &self.runner
    }
}

/// Removes and returns the first output.
fn first(stage: Stage, outputs: &mut Vec<Tensor>) -> Result<Tensor> {
    if outputs.is_empty() {
        return Err(Error::run(stage.name(), "gave no output"));
    }
    Ok(outputs.remove(0))
}

/// Converts an array to a Candle tensor on the CPU.
///
/// # Errors
/// If Candle rejects the shape.
pub fn to_tensor<D: Dimension>(array: ArrayView<f32, D>) -> Result<Tensor> {
    let values: Vec<f32> = array.iter().copied().collect();
    Ok(Tensor::from_vec(values, array.shape(), &Device::Cpu)?)
}

/// Converts a Candle tensor to an array with the same number of axes.
///
/// # Errors
/// If the tensor does not have the array's number of axes or is not of `f32`.
pub fn to_array<D: Dimension>(tensor: &Tensor) -> Result<Array<f32, D>> {
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    let array = Array::from_shape_vec(tensor.dims().to_vec(), values).and_then(Array::into_dimensionality);
    array.or_run("tensor")
}

/// The times `[S]` and the updates `[S, 2, 3]` of a solver as Candle tensors on the CPU.
///
/// # Errors
/// If Candle rejects the shapes.
pub fn tableau_tensors(tableau: &Tableau) -> Result<[Tensor; 2]> {
    let evaluations = tableau.evaluations();
    let times = Tensor::from_slice(&tableau.times, evaluations, &Device::Cpu)?;
    Ok([times, Tensor::from_slice(&tableau.updates, (evaluations, 2, 3), &Device::Cpu)?])
}

/// Integers `[rows]` as a Candle tensor.
fn integers(values: &[i64]) -> Result<Tensor> {
    Ok(Tensor::from_slice(values, values.len(), &Device::Cpu)?)
}

impl<R: Runner> Engine for StageEngine<R> {
    fn config(&self) -> &Config {
        &self.config
    }

    fn name(&self) -> &str {
        self.runner.name()
    }

    fn session(&self) -> Result<Box<dyn Session + '_>> {
        Ok(Box::new(StageSession { engine: self, classes: PrefillCache::default(), past: vec![], cross: vec![] }))
    }

    fn sample(
        &self,
        z: ArrayView2<f32>,
        noise: ArrayView2<f32>,
        guidance: &[f32],
        tableau: &Tableau,
    ) -> Result<Array2<f32>> {
        let guidance = Tensor::from_slice(guidance, guidance.len(), &Device::Cpu)?;
        let [times, updates] = tableau_tensors(tableau)?;
        self.run_one(Stage::Flow, &[to_tensor(z)?, to_tensor(noise)?, guidance, times, updates])
    }

    fn decode(&self, latents: ArrayView3<f32>) -> Result<Array4<f32>> {
        self.run_one(Stage::Decoder, &[to_tensor(latents)?])
    }

    fn encode(&self, images: ArrayView4<f32>) -> Result<Array3<f32>> {
        self.run_one(Stage::Encoder, &[to_tensor(images)?])
    }
}

struct StageSession<'a, R> {
    engine: &'a StageEngine<R>,
    /// The prefill's outputs for each label.
    classes: PrefillCache<Vec<Tensor>>,
    past: Vec<Tensor>,
    cross: Vec<Tensor>,
}

/// Splits the outputs of a stage by rows.
fn by_row(outputs: &[Tensor], rows: usize) -> Result<Vec<Vec<Tensor>>> {
    let row = |row| outputs.iter().map(|output| Ok(output.narrow(0, row, 1)?.copy()?)).collect();
    (0..rows).map(row).collect()
}

/// Output `index` of the prefill for one class, or the mix of two classes by the share of the second.
fn mixed(known: (&Vec<Tensor>, Option<(&Vec<Tensor>, f32)>), index: usize) -> candle_core::Result<Tensor> {
    match known {
        (one, None) => Ok(one[index].clone()),
        (one, Some((other, share))) => &one[index] + ((&other[index] - &one[index])? * f64::from(share))?,
    }
}

impl<R: Runner> Session for StageSession<'_, R> {
    fn arrange(&mut self, rows: &[Row]) -> Result<Array2<f32>> {
        let engine = self.engine;
        let g = &engine.config.generator;
        self.classes.update(rows, |new| by_row(&engine.run(Stage::Prefill, &[integers(new)?])?, new.len()))?;
        let past = |cache: usize| {
            let row = |row: &Row| match row.kept {
                Some(kept) => Ok(self.past[cache].narrow(0, kept, 1)?),
                None => {
                    let (known, _) = self.classes.get(row.condition)?;
                    Ok(Tensor::zeros((1, g.heads, g.window, g.head_dim()), DType::F32, known[0].device())?)
                }
            };
            Ok(Tensor::cat(&rows.iter().map(row).collect::<Result<Vec<_>>>()?, 0)?)
        };
        let output = |index: usize, rows: &[Row]| {
            let row = |row: &Row| Ok(mixed(self.classes.get(row.condition)?, index)?);
            Ok(Tensor::cat(&rows.iter().map(row).collect::<Result<Vec<_>>>()?, 0)?)
        };
        let caches = 2 * g.depth;
        let past = (0..caches).map(past).collect::<Result<_>>()?;
        let cross = (1..=caches).map(|index| output(index, rows)).collect::<Result<_>>()?;
        let new: Vec<Row> = rows.iter().copied().filter(|row| row.kept.is_none()).collect();
        let z = if new.is_empty() { Array2::zeros((0, g.dim)) } else { to_array(&output(0, &new)?)? };
        (self.past, self.cross) = (past, cross);
        Ok(z)
    }

    fn step(&mut self, tokens: ArrayView2<f32>, positions: &[i64]) -> Result<Array2<f32>> {
        let inputs = [vec![to_tensor(tokens)?, integers(positions)?], self.past.clone(), self.cross.clone()].concat();
        let mut present = self.engine.run(Stage::Step, &inputs)?;
        let z = first(Stage::Step, &mut present)?;
        self.past = present;
        to_array(&z)
    }
}
