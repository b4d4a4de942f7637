//! The primitives that the model is written in, and their interpreters.
//!
//! [`eager::Eager`] runs them on Candle, [`cost::Cost`] counts them, `eqim-export` lowers them to ONNX. Where an operator
//! of ONNX exists, a primitive means what that operator means; shapes are written `[batch, ...]` in the model's code.

pub mod cost;
pub mod eager;
pub mod kernels;

use crate::Result;

/// Size of one axis of a new shape.
#[derive(Debug)]
pub enum Dim<'a, T> {
    /// A size known from the configuration.
    Is(usize),
    /// The size of an axis of another tensor: how symbolic sizes (the batch, the tokens) are named.
    Of(&'a T, usize),
    /// What remains of the elements; at most once in a shape, and in [`Ops::reshape`] only.
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
    /// Integers as floating-point numbers.
    ToFloat,
}

/// An element-wise function of two tensors, broadcast as NumPy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    /// a + b
    Add,
    /// a - b
    Sub,
    /// a · b
    Mul,
}

/// What dropout works on while the model is trained; each kind has its own probability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// Weights of attention, after the softmax (`attn_dropout`).
    Attention,
    /// Results of attention and of the MLP's two layers (`proj_dropout`).
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
    /// Axes that it runs over: the last ones, 1 or 2.
    pub spatial: usize,
    /// Whether the input is mirrored at its borders first (see [`Ops::pad_reflect`]).
    pub reflect: bool,
}

impl Conv {
    /// Shape of its weight, `[output, input, kernel, …]`.
    pub fn weight_shape(self) -> Vec<usize> {
        let mut shape = vec![self.output, self.input];
        shape.resize(2 + self.spatial, self.kernel);
        shape
    }

    /// The same convolution of an input that is mirrored already.
    pub fn unpadded(self) -> Self {
        Self { reflect: false, ..self }
    }
}

/// What an iteration of a loop works on: the sequences' elements, and the state.
pub type Iteration<T> = (Vec<T>, T);

/// An interpreter of the model.
///
/// Weights are asked for by their checkpoint name, relative to the [scope](OpsExt::scope) that is open; the same scoped name
/// becomes the ONNX node's name and the row of the cost table. Model code never asks a tensor for its shape.
pub trait Ops: Sized {
    /// A value of the model.
    type Tensor: Clone;

    /// A loop that is being run or written.
    type Loop;

    /// Opens a named scope inside the current one. Model code calls [`OpsExt::scope`].
    fn enter(&mut self, name: &str);

    /// Closes the innermost scope.
    fn leave(&mut self);

    /// The weight `name` of the current scope.
    ///
    /// # Errors
    /// When the weights have no tensor of that name and shape.
    fn param(&mut self, name: &str, shape: &[usize]) -> Result<Self::Tensor>;

    /// A tensor of known values.
    ///
    /// # Errors
    /// When `data` is not as long as `shape` says.
    fn constant(&mut self, shape: &[usize], data: &[f32]) -> Result<Self::Tensor>;

    /// The same elements in another shape (ONNX `Reshape`).
    ///
    /// # Errors
    /// When the sizes do not fit.
    fn reshape(&mut self, x: &Self::Tensor, shape: &[Dim<Self::Tensor>]) -> Result<Self::Tensor>;

    /// `x` repeated to `shape` by broadcasting (ONNX `Expand`).
    ///
    /// # Errors
    /// When the sizes do not fit.
    fn expand(&mut self, x: &Self::Tensor, shape: &[Dim<Self::Tensor>]) -> Result<Self::Tensor>;

    /// Axes in another order (ONNX `Transpose`).
    ///
    /// # Errors
    /// When `axes` is not a permutation.
    fn permute(&mut self, x: &Self::Tensor, axes: &[usize]) -> Result<Self::Tensor>;

    /// Elements `start..end` of an axis; as in NumPy, negative positions count from the end and a large `end` means
    /// all of the rest (ONNX `Slice`).
    ///
    /// # Errors
    /// When the range lies outside.
    fn slice(&mut self, x: &Self::Tensor, axis: usize, start: i64, end: i64) -> Result<Self::Tensor>;

    /// Tensors one after another along `axis` (ONNX `Concat`).
    ///
    /// # Errors
    /// When other axes differ.
    fn concat(&mut self, xs: &[&Self::Tensor], axis: usize) -> Result<Self::Tensor>;

    /// Rows of `table [n, ...]` by `indices [batch]` of integers, `[batch, ...]` (ONNX `Gather`).
    ///
    /// # Errors
    /// When an index lies outside.
    fn gather(&mut self, table: &Self::Tensor, indices: &Self::Tensor) -> Result<Self::Tensor>;

    /// An element-wise function.
    ///
    /// # Errors
    /// When the interpreter refuses.
    fn unary(&mut self, op: Unary, x: &Self::Tensor) -> Result<Self::Tensor>;

    /// An element-wise function of two tensors with broadcasting.
    ///
    /// # Errors
    /// When the shapes do not broadcast.
    fn binary(&mut self, op: Binary, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;

    /// `x` limited to `low..=high` (ONNX `Clip`).
    ///
    /// # Errors
    /// When the interpreter refuses.
    fn clamp(&mut self, x: &Self::Tensor, low: f32, high: f32) -> Result<Self::Tensor>;

    /// Mean over some axes, which disappear (ONNX `ReduceMean`).
    ///
    /// # Errors
    /// When an axis lies outside.
    fn mean(&mut self, x: &Self::Tensor, axes: &[usize]) -> Result<Self::Tensor>;

    /// Softmax over the last axis (ONNX `Softmax`).
    ///
    /// # Errors
    /// When the interpreter refuses.
    fn softmax(&mut self, x: &Self::Tensor) -> Result<Self::Tensor>;

    /// Matrix product of the last two axes, the others broadcast (ONNX `MatMul`).
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn matmul(&mut self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;

    /// `x [rows, input] · weightᵀ + bias` (ONNX `Gemm` with `transB`), with the current scope's `weight [output, input]`, as
    /// PyTorch stores it, and its `bias [output]`.
    ///
    /// # Errors
    /// Those of [`Ops::param`]; when the shapes do not fit.
    fn gemm(&mut self, x: &Self::Tensor, input: usize, output: usize) -> Result<Self::Tensor>;

    /// Convolution of stride 1 (ONNX `Conv`), with the current scope's `weight [output, input, kernel, …]` and its
    /// `bias [output]`.
    ///
    /// # Errors
    /// Those of [`Ops::param`] and [`Ops::pad_reflect`]; when the shapes do not fit.
    fn conv(&mut self, x: &Self::Tensor, conv: Conv) -> Result<Self::Tensor>;

    /// Normalization over the last axis of `width` elements, with `(weight, bias)` or without
    /// (ONNX `LayerNormalization`).
    ///
    /// # Errors
    /// When the shapes do not fit.
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
    /// When the shapes do not fit.
    fn group_normalization(
        &mut self,
        x: &Self::Tensor,
        affine: (&Self::Tensor, &Self::Tensor),
        groups: usize,
        eps: f32,
    ) -> Result<Self::Tensor>;

    /// One element more on both sides of the `spatial` last axes of `x` of rank `2 + spatial`, mirrored without the
    /// border itself (ONNX `Pad`, mode `reflect`).
    ///
    /// # Errors
    /// When an axis has fewer than two elements.
    fn pad_reflect(&mut self, x: &Self::Tensor, spatial: usize) -> Result<Self::Tensor>;

    /// Channels `[batch, channels·fy·fx, rows, width]` as the pixels of larger patches,
    /// `[batch, channels, rows·fy, width·fx]` (ONNX `DepthToSpace`, mode `CRD`, whose patches are square).
    ///
    /// # Errors
    /// When the sizes do not fit.
    fn pixel_shuffle(
        &mut self,
        x: &Self::Tensor,
        channels: usize,
        rows: usize,
        factors: (usize, usize),
    ) -> Result<Self::Tensor>;

    /// `x` with elements set to zero at random while the model is trained; otherwise `x` itself.
    ///
    /// # Errors
    /// When the interpreter refuses.
    fn dropout(&mut self, x: Self::Tensor, what: Dropped) -> Result<Self::Tensor>;

    /// Begins a loop that passes `state` through one iteration for every index of the first axis of `sequences`
    /// (ONNX `Loop`). Model code calls [`OpsExt::fold`].
    ///
    /// # Errors
    /// When the interpreter refuses.
    fn begin_loop(&mut self, sequences: &[&Self::Tensor], state: &Self::Tensor) -> Result<Self::Loop>;

    /// What the next iteration works on: the sequences' elements and the state; `None` when all iterations are done. An
    /// interpreter that writes the loop down instead of running it gives one iteration only.
    ///
    /// # Errors
    /// When the interpreter refuses.
    fn next_iteration(&mut self, open: &mut Self::Loop) -> Result<Option<Iteration<Self::Tensor>>>;

    /// Takes the state after an iteration.
    ///
    /// # Errors
    /// When the interpreter refuses.
    fn end_iteration(&mut self, open: &mut Self::Loop, state: Self::Tensor) -> Result<()>;

    /// Ends a loop; gives the last state.
    ///
    /// # Errors
    /// When the interpreter refuses.
    fn end_loop(&mut self, open: Self::Loop) -> Result<Self::Tensor>;
}

/// What the model is written in besides the primitives: derived from them, and the same for every interpreter.
pub trait OpsExt: Ops {
    /// Runs `body` inside the scope `name`; scopes are joined by dots as PyTorch joins module names. An error of `body` is
    /// given the name of the scope.
    ///
    /// # Errors
    /// Those of `body`.
    fn scope<R>(&mut self, name: &str, body: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        self.enter(name);
        let result = body(self);
        self.leave();
        result.map_err(|error| error.in_scope(name))
    }

    /// Passes `state` through `body` once for every index `i` of the first axis of `sequences`, handing it their
    /// `i`-th elements.
    ///
    /// # Errors
    /// Those of `body`.
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
    /// Those of [`Ops::binary`].
    fn add(&mut self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor> {
        self.binary(Binary::Add, a, b)
    }

    /// a - b
    ///
    /// # Errors
    /// Those of [`Ops::binary`].
    fn sub(&mut self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor> {
        self.binary(Binary::Sub, a, b)
    }

    /// a · b
    ///
    /// # Errors
    /// Those of [`Ops::binary`].
    fn mul(&mut self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor> {
        self.binary(Binary::Mul, a, b)
    }

    /// `x` times a number.
    ///
    /// # Errors
    /// Those of [`Ops::binary`].
    fn scale(&mut self, x: &Self::Tensor, factor: f32) -> Result<Self::Tensor> {
        let factor = self.constant(&[], &[factor])?;
        self.mul(x, &factor)
    }

    /// x · (1 + scale) + shift, the modulation of adaptive layer norm (reference: `modulate`).
    ///
    /// # Errors
    /// Those of [`Ops::binary`].
    fn modulate(&mut self, x: &Self::Tensor, shift: &Self::Tensor, scale: &Self::Tensor) -> Result<Self::Tensor> {
        let one = self.constant(&[], &[1.0])?;
        let scale = self.add(scale, &one)?;
        let x = self.mul(x, &scale)?;
        self.add(&x, shift)
    }

    /// The module `nn.Linear(input, output)` of this name on `x [rows, input]`.
    ///
    /// # Errors
    /// Those of [`Ops::gemm`].
    fn linear(&mut self, name: &str, x: &Self::Tensor, input: usize, output: usize) -> Result<Self::Tensor> {
        self.scope(name, |o| o.gemm(x, input, output))
    }

    /// The module `nn.LayerNorm(width, eps)` of this name.
    ///
    /// # Errors
    /// Those of [`Ops::param`] and [`Ops::layer_normalization`].
    fn layer_norm(&mut self, name: &str, x: &Self::Tensor, width: usize, eps: f32) -> Result<Self::Tensor> {
        self.scope(name, |o| {
            let weight = o.param("weight", &[width])?;
            let bias = o.param("bias", &[width])?;
            o.layer_normalization(x, Some((&weight, &bias)), width, eps)
        })
    }

    /// The module `nn.GroupNorm(groups, channels, eps)` of this name.
    ///
    /// # Errors
    /// Those of [`Ops::param`] and [`Ops::group_normalization`].
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

    /// The module `nn.Conv1d(input, output, 3, padding=1, padding_mode="reflect")` of this name.
    ///
    /// # Errors
    /// Those of [`Ops::conv`].
    fn conv1d(&mut self, name: &str, x: &Self::Tensor, input: usize, output: usize) -> Result<Self::Tensor> {
        self.scope(name, |o| o.conv(x, Conv { input, output, kernel: 3, spatial: 1, reflect: true }))
    }

    /// The module `nn.Conv2d(input, output, 3, padding=1, padding_mode="reflect")` of this name.
    ///
    /// # Errors
    /// Those of [`Ops::conv`].
    fn conv2d(&mut self, name: &str, x: &Self::Tensor, input: usize, output: usize) -> Result<Self::Tensor> {
        self.scope(name, |o| o.conv(x, Conv { input, output, kernel: 3, spatial: 2, reflect: true }))
    }

    /// The module `nn.Conv2d(input, output, 1)` of this name.
    ///
    /// # Errors
    /// Those of [`Ops::conv`].
    fn conv1x1(&mut self, name: &str, x: &Self::Tensor, input: usize, output: usize) -> Result<Self::Tensor> {
        self.scope(name, |o| o.conv(x, Conv { input, output, kernel: 1, spatial: 2, reflect: false }))
    }

    /// Softmax attention of `q [b, h, n, d]` to `k`, `v` `[b, h, m, d]`, with `bias` added to the scores
    /// `[b, h, n, m]`; scores are scaled by `d^-0.5`.
    ///
    /// # Errors
    /// Those of the primitives.
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

/// [`Ops::pixel_shuffle`] by [`Ops::reshape`] and [`Ops::permute`], for interpreters without an operator for it.
///
/// # Errors
/// When the sizes do not fit.
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

/// The full name of `name` in nested scopes, as PyTorch joins module names.
pub fn scoped(scope: &[String], name: &str) -> String {
    let mut full = scope.join(".");
    if !full.is_empty() {
        full.push('.');
    }
    full + name
}

/// A position along an axis of `length` elements, counted from the end where negative.
fn position(at: i64, length: usize) -> usize {
    let length = length as i64;
    if at < 0 { (length + at).max(0) as usize } else { at.min(length) as usize }
}
