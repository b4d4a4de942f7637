//! Trained parameters and the state of their optimizer.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use eqim::checkpoint::tensors::TensorFile;
use eqim::weights::Weights;
use eqim::{Error, Result};
use rayon::prelude::*;

/// Gradients by parameter name.
pub type Gradients = BTreeMap<String, Tensor>;

/// Metrics of a step, by name.
pub type Measures = BTreeMap<String, f64>;

/// Parameters with their optimizer moments and their exponential moving average.
#[derive(Debug)]
pub struct Learner {
    name: &'static str,
    parameters: BTreeMap<String, Parameter>,
    updates: usize,
}

#[derive(Debug)]
struct Parameter {
    value: Var,
    first_moment: Tensor,
    second_moment: Tensor,
    average: Tensor,
}

/// Settings of one step of AdamW (Loshchilov & Hutter 2019; PyTorch's `torch.optim.AdamW`).
pub struct Update<'a> {
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Decay rates of the moments.
    pub betas: [f64; 2],
    /// Weight decay of the parameters for which `decays` is true.
    pub weight_decay: f64,
    /// Whether weight decay applies to a parameter, from its name and number of axes.
    pub decays: &'a (dyn Fn(&str, usize) -> bool + Sync),
    /// Largest global norm of the gradients; gradients with a larger norm are scaled down to it.
    pub clip: Option<f64>,
    /// Decay rate of the moving average.
    pub average: f64,
}

const EPS: f64 = 1e-8;
// As in `torch.nn.utils.clip_grad_norm_`.
const CLIP_EPS: f64 = 1e-6;

impl Learner {
    /// A learner of these parameters on `device`, before the first update. The tensors of its state have the prefix
    /// `name`.
    ///
    /// # Errors
    /// If a Candle operation fails.
    pub fn new(
        name: &'static str,
        values: impl IntoIterator<Item = (String, Tensor)>,
        device: &Device,
    ) -> Result<Self> {
        let parameter = |(parameter, value): (String, Tensor)| {
            let value = value.to_device(device)?;
            let zeros = value.zeros_like()?;
            let value = Var::from_tensor(&value)?;
            let average = value.as_tensor().copy()?;
            Ok((parameter, Parameter { value, first_moment: zeros.clone(), second_moment: zeros, average }))
        };
        Ok(Self { name, parameters: values.into_iter().map(parameter).collect::<Result<_>>()?, updates: 0 })
    }

    /// The parameters as the weights of a model, tracked for gradients.
    ///
    /// # Errors
    /// If a Candle operation fails.
    pub fn weights(&self) -> Result<Weights> {
        let mut weights = Weights::default();
        for (name, parameter) in &self.parameters {
            weights.insert(name.clone(), parameter.value.as_tensor())?;
        }
        Ok(weights)
    }

    /// The moving averages of the parameters.
    ///
    /// # Errors
    /// If a Candle operation fails.
    pub fn average(&self) -> Result<Weights> {
        let mut weights = Weights::default();
        for (name, parameter) in &self.parameters {
            weights.insert(name.clone(), &parameter.average)?;
        }
        Ok(weights)
    }

    /// Whether the parameters are on a CPU.
    pub fn is_on_cpu(&self) -> bool {
        self.parameters.values().all(|parameter| parameter.value.device().is_cpu())
    }

    /// Differentiates a loss that is the weighted mean over `shards`, in at least `passes` passes. On a CPU, the shards
    /// of a pass run in parallel, at most one per core; on a GPU, a pass is one shard. The gradients of a pass are in
    /// memory at the same time. Returns the gradients and the weighted means of the metrics of the shards. The result
    /// depends neither on the number of cores nor on that of the passes.
    ///
    /// # Errors
    /// The errors of `loss`, or an error if Candle cannot differentiate it.
    pub fn differentiate<T: Sync>(
        &self,
        shards: &[(f64, T)],
        passes: usize,
        loss: impl Fn(&T) -> Result<Losses> + Sync,
    ) -> Result<(Gradients, Measures)> {
        let shard = |(weight, shard): &(f64, T)| {
            let losses = loss(shard)?;
            let mut gradients = (losses.total * *weight)?.backward()?;
            let mut taken = Gradients::new();
            for (name, parameter) in &self.parameters {
                if let Some(gradient) = gradients.remove(parameter.value.as_tensor()) {
                    taken.insert(name.clone(), gradient);
                }
            }
            let measure = |(name, value): (&'static str, Tensor)| {
                Ok((name.to_string(), weight * f64::from(value.to_scalar::<f32>()?)))
            };
            Ok((taken, losses.parts.into_iter().map(measure).collect::<Result<Measures>>()?))
        };
        let most = if self.is_on_cpu() { rayon::current_num_threads() } else { 1 };
        let at_once = shards.len().div_ceil(passes).clamp(1, most);
        let (mut gradients, mut measures) = (Gradients::new(), Measures::new());
        for pass in shards.chunks(at_once) {
            // One shard runs in this thread: work of a GPU is queued in order.
            let results: Vec<Result<_>> = match pass {
                [one] => vec![shard(one)],
                several => several.par_iter().map(shard).collect(),
            };
            for result in results {
                let (more, measured) = result?;
                for (name, gradient) in more {
                    let sum = match gradients.remove(&name) {
                        Some(sum) => (sum + gradient)?,
                        None => gradient,
                    };
                    gradients.insert(name, sum);
                }
                measured.into_iter().for_each(|(name, value)| *measures.entry(name).or_default() += value);
            }
        }
        Ok((gradients, measures))
    }

    /// Takes an optimizer step with `gradients`. Parameters without a gradient do not change. Returns the norm of the
    /// gradients before clipping.
    ///
    /// # Errors
    /// [`Error::run`] if the norm is not finite; the parameters are unchanged then.
    pub fn update(&mut self, gradients: &Gradients, update: &Update) -> Result<f64> {
        // One transfer from a GPU for all gradients.
        let squares = gradients.values().map(|gradient| Ok(gradient.sqr()?.sum_all()?)).collect::<Result<Vec<_>>>()?;
        let squares: Vec<f32> = if squares.is_empty() { vec![] } else { Tensor::stack(&squares, 0)?.to_vec1()? };
        let norm = squares.into_iter().map(f64::from).sum::<f64>().sqrt();
        if !norm.is_finite() {
            return Err(Error::run(
                "gradients",
                format!("their norm is {norm}, not finite: lower base_learning_rate, or set clip"),
            ));
        }
        let factor = update.clip.map_or(1.0, |clip| (clip / (norm + CLIP_EPS)).min(1.0));
        self.updates += 1;
        let [beta1, beta2] = update.betas;
        let bias1 = 1.0 - beta1.powi(self.updates as i32);
        let bias2 = 1.0 - beta2.powi(self.updates as i32);
        let change = |(name, parameter): (&String, &mut Parameter)| -> Result<()> {
            let value = parameter.value.as_tensor();
            if let Some(gradient) = gradients.get(name) {
                let gradient = (gradient * factor)?;
                let first = ((&parameter.first_moment * beta1)? + (&gradient * (1.0 - beta1))?)?;
                let second = ((&parameter.second_moment * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
                let spread = ((&second / bias2)?.sqrt()? + EPS)?;
                let change = ((&first * (update.learning_rate / bias1))? / spread)?;
                let decays = (update.decays)(name, value.rank());
                let decay = if decays { update.learning_rate * update.weight_decay } else { 0.0 };
                let new = ((value * (1.0 - decay))? - change)?;
                parameter.value.set(&new.detach())?;
                (parameter.first_moment, parameter.second_moment) = (first.detach(), second.detach());
            }
            let value = parameter.value.as_tensor();
            let average = ((&parameter.average * update.average)? + (value * (1.0 - update.average))?)?;
            parameter.average = average.detach();
            Ok(())
        };
        match self.is_on_cpu() {
            true => self.parameters.par_iter_mut().try_for_each(change)?,
            false => self.parameters.iter_mut().try_for_each(change)?,
        }
        Ok(norm)
    }

    /// Checks that the parameters, moments and averages are finite. A step can overflow although its gradients are finite.
    ///
    /// # Errors
    /// [`Error::run`] naming the tensor that is not finite.
    pub fn check(&self) -> Result<()> {
        for (name, tensor) in self.state() {
            if !is_finite(&tensor)? {
                let problem = "has a value that is not finite: lower base_learning_rate, or set clip";
                return Err(Error::run(format!("tensor {name}"), problem));
            }
        }
        Ok(())
    }

    /// All tensors to save in a checkpoint. Their names start with the name of the learner.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut tensors = vec![];
        for (name, parameter) in &self.parameters {
            let Parameter { value, first_moment, second_moment, average } = parameter;
            let kept = [
                ("value", value.as_tensor()),
                ("first_moment", first_moment),
                ("second_moment", second_moment),
                ("average", average),
            ];
            tensors.extend(kept.map(|(part, tensor)| (key(self.name, part, name), tensor.clone())));
        }
        tensors
    }

    /// Restores a [state](Learner::state) that was saved after `updates` updates.
    ///
    /// # Errors
    /// [`Error::input`] naming the tensor that is missing, not finite or of a wrong type or shape.
    pub fn restore(&mut self, file: &mut TensorFile, updates: usize) -> Result<()> {
        let name = self.name;
        for (parameter, kept) in &mut self.parameters {
            let like = kept.value.as_tensor().clone();
            let mut read = |part| stored(file, &key(name, part, parameter), &like);
            kept.value.set(&read("value")?)?;
            kept.first_moment = read("first_moment")?;
            kept.second_moment = read("second_moment")?;
            kept.average = read("average")?;
        }
        self.updates = updates;
        Ok(())
    }
}

/// Name of a tensor of a saved state.
fn key(learner: &str, part: &str, parameter: &str) -> String {
    format!("{learner}.{part}.{parameter}")
}

/// Reads a tensor with the type, the shape and the device of `like`.
fn stored(file: &mut TensorFile, name: &str, like: &Tensor) -> Result<Tensor> {
    let tensor = file.read(name)?;
    let bad = |problem: String| Error::input(file.path().display(), format!("tensor {name} {problem}"));
    if tensor.dtype() != like.dtype() || tensor.dims() != like.dims() {
        let (found, expected) = ((tensor.dtype(), tensor.dims()), (like.dtype(), like.dims()));
        return Err(bad(format!("is {found:?}, expected {expected:?}")));
    }
    if !is_finite(&tensor)? {
        return Err(bad("has a value that is not finite".into()));
    }
    Ok(tensor.to_device(like.device())?)
}

/// Whether all values of a tensor of `f32` are finite.
///
/// # Errors
/// If a Candle operation fails.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    // Zero times an infinite number is not a number.
    Ok((tensor * 0.0)?.sum_all()?.to_scalar::<f32>()? == 0.0)
}

/// Losses of one shard of a batch.
pub struct Losses {
    /// The loss to differentiate, a scalar.
    pub total: Tensor,
    /// Terms of the total, or other scalars to report, with their names.
    pub parts: Vec<(&'static str, Tensor)>,
}
