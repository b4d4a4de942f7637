//! Trained parameters and the state of their optimizer.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use candle_core::{Device, Tensor, Var};
use eqim::checkpoint::tensors::TensorFile;
use eqim::digest::Hash;
use eqim::weights::Weights;
use eqim::{Error, Result};
use rayon::prelude::*;

use crate::adamw::{Kept, Update};
use crate::ranks::Ranks;

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
    ranks: Rc<Ranks>,
}

#[derive(Debug)]
struct Parameter {
    value: Var,
    /// The rank that updates the parameter; without one, every rank does.
    owner: Option<usize>,
    /// What only ranks that update the parameter have.
    kept: Option<Kept>,
}

/// Values that are exchanged at a time.
const BUCKET: usize = 1 << 22;

impl Learner {
    /// A learner of these parameters on `device`, before the first update. The tensors of its state have the prefix
    /// `name`. All `ranks` have the same parameters. With `sharded`, each has the moments and averages of a part of them
    /// (Rajbhandari et al., ZeRO, SC 2020, stage 1).
    ///
    /// # Errors
    /// If a Candle operation fails.
    pub fn new(
        name: &'static str,
        values: impl IntoIterator<Item = (String, Tensor)>,
        device: &Device,
        ranks: Rc<Ranks>,
        sharded: bool,
    ) -> Result<Self> {
        let values: BTreeMap<String, Tensor> = values.into_iter().collect();
        // One rank has everything: nothing is brought or shared.
        let owners = if sharded && ranks.size() > 1 { owners(&values, ranks.size()) } else { BTreeMap::new() };
        let parameter = |(name, value): (String, Tensor)| {
            let value = Var::from_tensor(&value.to_device(device)?)?;
            let owner = owners.get(&name).copied();
            let kept = if owner.is_none_or(|owner| owner == ranks.rank()) { Some(Kept::new(&value)?) } else { None };
            Ok((name, Parameter { value, owner, kept }))
        };
        let parameters = values.into_iter().map(parameter).collect::<Result<_>>()?;
        Ok(Self { name, parameters, updates: 0, ranks })
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

    /// The moving averages of the parameters that this rank has: all of them, or after [`Learner::collect`] on the first
    /// rank.
    ///
    /// # Errors
    /// If a Candle operation fails.
    pub fn average(&self) -> Result<Weights> {
        let mut weights = Weights::default();
        for (name, parameter) in &self.parameters {
            if let Some(kept) = &parameter.kept {
                weights.insert(name.clone(), &kept.average)?;
            }
        }
        Ok(weights)
    }

    /// Hash of the names and values of the parameters.
    ///
    /// # Errors
    /// If a Candle operation fails.
    pub fn fingerprint(&self) -> Result<String> {
        hash(self.parameters.iter().map(|(name, parameter)| (name.as_str(), parameter.value.as_tensor())))
    }

    /// Brings the moments and averages of all parameters to the first rank. All ranks call it.
    ///
    /// # Errors
    /// [`Error::run`] if a rank does not answer.
    pub fn collect(&mut self) -> Result<()> {
        self.ranks.meet()?;
        for parameter in self.parameters.values_mut() {
            let Some(owner) = parameter.owner else { continue };
            let mut kept = match parameter.kept.take() {
                Some(kept) => kept,
                None if self.ranks.is_first() => Kept::new(&parameter.value)?,
                None => continue,
            };
            for tensor in [&mut kept.first_moment, &mut kept.second_moment, &mut kept.average] {
                let mut values = tensor.flatten_all()?.to_vec1()?;
                self.ranks.send_to_first(owner, &mut values);
                *tensor = Tensor::from_vec(values, tensor.dims(), tensor.device())?;
            }
            parameter.kept = Some(kept);
        }
        Ok(())
    }

    /// Drops on the first rank what [`Learner::collect`] brought there.
    pub fn release(&mut self) {
        let rank = self.ranks.rank();
        let others = |parameter: &&mut Parameter| parameter.owner.is_some_and(|owner| owner != rank);
        self.parameters.values_mut().filter(others).for_each(|parameter| parameter.kept = None);
    }

    /// Whether the parameters are on a CPU.
    pub fn is_on_cpu(&self) -> bool {
        self.parameters.values().all(|parameter| parameter.value.device().is_cpu())
    }

    /// Differentiates a loss that is the weighted mean over the shards of all ranks, in at least `passes` passes. `shards`
    /// are those of this rank. On a CPU, the shards of a pass run in parallel, at most one per core; on a GPU, a pass is one
    /// shard. The gradients of a pass are in memory at the same time. Returns the gradients of the parameters that this rank
    /// updates, and the weighted means of the metrics of all shards. The result depends neither on the number of cores nor
    /// on that of the passes, nor on that of the ranks if this is a power of two.
    ///
    /// # Errors
    /// The errors of `loss`, an error if Candle cannot differentiate it, or [`Error::run`] if a rank does not answer.
    pub fn differentiate<T: Sync>(
        &self,
        shards: &[(f64, T)],
        passes: usize,
        loss: impl Fn(&T) -> Result<Losses> + Sync,
    ) -> Result<(Gradients, Measures)> {
        let parameters = &self.parameters;
        let shard = |(weight, shard): &(f64, T)| {
            let losses = loss(shard)?;
            let mut gradients = (losses.total * *weight)?.backward()?;
            let mut taken = Gradients::new();
            for (name, parameter) in parameters {
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
        let mut measures = Measures::new();
        let (mut passes, mut ready) = (shards.chunks(at_once), VecDeque::new());
        let mut next = || {
            if ready.is_empty() {
                // One shard runs in this thread: work of a GPU is queued in order.
                let results: Vec<Result<_>> = match passes.next().unwrap_or_default() {
                    [one] => vec![shard(one)],
                    several => several.par_iter().map(shard).collect(),
                };
                ready.extend(results);
            }
            let (gradients, measured) =
                ready.pop_front().ok_or_else(|| Error::run("gradients", "a step has no shards"))??;
            measured.into_iter().for_each(|(name, value)| *measures.entry(name).or_default() += value);
            Ok(gradients)
        };
        let mut gradients = sum_in_pairs(shards.len(), &mut next)?;
        if self.ranks.size() > 1 {
            self.ranks.meet()?;
            let mut values: Vec<f64> = measures.values().copied().collect();
            self.ranks.sum_doubles(&mut values);
            measures.values_mut().zip(values).for_each(|(measure, sum)| *measure = sum);
            gradients = self.sum(gradients)?;
        }
        Ok((gradients, measures))
    }

    /// The sums of the gradients of all ranks, for the parameters that this rank updates.
    fn sum(&self, mut gradients: Gradients) -> Result<Gradients> {
        let mut sums = Gradients::new();
        for (owner, names) in self.buckets() {
            let own: Vec<(&str, Tensor)> =
                names.iter().filter_map(|&name| Some((name, gradients.remove(name)?))).collect();
            if own.is_empty() {
                continue;
            }
            let values = self.ranks.sum(&flat(own.iter().map(|(_, gradient)| gradient))?)?;
            if owner.is_none_or(|owner| owner == self.ranks.rank()) {
                let tensors = apart(&values, own.iter().map(|(_, gradient)| gradient))?;
                sums.extend(own.iter().map(|(name, _)| name.to_string()).zip(tensors));
            }
        }
        Ok(sums)
    }

    /// The parameters in groups of one owner, each of at most `BUCKET` values or of one parameter.
    fn buckets(&self) -> Vec<(Option<usize>, Vec<&str>)> {
        let mut by_owner = BTreeMap::<Option<usize>, Vec<(Vec<&str>, usize)>>::new();
        for (name, parameter) in &self.parameters {
            let (groups, count) = (by_owner.entry(parameter.owner).or_default(), parameter.value.elem_count());
            match groups.last_mut() {
                Some((names, filled)) if *filled + count <= BUCKET => {
                    names.push(name);
                    *filled += count;
                }
                _ => groups.push((vec![name], count)),
            }
        }
        let groups = |(owner, groups): (_, Vec<(Vec<_>, _)>)| groups.into_iter().map(move |(names, _)| (owner, names));
        by_owner.into_iter().flat_map(groups).collect()
    }

    /// Gives all ranks the new values of the parameters of each owner.
    fn share_values(&self) -> Result<()> {
        for (owner, names) in self.buckets() {
            let Some(owner) = owner else { continue };
            let tensors: Vec<&Tensor> = names.iter().map(|name| self.parameters[*name].value.as_tensor()).collect();
            let values = self.ranks.broadcast(owner, &flat(tensors.iter().copied())?)?;
            if owner != self.ranks.rank() {
                let new = apart(&values, tensors.iter().copied())?;
                names.iter().zip(new).try_for_each(|(name, new)| self.parameters[*name].value.set(&new))?;
            }
        }
        Ok(())
    }

    /// Takes an optimizer step with `gradients`, those of the parameters that this rank updates. Parameters without a
    /// gradient do not change. Returns the norm of the gradients of all parameters before clipping.
    ///
    /// # Errors
    /// [`Error::run`] if the norm is not finite, with the parameters unchanged, or if a rank does not answer.
    pub fn update(&mut self, gradients: &Gradients, update: &Update) -> Result<f64> {
        // One transfer from a GPU for all gradients.
        let squares = gradients.values().map(|gradient| Ok(gradient.sqr()?.sum_all()?)).collect::<Result<Vec<_>>>()?;
        let squares: Vec<f32> = if squares.is_empty() { vec![] } else { Tensor::stack(&squares, 0)?.to_vec1()? };
        let mut square = [squares.into_iter().map(f64::from).sum::<f64>()];
        let is_sharded = self.parameters.values().any(|parameter| parameter.owner.is_some());
        if is_sharded {
            self.ranks.sum_doubles(&mut square);
        }
        let norm = square[0].sqrt();
        if !norm.is_finite() {
            return Err(Error::run(
                "gradients",
                format!("their norm is {norm}, not finite: lower base_learning_rate, or set clip"),
            ));
        }
        let factor = update.clipping(norm);
        self.updates += 1;
        let count = self.updates;
        let change = |(name, Parameter { value, kept, .. }): (&String, &mut Parameter)| match kept {
            Some(kept) => kept.update((name, value), gradients.get(name), (update, factor, count)),
            None => Ok(()),
        };
        match self.is_on_cpu() {
            true => self.parameters.par_iter_mut().try_for_each(change)?,
            false => self.parameters.iter_mut().try_for_each(change)?,
        }
        if is_sharded {
            self.share_values()?;
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

    /// The tensors of this rank that belong in a checkpoint: all, or after [`Learner::collect`] on the first rank. Their names
    /// start with the name of the learner.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut tensors = vec![];
        for (name, Parameter { value, kept, .. }) in &self.parameters {
            let mut add = |part, tensor: &Tensor| tensors.push((key(self.name, part, name), tensor.clone()));
            add("value", value.as_tensor());
            if let Some(kept) = kept {
                add("first_moment", &kept.first_moment);
                add("second_moment", &kept.second_moment);
                add("average", &kept.average);
            }
        }
        tensors
    }

    /// Restores a [state](Learner::state) that was saved after `updates` updates.
    ///
    /// # Errors
    /// [`Error::input`] naming the tensor that is missing, not finite or of a wrong type or shape.
    pub fn restore(&mut self, file: &mut TensorFile, updates: usize) -> Result<()> {
        let name = self.name;
        for (parameter, Parameter { value, kept, .. }) in &mut self.parameters {
            let like = value.as_tensor().clone();
            let mut read = |part| stored(file, &key(name, part, parameter), &like);
            value.set(&read("value")?)?;
            if let Some(kept) = kept {
                kept.first_moment = read("first_moment")?;
                kept.second_moment = read("second_moment")?;
                kept.average = read("average")?;
            }
        }
        self.updates = updates;
        Ok(())
    }
}

/// The sum of the next `count` gradients. The first half of them is summed, then the second, then both: ranks that each sum
/// their share, and then with one another in the same way, get the same sum bit for bit.
fn sum_in_pairs(count: usize, next: &mut impl FnMut() -> Result<Gradients>) -> Result<Gradients> {
    if count <= 1 {
        return next();
    }
    let mut sum = sum_in_pairs(count / 2, next)?;
    for (name, gradient) in sum_in_pairs(count - count / 2, next)? {
        let both = match sum.remove(&name) {
            Some(first) => (first + gradient)?,
            None => gradient,
        };
        sum.insert(name, both);
    }
    Ok(sum)
}

/// Gives each parameter to one of `ranks`: the largest first, to the rank with the fewest values.
fn owners(values: &BTreeMap<String, Tensor>, ranks: usize) -> BTreeMap<String, usize> {
    let mut by_size: Vec<(&String, usize)> = values.iter().map(|(name, value)| (name, value.elem_count())).collect();
    by_size.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let mut filled = vec![0; ranks];
    let mut owners = BTreeMap::new();
    for (name, count) in by_size {
        let owner = (0..ranks).min_by_key(|&rank| filled[rank]).unwrap_or(0);
        filled[owner] += count;
        owners.insert(name.clone(), owner);
    }
    owners
}

/// A tensor `[count]` of the values of tensors, one after the other.
fn flat<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<Tensor> {
    let tensors = tensors.into_iter().map(|tensor| Ok(tensor.flatten_all()?)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&tensors, 0)?)
}

/// Divides `values [count]` among tensors of the shapes of `like`.
fn apart<'a>(values: &Tensor, like: impl IntoIterator<Item = &'a Tensor>) -> Result<Vec<Tensor>> {
    let mut start = 0;
    let mut tensors = vec![];
    for like in like {
        let count = like.elem_count();
        tensors.push(values.narrow(0, start, count)?.reshape(like.shape())?);
        start += count;
    }
    Ok(tensors)
}

/// Hash of the names and values of tensors.
///
/// # Errors
/// If a Candle operation fails.
pub fn hash<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>) -> Result<String> {
    let mut hash = Hash::default();
    for (name, tensor) in tensors {
        hash.add(name);
        hash.add_values(&tensor.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(hash.hex())
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
