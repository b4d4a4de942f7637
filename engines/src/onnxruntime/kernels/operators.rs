//! The kernels as operators of ONNX Runtime.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::available_parallelism;

use eqim::ops::function::{self, DOMAIN, DYNAMIC_LINEAR, FLOW_SOLVER, GROUP, LANES, TRANSFORMER_BLOCK};
use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput};
use ort::value::{DynTensorRef, PrimitiveTensorElementType, TensorElementType, ValueRefMut};

use super::block::{Block, BlockBuffers, BlockWeights, Outputs};
use super::flow::{Flow, FlowBuffers, Residual, Velocity};
use super::linear::{Buffers, Linear, Weight};
use super::residence::Residence;
use super::rows::Norm;
use super::team::{Shared, Team, Worker};

/// The kernels of `functions`, the functions that a graph calls. `threads` is the number of threads of the session; all
/// cores if it is not set.
///
/// # Errors
/// If a function has no kernel.
pub fn domain(functions: &[String], threads: Option<usize>) -> ort::Result<OperatorDomain> {
    let threads = threads.unwrap_or_else(|| available_parallelism().map_or(1, usize::from));
    let mut domain = OperatorDomain::new(DOMAIN)?;
    for name in functions {
        domain = match function::of_variant(name) {
            DYNAMIC_LINEAR => domain.add(Fused::<DynamicLinear>::new(name, threads))?,
            FLOW_SOLVER => domain.add(Fused::<FlowSolver>::new(name, threads))?,
            TRANSFORMER_BLOCK => domain.add(Fused::<TransformerBlock>::new(name, threads))?,
            _ => return Err(ort::Error::new(format!("has no kernel for {name}: export the bundle with this version"))),
        };
    }
    Ok(domain)
}

/// A function of the model that has a kernel.
trait Function: Sized + 'static {
    /// Number of outputs.
    const OUTPUTS: usize;
    /// The weights of one call in a graph.
    type Weights<'a>: Send;
    /// Memory that the calls of a function use in turn.
    type Buffers: Default + Send;

    /// Reads the weights of a call, which are its last inputs.
    fn weights<'a>(inputs: &mut Inputs<'a>) -> ort::Result<Self::Weights<'a>>;

    /// Computes the outputs of a call from its other inputs. Returns how often it read the weights.
    fn compute(
        inputs: &mut Inputs,
        weights: &Self::Weights<'_>,
        buffers: &mut Self::Buffers,
        node: &Node,
    ) -> ort::Result<usize>;

    /// The layers that take most of the time to read.
    fn layers<'w, 'a: 'w>(weights: &'w mut Self::Weights<'a>) -> Vec<&'w mut Linear<'a>>;
}

/// A function as an operator.
struct Fused<F: Function> {
    name: String,
    threads: usize,
    buffers: Arc<Mutex<F::Buffers>>,
    /// Number of calls in the graph so far.
    calls: AtomicUsize,
}

impl<F: Function> Fused<F> {
    fn new(name: &str, threads: usize) -> Self {
        Self { name: name.into(), threads, buffers: Arc::default(), calls: AtomicUsize::new(0) }
    }
}

/// A call of a function in a graph.
struct Call<'a, F: Function> {
    /// Number of inputs that are not weights.
    inputs: usize,
    threads: usize,
    weights: F::Weights<'a>,
    residence: Residence,
    buffers: Arc<Mutex<F::Buffers>>,
}

impl<F: Function> Kernel for Call<'_, F> {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let value = |index| {
            let value = context.input(index)?.ok_or_else(|| ort::Error::new(format!("input {index} is missing")))?;
            value.downcast()
        };
        let values: Vec<_> = (0..self.inputs).map(value).collect::<ort::Result<_>>()?;
        let mut inputs = Inputs { values: values.into_iter(), index: 0 };
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let node = Node { context, threads: self.threads };
        let reads = F::compute(&mut inputs, &self.weights, &mut buffers, &node)?;
        if self.residence.is_due(reads) {
            // SAFETY: the weights are dropped with the residence, and nothing else refers to them.
            unsafe { self.residence.settle(F::layers(&mut self.weights)) };
        }
        Ok(())
    }
}

impl<F: Function> Operator for Fused<F> {
    type Kernel<'attr> = Call<'attr, F>;

    fn name(&self) -> &str {
        &self.name
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::variadic(1)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        (0..F::OUTPUTS).map(|_| OperatorOutput::required(TensorElementType::Float32))
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Call<'attr, F>> {
        let count = context.inputs()?.len();
        let constants = (0..count).map(|index| context.constant_input(index)).skip_while(ort::Result::is_err);
        let constants: Vec<_> = constants.collect::<ort::Result<_>>()?;
        let first = count - constants.len();
        let mut inputs = Inputs { values: constants.into_iter(), index: first };
        let weights = F::weights(&mut inputs)?;
        if inputs.values.len() > 0 {
            return Err(ort::Error::new(format!(
                "has {} inputs too many: export the bundle again",
                inputs.values.len()
            )));
        }
        let residence = Residence::new(self.calls.fetch_add(1, Ordering::Relaxed));
        Ok(Call { inputs: first, threads: self.threads, weights, residence, buffers: Arc::clone(&self.buffers) })
    }
}

/// A node that is being computed.
struct Node<'a> {
    context: &'a ComputeContext,
    threads: usize,
}

impl Node<'_> {
    /// Runs `work` in all threads, each as one worker of a team.
    fn team(&self, work: impl Fn(&mut Worker) + Sync + Send) -> ort::Result<()> {
        let team = Team::new(self.threads);
        self.context.par_for(self.threads, self.threads, |_| work(&mut Worker::new(&team)))
    }

    /// Allocates an output.
    fn output<const N: usize>(&self, index: usize, shape: [usize; N]) -> ort::Result<ValueRefMut<'_>> {
        let output = self.context.output(index, shape)?;
        output.ok_or_else(|| ort::Error::new(format!("output {index} is missing")))
    }
}

/// Inputs of a node, which are read one after the other. Their values live for `'a`.
struct Inputs<'a> {
    values: std::vec::IntoIter<DynTensorRef<'a>>,
    /// Index of the next input.
    index: usize,
}

/// An input that the kernel does not have. It cannot occur in a graph that eqim exported.
fn unfit(index: usize, found: &[usize], expected: &str) -> ort::Error {
    ort::Error::new(format!("input {index} has shape {found:?}, expected {expected}: export the bundle again"))
}

/// The shape and elements of a tensor.
fn extract<'a, T: PrimitiveTensorElementType>(value: &DynTensorRef<'a>) -> ort::Result<(Vec<usize>, &'a [T])> {
    let (shape, elements) = value.try_extract_tensor::<T>()?;
    // SAFETY: the elements are those of the tensor, which lives for `'a`, and nothing writes inputs.
    let elements = unsafe { std::slice::from_raw_parts(elements.as_ptr(), elements.len()) };
    Ok((sizes(shape), elements))
}

impl<'a> Inputs<'a> {
    fn next(&mut self) -> ort::Result<(usize, DynTensorRef<'a>)> {
        let value = self.values.next();
        let value = value.ok_or_else(|| ort::Error::new("has too few inputs: export the bundle again"))?;
        self.index += 1;
        Ok((self.index - 1, value))
    }

    /// The next input, with the sizes of its `N` axes, none of which may be 0.
    fn tensor<const N: usize>(&mut self, axes: &str) -> ort::Result<([usize; N], &'a [f32])> {
        let (index, value) = self.next()?;
        let (shape, elements) = extract(&value)?;
        match shape.as_slice().try_into() {
            Ok(sizes) if !elements.is_empty() => Ok((sizes, elements)),
            _ => Err(unfit(index, &shape, axes)),
        }
    }

    /// The next input, which has to have this shape. Axes of size 1 do not count.
    fn shaped<T: PrimitiveTensorElementType>(&mut self, expected: &[usize]) -> ort::Result<&'a [T]> {
        let (index, value) = self.next()?;
        let (shape, elements) = extract(&value)?;
        let long = |shape: &[usize]| shape.iter().copied().filter(|&size| size != 1).collect::<Vec<_>>();
        if long(&shape) == long(expected) { Ok(elements) } else { Err(unfit(index, &shape, &format!("{expected:?}"))) }
    }

    /// Weight and bias of the next norm.
    fn norm(&mut self, width: usize) -> ort::Result<Norm<'a>> {
        Ok((self.shaped(&[width])?, self.shaped(&[width])?))
    }

    /// The next linear layer. Any numbers of inputs and outputs are accepted if they are `None`.
    fn linear(&mut self, inputs: Option<usize>, outputs: Option<usize>) -> ort::Result<Linear<'a>> {
        let (index, value) = self.next()?;
        let is_int8 = *value.data_type() == TensorElementType::Int8;
        let shape = sizes(value.shape());
        let found = match (is_int8, &shape[..]) {
            (true, &[blocks, groups, LANES, GROUP]) => Some([blocks * LANES, groups * GROUP]),
            (false, &[outputs, inputs]) => Some([outputs, inputs]),
            _ => None,
        };
        let fits =
            |found: usize, expected: Option<usize>| found > 0 && expected.is_none_or(|expected| found == expected);
        let Some([outputs, inputs]) = found.filter(|&[output, input]| fits(output, outputs) && fits(input, inputs))
        else {
            return Err(unfit(index, &shape, &format!("a weight of {outputs:?} outputs and {inputs:?} inputs")));
        };
        let weight = if is_int8 {
            let levels = extract(&value)?.1;
            Weight::Int8 { levels, sums: self.shaped(&[outputs])?, scales: self.shaped(&[outputs])? }
        } else {
            Weight::Float(extract(&value)?.1)
        };
        Ok(Linear { inputs, outputs, weight, bias: self.shaped(&[outputs])? })
    }
}

fn sizes(shape: &[i64]) -> Vec<usize> {
    shape.iter().map(|&size| size as usize).collect()
}

/// [`DYNAMIC_LINEAR`]
struct DynamicLinear;

impl Function for DynamicLinear {
    const OUTPUTS: usize = 1;
    type Weights<'a> = Linear<'a>;
    type Buffers = Buffers;

    fn weights<'a>(inputs: &mut Inputs<'a>) -> ort::Result<Linear<'a>> {
        inputs.linear(None, None)
    }

    fn compute(inputs: &mut Inputs, linear: &Linear<'_>, buffers: &mut Buffers, node: &Node) -> ort::Result<usize> {
        let ([rows, width], x) = inputs.tensor("[rows, inputs]")?;
        if width != linear.inputs {
            return Err(unfit(0, &[rows, width], &format!("{} columns", linear.inputs)));
        }
        let mut output = node.output(0, [rows, linear.outputs])?;
        let y = Shared::new(output.try_extract_tensor_mut::<f32>()?.1);
        let buffers = buffers.share(rows, width, linear.outputs);
        node.team(|worker| {
            linear.apply(
                worker,
                &buffers,
                |row, input| input.copy_from_slice(&x[row * width..(row + 1) * width]),
                |row, column, part| {
                    // SAFETY: every part writes only its own columns.
                    unsafe { y.columns_mut(row, linear.outputs, column, part.len()) }.copy_from_slice(part);
                },
            );
        })?;
        Ok(1)
    }

    fn layers<'w, 'a: 'w>(_linear: &'w mut Linear<'a>) -> Vec<&'w mut Linear<'a>> {
        // It runs on many rows, or once per image.
        vec![]
    }
}

/// [`FLOW_SOLVER`]
struct FlowSolver;

impl Function for FlowSolver {
    const OUTPUTS: usize = 1;
    type Weights<'a> = Velocity<'a>;
    type Buffers = FlowBuffers;

    fn weights<'a>(inputs: &mut Inputs<'a>) -> ort::Result<Velocity<'a>> {
        let input = inputs.linear(None, None)?;
        let width = Some(input.outputs);
        let mut blocks = vec![];
        // Every block has a norm of two inputs, and two layers. Only the last layer follows the blocks.
        while inputs.values.as_slice().get(2).is_some_and(|second| second.shape().len() > 1) {
            let (norm, first) = (inputs.norm(input.outputs)?, inputs.linear(width, width)?);
            blocks.push(Residual { norm, first, second: inputs.linear(width, width)? });
        }
        Ok(Velocity { input, blocks, output: inputs.linear(width, Some(input.inputs))? })
    }

    fn compute(
        inputs: &mut Inputs,
        weights: &Velocity<'_>,
        buffers: &mut FlowBuffers,
        node: &Node,
    ) -> ort::Result<usize> {
        let (embed, width) = (weights.input.inputs, weights.input.outputs);
        let mut modulations = vec![];
        let mut rows_of = [0; 2];
        for part in 0..=weights.blocks.len() {
            let vectors = if part < weights.blocks.len() { 3 } else { 2 };
            let (shape @ [evaluations, rows, found], values) = inputs.tensor("[evaluations, rows, width]")?;
            if found != vectors * width || (part > 0 && [evaluations, rows] != rows_of) {
                return Err(unfit(
                    part,
                    &shape,
                    &format!("modulations of {rows_of:?} and {} columns", vectors * width),
                ));
            }
            rows_of = [evaluations, rows];
            modulations.push(values);
        }
        let [evaluations, rows] = rows_of;
        let mut factors = || inputs.shaped(&[evaluations, 2]);
        let factors = [factors()?, factors()?, factors()?];
        let (shape @ [two, tokens, found], state) = inputs.tensor("[2, tokens, embed]")?;
        if two != 2 || found != embed || !(rows == tokens || rows == 2 * tokens) {
            return Err(unfit(modulations.len() + 3, &shape, &format!("[2, tokens, {embed}] for {rows} rows")));
        }
        let flow = Flow { weights, modulations, factors, guidance: inputs.shaped(&[tokens])? };
        let mut output = node.output(0, shape)?;
        let (_, output) = output.try_extract_tensor_mut::<f32>()?;
        output.copy_from_slice(state);
        let state = Shared::new(output);
        let buffers = buffers.share(tokens, rows, embed, width);
        node.team(|worker| flow.run(worker, &state, &buffers))?;
        Ok(evaluations)
    }

    fn layers<'w, 'a: 'w>(weights: &'w mut Velocity<'a>) -> Vec<&'w mut Linear<'a>> {
        let blocks = weights.blocks.iter_mut().flat_map(|block| [&mut block.first, &mut block.second]);
        [&mut weights.input].into_iter().chain(blocks).chain([&mut weights.output]).collect()
    }
}

/// [`TRANSFORMER_BLOCK`]
struct TransformerBlock;

impl Function for TransformerBlock {
    const OUTPUTS: usize = 3;
    type Weights<'a> = BlockWeights<'a>;
    type Buffers = BlockBuffers;

    fn weights<'a>(inputs: &mut Inputs<'a>) -> ort::Result<BlockWeights<'a>> {
        // The first norm tells the width.
        let width = inputs.values.as_slice().first().map_or(0, |norm| sizes(norm.shape()).iter().product());
        let (norm, dim) = (inputs.norm(width)?, Some(width));
        let (qkv, proj) = (inputs.linear(dim, Some(3 * width))?, inputs.linear(dim, dim)?);
        let (cross_norm, cross_q, cross_proj) =
            (inputs.norm(width)?, inputs.linear(dim, dim)?, inputs.linear(dim, dim)?);
        let (mlp_norm, fc1) = (inputs.norm(width)?, inputs.linear(dim, None)?);
        let fc2 = inputs.linear(Some(fc1.outputs), dim)?;
        Ok(BlockWeights { norm, qkv, proj, cross_norm, cross_q, cross_proj, mlp_norm, fc1, fc2 })
    }

    fn compute(
        inputs: &mut Inputs,
        weights: &BlockWeights<'_>,
        buffers: &mut BlockBuffers,
        node: &Node,
    ) -> ort::Result<usize> {
        let dim = weights.proj.outputs;
        let (shape @ [rows, found], x) = inputs.tensor("[rows, width]")?;
        let (cache @ [_, heads, window, head_dim], past_key) =
            inputs.tensor("[rows, heads, window, width of a head]")?;
        let past = [past_key, inputs.shaped(&cache)?];
        let (class, cross_key) = inputs.tensor::<4>("[rows, heads, tokens, width of a head]")?;
        let cross = [cross_key, inputs.shaped(&class)?];
        let fits = found == dim && heads * head_dim == dim && head_dim % 2 == 0;
        if !fits || cache[0] != rows || [class[0], class[1], class[3]] != [rows, heads, head_dim] {
            let problem = format!("has tokens {shape:?} and caches {cache:?} and {class:?}: export the bundle again");
            return Err(ort::Error::new(problem));
        }
        let half = [rows, head_dim / 2];
        let rope = [inputs.shaped(&half)?, inputs.shaped(&half)?];
        let block = Block { weights, heads, past, cross, rope, bias: inputs.shaped(&[rows, window + 1])? };

        let (mut next, mut key, mut value) = (node.output(0, shape)?, node.output(1, cache)?, node.output(2, cache)?);
        let next = next.try_extract_tensor_mut::<f32>()?.1;
        next.copy_from_slice(x);
        let outputs = Outputs {
            x: Shared::new(next),
            present: [Shared::new(key.try_extract_tensor_mut()?.1), Shared::new(value.try_extract_tensor_mut()?.1)],
        };
        let buffers = buffers.share(rows, dim, weights.fc1.outputs);
        node.team(|worker| block.run(worker, &outputs, &buffers))?;
        Ok(1)
    }

    fn layers<'w, 'a: 'w>(weights: &'w mut BlockWeights<'a>) -> Vec<&'w mut Linear<'a>> {
        let BlockWeights { qkv, proj, cross_q, cross_proj, fc1, fc2, .. } = weights;
        vec![qkv, proj, cross_q, cross_proj, fc1, fc2]
    }
}
