//! The primitives that the model is written in, and their interpreters.
//!
//! [`eager::Eager`] runs the primitives on Candle, [`cost::Cost`] counts their cost, and `eqim-export` lowers them to
//! ONNX. A primitive has the semantics of the ONNX operator, if there is one. Comments in the model's code write shapes
//! as `[batch, ...]`.

pub mod cost;
pub mod eager;
pub mod function;
pub mod kernels;

use crate::{Error, Result};

/// Size of one axis of a new shape.
#[derive(Debug)]
pub enum Dim<'a, T> {
    /// A size known from the configuration.
    Is(usize),
    /// The size of an axis of another tensor. It expresses sizes that are known only at run time, such as the batch or
    /// the tokens.
    Of(&'a T, usize),
    /// The size that the remaining elements give. At most one per shape, and only in [`Ops::reshape`].
    Rest,
}

impl<T> Clone for Dim<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Dim<'_, T> {}

/// An element-wise function of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unary {
    /// Cosine.
    Cos,
    /// Sine.
    Sin,
    /// x · sigmoid(x), also called swish.
    Silu,
    /// Exact GELU, x · (1 + erf(x / √2)) / 2.
    Gelu,
    /// Conversion of integers to floating-point numbers.
    ToFloat,
}

/// An element-wise function of two tensors, with broadcasting as in NumPy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    /// a + b
    Add,
    /// a - b
    Sub,
    /// a · b
    Mul,
}

/// The values that dropout applies to in training. Each kind has its own probability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// Attention weights after the softmax (`attn_dropout`).
    Attention,
    /// Results of attention and of the two layers of the MLP (`proj_dropout`).
    Projection,
}

/// A convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv {
    /// Channels of the input.
    pub input: usize,
    /// Channels of the output.
    pub output: usize,
    /// Size of the kernel along every axis.
    pub kernel: usize,
    /// Number of axes of the kernel, 1 or 2. They are the last axes of the input.
    pub spatial: usize,
    /// How the input is padded first.
    pub padding: Padding,
    /// Distance of two neighbouring places of the kernel, along every axis.
    pub stride: usize,
    /// Number of groups of channels that are convolved separately; `input` and `output` are multiples of it.
    pub groups: usize,
}

/// Padding of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// No padding.
    Valid,
    /// One mirrored element on both sides of every axis (see [`Ops::pad_reflect`]).
    Reflect,
    /// Zeros, so that the output has `size / stride` elements along an axis, rounded up. If their number is odd, the end
    /// has one more than the start (ONNX `auto_pad` `SAME_UPPER`).
    Same,
}

impl Conv {
    /// A convolution over two axes with stride 1, one group and no padding.
    pub fn new(input: usize, output: usize, kernel: usize) -> Self {
        Self { input, output, kernel, spatial: 2, padding: Padding::Valid, stride: 1, groups: 1 }
    }

    /// Shape of the weight, `[output, input / groups, kernel, …]`.
    pub fn weight_shape(self) -> Vec<usize> {
        let mut shape = vec![self.output, self.input / self.groups];
        shape.resize(2 + self.spatial, self.kernel);
        shape
    }

    /// The same convolution for an input that is already [padded by reflection](OpsExt::reflected).
    pub fn after_reflection(self) -> Self {
        match self.padding {
            Padding::Reflect => Self { padding: Padding::Valid, ..self },
            Padding::Valid | Padding::Same => self,
        }
    }

    /// Zeros before and after an axis of `size` elements, for [`Padding::Same`].
    pub fn same_padding(self, size: usize) -> (usize, usize) {
        let zeros = ((size.div_ceil(self.stride) - 1) * self.stride + self.kernel).saturating_sub(size);
        (zeros / 2, zeros - zeros / 2)
    }
}

/// Inputs of an iteration of a loop: the sequences' elements, and the state.
pub type Iteration<T> = (Vec<T>, T);

/// An interpreter of the model.
///
/// Weights are requested by their checkpoint name, relative to the open [scope](OpsExt::scope). The scoped name is also
/// the name of the ONNX node and of the row in the cost table. Model code never queries the shape of a tensor.
pub trait Ops: Sized {
    /// A tensor of the interpreter.
    type Tensor: Clone;

    /// A loop that is being run or recorded.
    type Loop;

    /// Opens a named scope inside the current one. Model code calls [`OpsExt::scope`] instead.
    fn enter(&mut self, name: &str);

    /// Closes the innermost scope.
    fn leave(&mut self);

    /// The weight `name` of the current scope.
    ///
    /// # Errors
    /// If the weights have no tensor of this name and shape.
    fn param(&mut self, name: &str, shape: &[usize]) -> Result<Self::Tensor>;

    /// A constant tensor.
    ///
    /// # Errors
    /// If the length of `data` does not match `shape`.
    fn constant(&mut self, shape: &[usize], data: &[f32]) -> Result<Self::Tensor>;

    /// The same elements in another shape (ONNX `Reshape`).
    ///
    /// # Errors
    /// If the sizes do not fit.
    fn reshape(&mut self, x: &Self::Tensor, shape: &[Dim<Self::Tensor>]) -> Result<Self::Tensor>;

    /// Repeats `x` to `shape` by broadcasting (ONNX `Expand`).
    ///
    /// # Errors
    /// If the sizes do not fit.
    fn expand(&mut self, x: &Self::Tensor, shape: &[Dim<Self::Tensor>]) -> Result<Self::Tensor>;

    /// Permutes the axes (ONNX `Transpose`).
    ///
    /// # Errors
    /// If `axes` is not a permutation.
    fn permute(&mut self, x: &Self::Tensor, axes: &[usize]) -> Result<Self::Tensor>;

    /// Elements `start..end` of an axis (ONNX `Slice`). As in NumPy, negative positions count from the end, and an
    /// `end` beyond the axis selects all remaining elements.
    ///
    /// # Errors
    /// If the range is outside of the axis.
    fn slice(&mut self, x: &Self::Tensor, axis: usize, start: i64, end: i64) -> Result<Self::Tensor>;

    /// Concatenates tensors along `axis` (ONNX `Concat`).
    ///
    /// # Errors
    /// If the other axes differ.
    fn concat(&mut self, xs: &[&Self::Tensor], axis: usize) -> Result<Self::Tensor>;

    /// Selects the rows `indices [batch]` (integers) of `table [n, ...]`; the result is `[batch, ...]` (ONNX `Gather`).
    ///
    /// # Errors
    /// If an index is out of range.
    fn gather(&mut self, table: &Self::Tensor, indices: &Self::Tensor) -> Result<Self::Tensor>;

    /// An element-wise function.
    ///
    /// # Errors
    /// If the interpreter fails.
    fn unary(&mut self, op: Unary, x: &Self::Tensor) -> Result<Self::Tensor>;

    /// An element-wise function of two tensors with broadcasting.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    fn binary(&mut self, op: Binary, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;

    /// Limits `x` to `low..=high` (ONNX `Clip`).
    ///
    /// # Errors
    /// If the interpreter fails.
    fn clamp(&mut self, x: &Self::Tensor, low: f32, high: f32) -> Result<Self::Tensor>;

    /// Mean over some axes, which are removed (ONNX `ReduceMean`).
    ///
    /// # Errors
    /// If an axis is out of range.
    fn mean(&mut self, x: &Self::Tensor, axes: &[usize]) -> Result<Self::Tensor>;

    /// Softmax over the last axis (ONNX `Softmax`).
    ///
    /// # Errors
    /// If the interpreter fails.
    fn softmax(&mut self, x: &Self::Tensor) -> Result<Self::Tensor>;

    /// Matrix product over the last two axes. The other axes are broadcast (ONNX `MatMul`).
    ///
    /// # Errors
    /// If the shapes do not fit.
    fn matmul(&mut self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;

    /// `x [rows, input] · weightᵀ + bias` (ONNX `Gemm` with `transB`). `weight [output, input]`, in PyTorch's layout,
    /// and `bias [output]` are in the current scope.
    ///
    /// # Errors
    /// Errors of [`Ops::param`], or if the shapes do not fit.
    fn gemm(&mut self, x: &Self::Tensor, input: usize, output: usize) -> Result<Self::Tensor>;

    /// Convolution (ONNX `Conv`). `weight` of the shape [`Conv::weight_shape`] and `bias [output]` are in the current
    /// scope.
    ///
    /// # Errors
    /// Errors of [`Ops::param`] and [`Ops::pad_reflect`], or if the shapes do not fit.
    fn conv(&mut self, x: &Self::Tensor, conv: Conv) -> Result<Self::Tensor>;

    /// Normalization over the last axis of `width` elements, with or without `(weight, bias)` (ONNX
    /// `LayerNormalization`).
    ///
    /// # Errors
    /// If the shapes do not fit.
    fn layer_normalization(
        &mut self,
        x: &Self::Tensor,
        affine: Option<(&Self::Tensor, &Self::Tensor)>,
        width: usize,
        eps: f32,
    ) -> Result<Self::Tensor>;

    /// Normalization of `x [batch, channels, height, width]` over groups of channels (ONNX `GroupNormalization`).
    ///
    /// # Errors
    /// If the shapes do not fit.
    fn group_normalization(
        &mut self,
        x: &Self::Tensor,
        affine: (&Self::Tensor, &Self::Tensor),
        groups: usize,
        eps: f32,
    ) -> Result<Self::Tensor>;

    /// Pads both sides of the last `spatial` axes of `x`, of rank `2 + spatial`, by one element. The values are
    /// mirrored without repeating the border (ONNX `Pad`, mode `reflect`).
    ///
    /// # Errors
    /// If an axis has fewer than two elements.
    fn pad_reflect(&mut self, x: &Self::Tensor, spatial: usize) -> Result<Self::Tensor>;

    /// x · (1 + scale) + shift, the modulation of adaptive layer norm (reference: `modulate`).
    ///
    /// # Errors
    /// If the shapes cannot be broadcast.
    fn modulate(&mut self, x: &Self::Tensor, shift: &Self::Tensor, scale: &Self::Tensor) -> Result<Self::Tensor>;

    /// x + gate · y, the residual of adaptive layer norm.
    ///
    /// # Errors
    /// If the shapes cannot be broadcast.
    fn gated_residual(&mut self, x: &Self::Tensor, gate: &Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor>;

    /// Rearranges channels `[batch, channels·fy·fx, rows, width]` as the pixels of larger patches,
    /// `[batch, channels, rows·fy, width·fx]` (ONNX `DepthToSpace`, mode `CRD`, which supports only square patches).
    ///
    /// # Errors
    /// If the sizes do not fit.
    fn pixel_shuffle(
        &mut self,
        x: &Self::Tensor,
        channels: usize,
        rows: usize,
        factors: (usize, usize),
    ) -> Result<Self::Tensor>;

    /// In training, sets random elements of `x` to zero; otherwise returns `x`.
    ///
    /// # Errors
    /// If the interpreter fails.
    fn dropout(&mut self, x: Self::Tensor, what: Dropped) -> Result<Self::Tensor>;

    /// Begins a function: a part of the model with a name, which a runtime can replace by one kernel (ONNX
    /// `FunctionProto`). Returns the inputs as its body sees them. The body uses no other tensors from outside, except
    /// weights. Model code calls [`OpsExt::function`] instead.
    ///
    /// # Errors
    /// If the interpreter fails.
    fn begin_function(&mut self, name: &str, inputs: &[&Self::Tensor]) -> Result<Vec<Self::Tensor>>;

    /// Ends the innermost function. Returns the outputs as the code after the function sees them.
    ///
    /// # Errors
    /// If the interpreter fails.
    fn end_function(&mut self, outputs: Vec<Self::Tensor>) -> Result<Vec<Self::Tensor>>;

    /// Begins a loop that updates `state` once for every index of the first axis of `sequences` (ONNX `Loop`). Model
    /// code calls [`OpsExt::fold`] instead.
    ///
    /// # Errors
    /// If the interpreter fails.
    fn begin_loop(&mut self, sequences: &[&Self::Tensor], state: &Self::Tensor) -> Result<Self::Loop>;

    /// Inputs of the next iteration: the sequences' elements and the state. `None` if all iterations are done. An
    /// interpreter that records the loop instead of running it returns only one iteration.
    ///
    /// # Errors
    /// If the interpreter fails.
    fn next_iteration(&mut self, open: &mut Self::Loop) -> Result<Option<Iteration<Self::Tensor>>>;

    /// Stores the state after an iteration.
    ///
    /// # Errors
    /// If the interpreter fails.
    fn end_iteration(&mut self, open: &mut Self::Loop, state: Self::Tensor) -> Result<()>;

    /// Ends a loop. Returns the last state.
    ///
    /// # Errors
    /// If the interpreter fails.
    fn end_loop(&mut self, open: Self::Loop) -> Result<Self::Tensor>;
}

/// Operations that are composed of primitives and are the same for every interpreter.
pub trait OpsExt: Ops {
    /// Runs `body` inside the scope `name`. Names of nested scopes are joined by dots, as PyTorch joins module names.
    /// The name is added to an error of `body`.
    ///
    /// # Errors
    /// Errors of `body`.
    fn scope<R>(&mut self, name: &str, body: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        self.enter(name);
        let result = body(self);
        self.leave();
        result.map_err(|error| error.in_scope(name))
    }

    /// Runs `body` as the function `name`. It receives the inputs and returns the outputs.
    ///
    /// # Errors
    /// Errors of `body`.
    fn function<const OUTPUTS: usize>(
        &mut self,
        name: &str,
        inputs: &[&Self::Tensor],
        body: impl FnOnce(&mut Self, &[Self::Tensor]) -> Result<[Self::Tensor; OUTPUTS]>,
    ) -> Result<[Self::Tensor; OUTPUTS]> {
        let inputs = self.begin_function(name, inputs)?;
        let outputs = body(self, &inputs)?;
        let outputs = self.end_function(outputs.into())?;
        outputs.try_into().map_err(|_| Error::run(name, format!("expected {OUTPUTS} outputs")))
    }

    /// Calls `body` once for every index `i` of the first axis of `sequences`. Each call receives the `i`-th elements
    /// and the state, and returns the next state. Returns the last state.
    ///
    /// # Errors
    /// Errors of `body`.
    fn fold(
        &mut self,
        sequences: &[&Self::Tensor],
        state: &Self::Tensor,
        mut body: impl FnMut(&mut Self, &[Self::Tensor], &Self::Tensor) -> Result<Self::Tensor>,
    ) -> Result<Self::Tensor> {
        let mut open = self.begin_loop(sequences, state)?;
        while let Some((now, state)) = self.next_iteration(&mut open)? {
            let next = body(self, &now, &state)?;
            self.end_iteration(&mut open, next)?;
        }
        self.end_loop(open)
    }

    /// a + b
    ///
    /// # Errors
    /// Errors of [`Ops::binary`].
    fn add(&mut self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor> {
        self.binary(Binary::Add, a, b)
    }

    /// a - b
    ///
    /// # Errors
    /// Errors of [`Ops::binary`].
    fn sub(&mut self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor> {
        self.binary(Binary::Sub, a, b)
    }

    /// a · b
    ///
    /// # Errors
    /// Errors of [`Ops::binary`].
    fn mul(&mut self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor> {
        self.binary(Binary::Mul, a, b)
    }

    /// Multiplies `x` by a number.
    ///
    /// # Errors
    /// Errors of [`Ops::binary`].
    fn scale(&mut self, x: &Self::Tensor, factor: f32) -> Result<Self::Tensor> {
        let factor = self.constant(&[], &[factor])?;
        self.mul(x, &factor)
    }

    /// Applies the module `nn.Linear(input, output)` named `name` to `x [rows, input]`.
    ///
    /// # Errors
    /// Errors of [`Ops::gemm`].
    fn linear(&mut self, name: &str, x: &Self::Tensor, input: usize, output: usize) -> Result<Self::Tensor> {
        self.scope(name, |o| o.gemm(x, input, output))
    }

    /// Applies the module `nn.LayerNorm(width, eps)` named `name`.
    ///
    /// # Errors
    /// Errors of [`Ops::param`] and [`Ops::layer_normalization`].
    fn layer_norm(&mut self, name: &str, x: &Self::Tensor, width: usize, eps: f32) -> Result<Self::Tensor> {
        self.scope(name, |o| {
            let weight = o.param("weight", &[width])?;
            let bias = o.param("bias", &[width])?;
            o.layer_normalization(x, Some((&weight, &bias)), width, eps)
        })
    }

    /// Applies the module `nn.GroupNorm(groups, channels, eps)` named `name`.
    ///
    /// # Errors
    /// Errors of [`Ops::param`] and [`Ops::group_normalization`].
    fn group_norm(
        &mut self,
        name: &str,
        x: &Self::Tensor,
        channels: usize,
        groups: usize,
        eps: f32,
    ) -> Result<Self::Tensor> {
        self.scope(name, |o| {
            let weight = o.param("weight", &[channels])?;
            let bias = o.param("bias", &[channels])?;
            o.group_normalization(x, (&weight, &bias), groups, eps)
        })
    }

    /// `x`, padded by reflection if `conv` asks for it.
    ///
    /// # Errors
    /// Errors of [`Ops::pad_reflect`].
    fn reflected(&mut self, x: &Self::Tensor, conv: Conv) -> Result<Self::Tensor> {
        match conv.padding {
            Padding::Reflect => self.pad_reflect(x, conv.spatial),
            Padding::Valid | Padding::Same => Ok(x.clone()),
        }
    }

    /// Applies the module `nn.Conv1d(input, output, 3, padding=1, padding_mode="reflect")` named `name`.
    ///
    /// # Errors
    /// Errors of [`Ops::conv`].
    fn conv1d(&mut self, name: &str, x: &Self::Tensor, input: usize, output: usize) -> Result<Self::Tensor> {
        self.scope(name, |o| o.conv(x, Conv { spatial: 1, padding: Padding::Reflect, ..Conv::new(input, output, 3) }))
    }

    /// Applies the module `nn.Conv2d(input, output, 3, padding=1, padding_mode="reflect")` named `name`.
    ///
    /// # Errors
    /// Errors of [`Ops::conv`].
    fn conv2d(&mut self, name: &str, x: &Self::Tensor, input: usize, output: usize) -> Result<Self::Tensor> {
        self.scope(name, |o| o.conv(x, Conv { padding: Padding::Reflect, ..Conv::new(input, output, 3) }))
    }

    /// Applies the module `nn.Conv2d(input, output, 1)` named `name`.
    ///
    /// # Errors
    /// Errors of [`Ops::conv`].
    fn conv1x1(&mut self, name: &str, x: &Self::Tensor, input: usize, output: usize) -> Result<Self::Tensor> {
        self.scope(name, |o| o.conv(x, Conv::new(input, output, 1)))
    }

    /// Softmax attention of queries `q [b, h, n, d]` to keys `k` and values `v`, `[b, h, m, d]`. The scores
    /// `[b, h, n, m]` are scaled by `d^-0.5`, then `bias` is added.
    ///
    /// # Errors
    /// Errors of the primitives.
    fn attention(
        &mut self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        bias: Option<&Self::Tensor>,
        head_dim: usize,
    ) -> Result<Self::Tensor> {
        let q = self.scale(q, (head_dim as f32).powf(-0.5))?;
        let k = self.permute(k, &[0, 1, 3, 2])?;
        let mut scores = self.matmul(&q, &k)?;
        if let Some(bias) = bias {
            scores = self.add(&scores, bias)?;
        }
        let weights = self.softmax(&scores)?;
        let weights = self.dropout(weights, Dropped::Attention)?;
        self.matmul(&weights, v)
    }
}

impl<O: Ops> OpsExt for O {}

/// Computes [`Ops::pixel_shuffle`] with [`Ops::reshape`] and [`Ops::permute`], for interpreters that have no operator
/// for it.
///
/// # Errors
/// If the sizes do not fit.
pub fn shuffle_by_transpose<O: Ops>(
    o: &mut O,
    x: &O::Tensor,
    channels: usize,
    rows: usize,
    (fy, fx): (usize, usize),
) -> Result<O::Tensor> {
    let shape = [Dim::Of(x, 0), Dim::Is(channels), Dim::Is(fy), Dim::Is(fx), Dim::Is(rows), Dim::Rest];
    let x = o.reshape(x, &shape)?;
    let x = o.permute(&x, &[0, 1, 4, 2, 5, 3])?;
    o.reshape(&x, &[Dim::Of(&x, 0), Dim::Is(channels), Dim::Is(rows * fy), Dim::Rest])
}

/// Computes [`Ops::modulate`] with [`Ops::binary`], for interpreters that have no operator for it.
///
/// # Errors
/// If the shapes cannot be broadcast.
pub fn modulate_by_parts<O: Ops>(o: &mut O, x: &O::Tensor, shift: &O::Tensor, scale: &O::Tensor) -> Result<O::Tensor> {
    let one = o.constant(&[], &[1.0])?;
    let scale = o.add(scale, &one)?;
    let x = o.mul(x, &scale)?;
    o.add(&x, shift)
}

/// Computes [`Ops::gated_residual`] with [`Ops::binary`], for interpreters that have no operator for it.
///
/// # Errors
/// If the shapes cannot be broadcast.
pub fn residual_by_parts<O: Ops>(o: &mut O, x: &O::Tensor, gate: &O::Tensor, y: &O::Tensor) -> Result<O::Tensor> {
    let y = o.mul(gate, y)?;
    o.add(x, &y)
}

/// The full name of `name` in nested scopes. The names are joined by dots, as PyTorch joins module names.
pub fn scoped(scope: &[String], name: &str) -> String {
    let mut full = scope.join(".");
    if !full.is_empty() {
        full.push('.');
    }
    full + name
}

/// Index of a position along an axis of `length` elements. A negative position counts from the end.
fn position(at: i64, length: usize) -> usize {
    let length = length as i64;
    if at < 0 { (length + at).max(0) as usize } else { at.min(length) as usize }
}
