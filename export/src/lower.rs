//! The interpreter that writes the model as ONNX nodes. The names of the nodes begin with the model's scopes.
//!
//! In FP16 and BF16 it casts like PyTorch's autocast: matrix products and convolutions run in the precision of the
//! bundle, norms and softmax in FP32. An operation on inputs of two precisions gives FP32, so that the transformer's
//! residual stream and the ODE's state stay in FP32. A policy selects the products that run in INT8: see `int8.rs`.

use std::collections::HashMap;

use eqim::bundle::{Precision, WEIGHTS_FILE};
use eqim::checkpoint::tensors::TensorFile;
use eqim::model::{Dimension, Stage, ValueInfo, ValueKind};
use eqim::ops::{
    Binary, Conv, Dim, Dropped, Iteration, Ops, OpsExt, Padding, Unary, function as names, modulate_by_parts,
    residual_by_parts, scoped, shuffle_by_transpose,
};
use eqim::{Config, Error, Result};
use eqim_calibration::{Policy, Quantize};

mod function;
pub mod int8;

use function::Call;

use crate::onnx::{
    self, AttributeProto, DataType, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    tensor_shape_proto,
};

/// Oldest operator set that the lowering supports: the first with `LayerNormalization`.
pub const OLDEST_OPSET: i64 = 17;
/// Newest operator set of FP32 and FP16 graphs, and the default.
pub const NEWEST_OPSET: i64 = 20;
/// The operator set of BF16 graphs: the first in which ONNX defines `Conv` for BF16.
pub const BF16_OPSET: i64 = 22;

/// A value of the graph.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Value {
    name: String,
    data_type: DataType,
}

/// Shape, type and position of a weight in the weights file.
#[derive(Clone, Debug)]
pub struct Place {
    shape: Vec<usize>,
    data_type: DataType,
    bytes: (u64, u64),
}

/// Places of weights, by name.
pub type Places = HashMap<String, Place>;

/// Places of all weights of a `.safetensors` file.
///
/// # Errors
/// [`Error::input`] if a tensor has a type that graphs do not use.
pub fn places(file: &TensorFile) -> Result<Places> {
    let place = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let data_type = match info.dtype {
            safetensors::Dtype::F32 => DataType::Float,
            safetensors::Dtype::F16 => DataType::Float16,
            safetensors::Dtype::BF16 => DataType::Bfloat16,
            safetensors::Dtype::I8 => DataType::Int8,
            safetensors::Dtype::I32 => DataType::Int32,
            other => {
                let problem = format!("tensor {name} is of type {other:?}, expected F32, F16, BF16, I8 or I32");
                return Err(Error::input(file.path().display(), problem));
            }
        };
        Ok((name, Place { shape: info.shape.clone(), data_type, bytes: file.place(info) }))
    };
    file.tensors().into_iter().map(place).collect()
}

/// Writes primitives as ONNX nodes.
pub struct Lower<'a> {
    weights: &'a Places,
    opset: i64,
    compute: DataType,
    scope: Vec<String>,
    /// Whether functions of the model become functions of the graph.
    functions: bool,
    /// Functions that are complete.
    defined: Vec<FunctionProto>,
    /// The model's graph, followed by the open functions, the innermost last.
    frames: Vec<Frame>,
}

/// What shares its names: the model's graph, or the body of a function.
#[derive(Default)]
struct Frame {
    /// The graph, followed by the open loop bodies, the innermost last.
    graphs: Vec<GraphProto>,
    /// How often each name was requested, to keep names unique.
    wanted: HashMap<String, usize>,
    /// Weights that are already in the frame, by their full name.
    parameters: HashMap<String, Value>,
    /// Constants that are already in the frame, by type, shape and bytes.
    constants: HashMap<(DataType, Vec<usize>, Vec<u8>), Value>,
    /// Sizes of axes that are already computed, by graph, the innermost last.
    sizes: Vec<HashMap<(String, Option<usize>), Value>>,
    /// Of a function: its call.
    call: Option<Call>,
}

/// Lowers one stage to an ONNX model whose weights are in the bundle's weights file.
///
/// # Errors
/// If a weight is missing.
pub fn lower(config: &Config, stage: Stage, weights: &Places, options: Options) -> Result<ModelProto> {
    let mut lower = Lower::new(weights, options.precision, options.opset, options.functions);
    let inputs: Vec<Value> = stage.inputs(config).iter().map(|info| lower.input(info)).collect();
    let (lower, outputs) = match options.policy {
        None => {
            let outputs = stage.run(&mut lower, config, &inputs)?;
            (lower, outputs)
        }
        Some(policy) => {
            let mut quantize = Quantize::new(lower, policy, stage);
            let outputs = stage.run(&mut quantize, config, &inputs)?;
            (quantize.into_inner(), outputs)
        }
    };
    Ok(lower.finish(stage.name(), &outputs, &stage.outputs(config)))
}

/// Settings of the lowering.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Precision of weights and matrix products.
    pub precision: Precision,
    /// ONNX operator set.
    pub opset: i64,
    /// Policy that selects the products to run in INT8; `None` for no INT8.
    pub policy: Option<&'a Policy>,
    /// Whether functions of the model become functions of the graph (ONNX `FunctionProto`).
    pub functions: bool,
}

impl<'a> Lower<'a> {
    /// Begins an empty graph.
    pub fn new(weights: &'a Places, precision: Precision, opset: i64, functions: bool) -> Self {
        let compute = match precision {
            Precision::Fp32 => DataType::Float,
            Precision::Fp16 => DataType::Float16,
            Precision::Bf16 => DataType::Bfloat16,
        };
        Self { weights, opset, compute, scope: vec![], functions, defined: vec![], frames: vec![Frame::new(None)] }
    }

    fn data_type(&self, kind: ValueKind) -> DataType {
        match kind {
            ValueKind::Integer => DataType::Int64,
            ValueKind::Float => DataType::Float,
            ValueKind::Cache => self.compute,
        }
    }

    /// Declares an input of the graph.
    pub fn input(&mut self, info: &ValueInfo) -> Value {
        let value = Value { name: info.name.clone(), data_type: self.data_type(info.kind) };
        self.frame().wanted.insert(info.name.clone(), 1);
        self.frame().graphs[0].input.push(onnx::value_info(&value.name, value.data_type, Some(dimensions(info))));
        value
    }

    /// Completes the graph. The `outputs` get the names and types of `infos`.
    pub fn finish(mut self, name: &str, outputs: &[Value], infos: &[ValueInfo]) -> ModelProto {
        let mut renamed = HashMap::new();
        for (output, info) in outputs.iter().zip(infos) {
            let data_type = self.data_type(info.kind);
            let mut value = self.cast(output, data_type);
            let is_input = self.frame().graphs[0].input.iter().any(|input| input.name.as_deref() == Some(&value.name));
            if is_input || renamed.contains_key(&value.name) {
                value = self.node("Identity", &[&value], vec![], data_type);
            }
            renamed.insert(value.name, info.name.clone());
            self.frame().graphs[0].output.push(onnx::value_info(&info.name, data_type, Some(dimensions(info))));
        }
        let mut graph = self.frame().graphs.remove(0);
        graph.name = Some(name.into());
        rename(&mut graph, &renamed);
        ModelProto {
            ir_version: Some(match self.opset {
                ..19 => 8,
                19..21 => 9,
                _ => 10,
            }),
            producer_name: Some("eqim".into()),
            producer_version: Some(env!("CARGO_PKG_VERSION").into()),
            graph: Some(graph),
            opset_import: self.opset_import(!self.defined.is_empty()),
            functions: self.defined,
        }
    }

    /// The operator sets that a graph uses.
    fn opset_import(&self, functions: bool) -> Vec<OperatorSetIdProto> {
        let standard = OperatorSetIdProto { domain: None, version: Some(self.opset) };
        let ours = OperatorSetIdProto { domain: Some(names::DOMAIN.into()), version: Some(names::VERSION) };
        if functions { vec![standard, ours] } else { vec![standard] }
    }

    /// The innermost frame.
    fn frame(&mut self) -> &mut Frame {
        let last = self.frames.len() - 1;
        &mut self.frames[last]
    }

    /// The innermost graph.
    fn graph(&mut self) -> &mut GraphProto {
        let graphs = &mut self.frame().graphs;
        let last = graphs.len() - 1;
        &mut graphs[last]
    }

    fn unique(&mut self, name: String) -> String {
        let count = self.frame().wanted.entry(name.clone()).or_insert(0);
        *count += 1;
        if *count == 1 { name } else { format!("{name}_{}", *count - 1) }
    }

    /// The name of `name` in the current scope. In a function, the name begins with the scopes inside of the function.
    fn local(&mut self, name: &str) -> String {
        let outside = self.frame().call.as_ref().map_or(0, |call| call.scopes);
        scoped(&self.scope[outside..], name)
    }

    /// Appends a node with one output to the innermost graph.
    fn node(&mut self, op: &str, inputs: &[&Value], attributes: Vec<AttributeProto>, data_type: DataType) -> Value {
        let [value] = self.node_of(op, inputs, attributes, [("output", data_type)]);
        value
    }

    /// Appends a node with `N` outputs to the innermost graph.
    fn node_of<const N: usize>(
        &mut self,
        op: &str,
        inputs: &[&Value],
        attributes: Vec<AttributeProto>,
        outputs: [(&str, DataType); N],
    ) -> [Value; N] {
        let name = self.local(op);
        let name = self.unique(name);
        let values = outputs.map(|(output, data_type)| Value { name: format!("{name}_{output}"), data_type });
        let node = NodeProto {
            input: inputs.iter().map(|input| input.name.clone()).collect(),
            output: values.iter().map(|value| value.name.clone()).collect(),
            name: Some(name),
            op_type: Some(op.into()),
            attribute: attributes,
            domain: None,
        };
        self.graph().node.push(node);
        values
    }

    fn initializer(&mut self, data_type: DataType, shape: &[usize], bytes: Vec<u8>) -> Value {
        let frame = self.frame();
        let key = (data_type, shape.to_vec(), bytes);
        if let Some(value) = frame.constants.get(&key) {
            return value.clone();
        }
        let value = Value { name: format!("constant.{}", frame.constants.len()), data_type };
        let tensor = onnx::constant(&value.name, data_type, shape, key.2.clone());
        // A function has no initializers.
        match frame.call {
            None => frame.graphs[0].initializer.push(tensor),
            Some(_) => frame.graphs[0].node.push(NodeProto {
                output: vec![value.name.clone()],
                name: Some(value.name.clone()),
                op_type: Some("Constant".into()),
                attribute: vec![AttributeProto::tensor("value", tensor)],
                ..NodeProto::default()
            }),
        }
        frame.constants.insert(key, value.clone());
        value
    }

    fn integers(&mut self, shape: &[usize], values: &[i64]) -> Value {
        self.initializer(DataType::Int64, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn floats(&mut self, shape: &[usize], values: &[f32]) -> Value {
        self.initializer(DataType::Float, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    /// A tensor of the weights file: an initializer of the model's graph, or an input of the innermost function.
    fn stored(&mut self, name: &str) -> Result<Value> {
        if let Some(value) = self.frame().parameters.get(name) {
            return Ok(value.clone());
        }
        let place = self.weights.get(name);
        let place = place.ok_or_else(|| Error::input(WEIGHTS_FILE, format!("has no tensor {name}")))?;
        let frame = self.frame();
        let local = match &mut frame.call {
            None => {
                let tensor = onnx::external(name, place.data_type, &place.shape, WEIGHTS_FILE, place.bytes);
                frame.graphs[0].initializer.push(tensor);
                name
            }
            Some(call) => call.weight(name),
        };
        let value = Value { name: local.to_string(), data_type: place.data_type };
        frame.parameters.insert(name.to_string(), value.clone());
        Ok(value)
    }

    fn cast(&mut self, x: &Value, data_type: DataType) -> Value {
        if x.data_type == data_type {
            return x.clone();
        }
        self.node("Cast", &[x], vec![AttributeProto::int("to", data_type as i64)], data_type)
    }

    /// Appends a matrix product or convolution. Casts the inputs to the precision of the bundle.
    fn computed(&mut self, op: &str, inputs: &[&Value], attributes: Vec<AttributeProto>) -> Value {
        let compute = self.compute;
        let inputs: Vec<Value> = inputs.iter().map(|input| self.cast(input, compute)).collect();
        self.node(op, &inputs.iter().collect::<Vec<_>>(), attributes, compute)
    }

    /// `x [rows, input] · weightᵀ + bias`.
    fn gemm_node(&mut self, x: &Value, weight: &Value, bias: &Value) -> Value {
        self.computed("Gemm", &[x, weight, bias], vec![AttributeProto::int("transB", 1)])
    }

    /// Appends a norm, a softmax or another node that runs in FP32. Casts the inputs to FP32.
    fn precise(&mut self, op: &str, inputs: &[&Value], attributes: Vec<AttributeProto>) -> Value {
        let inputs: Vec<Value> = inputs.iter().map(|input| self.cast(input, DataType::Float)).collect();
        self.node(op, &inputs.iter().collect::<Vec<_>>(), attributes, DataType::Float)
    }

    /// Reduces some axes of `x`. The axes became an input in opset 18.
    fn reduce(&mut self, op: &str, x: &Value, axes: &[usize], keep: bool) -> Value {
        let axes: Vec<i64> = axes.iter().map(|&axis| axis as i64).collect();
        let keep = AttributeProto::int("keepdims", keep.into());
        if self.opset < 18 {
            return self.node(op, &[x], vec![keep, AttributeProto::ints("axes", axes)], x.data_type);
        }
        let axes = self.integers(&[axes.len()], &axes);
        self.node(op, &[x, &axes], vec![keep], x.data_type)
    }

    /// Size of an axis, as a tensor `[1]`; the whole shape if `axis` is `None`.
    fn size(&mut self, x: &Value, axis: Option<usize>) -> Value {
        let key = (x.name.clone(), axis);
        if let Some(value) = self.frame().sizes.iter().find_map(|sizes| sizes.get(&key)) {
            return value.clone();
        }
        let attributes = axis.map_or(vec![], |axis| {
            vec![AttributeProto::int("start", axis as i64), AttributeProto::int("end", axis as i64 + 1)]
        });
        let value = self.node("Shape", &[x], attributes, DataType::Int64);
        if let Some(innermost) = self.frame().sizes.last_mut() {
            innermost.insert(key, value.clone());
        }
        value
    }

    /// A shape as a tensor: for `Reshape` of `x`, or for `Expand` if `x` is `None`.
    fn shape(&mut self, x: Option<&Value>, shape: &[Dim<Value>]) -> Value {
        let fixed = |(position, dim): (usize, &Dim<Value>)| match dim {
            Dim::Is(size) => Some(*size as i64),
            Dim::Rest => Some(-1),
            // In `Reshape`, 0 means the size of the same axis of the input.
            Dim::Of(other, axis) => (x == Some(*other) && *axis == position).then_some(0),
        };
        let sizes: Vec<Option<i64>> = shape.iter().enumerate().map(fixed).collect();
        if let Some(sizes) = sizes.iter().copied().collect::<Option<Vec<i64>>>() {
            return self.integers(&[sizes.len()], &sizes);
        }
        let parts: Vec<Value> = shape
            .iter()
            .zip(sizes)
            .map(|(dim, size)| match (dim, size) {
                (Dim::Of(other, axis), None) => self.size(other, Some(*axis)),
                (_, size) => self.integers(&[1], &[size.unwrap_or(-1)]),
            })
            .collect();
        self.node("Concat", &parts.iter().collect::<Vec<_>>(), vec![AttributeProto::int("axis", 0)], DataType::Int64)
    }
}

/// A loop. Its body is written once, as a separate graph.
pub struct Written {
    sequences: Option<Vec<Value>>,
    steps: Value,
    state: Value,
    condition: String,
    body: Option<GraphProto>,
}

fn dimensions(info: &ValueInfo) -> Vec<tensor_shape_proto::Dimension> {
    let dimension = |axis: &Dimension| match axis {
        Dimension::Fixed(size) => tensor_shape_proto::Dimension { dim_value: Some(*size as i64), dim_param: None },
        Dimension::Symbolic(symbol) => {
            tensor_shape_proto::Dimension { dim_value: None, dim_param: Some(symbol.name().into()) }
        }
    };
    info.shape.iter().map(dimension).collect()
}

/// The attributes of `Conv` and `QLinearConv` that differ from their defaults. Padding by reflection is a node of its own.
fn conv_attributes(conv: Conv) -> Vec<AttributeProto> {
    let mut attributes = vec![];
    if conv.padding == Padding::Same {
        attributes.push(AttributeProto::text("auto_pad", "SAME_UPPER"));
    }
    if conv.stride > 1 {
        attributes.push(AttributeProto::ints("strides", vec![conv.stride as i64; conv.spatial]));
    }
    if conv.groups > 1 {
        attributes.push(AttributeProto::int("group", conv.groups as i64));
    }
    attributes
}

/// Renames values, including their uses in loop bodies.
fn rename(graph: &mut GraphProto, names: &HashMap<String, String>) {
    for node in &mut graph.node {
        for name in node.input.iter_mut().chain(&mut node.output) {
            if let Some(new) = names.get(name) {
                name.clone_from(new);
            }
        }
        node.attribute.iter_mut().filter_map(|attribute| attribute.g.as_mut()).for_each(|body| rename(body, names));
    }
}

impl Ops for Lower<'_> {
    type Tensor = Value;
    type Loop = Written;

    fn enter(&mut self, name: &str) {
        self.scope.push(name.to_string());
    }

    fn leave(&mut self) {
        self.scope.pop();
    }

    fn param(&mut self, name: &str, shape: &[usize]) -> Result<Value> {
        let name = scoped(&self.scope, name);
        let value = self.stored(&name)?;
        if self.weights.get(&name).is_none_or(|place| place.shape != shape) {
            return Err(Error::input(WEIGHTS_FILE, format!("has no tensor {name} {shape:?}")));
        }
        Ok(value)
    }

    fn constant(&mut self, shape: &[usize], data: &[f32]) -> Result<Value> {
        Ok(self.floats(shape, data))
    }

    fn reshape(&mut self, x: &Value, shape: &[Dim<Value>]) -> Result<Value> {
        let shape = self.shape(Some(x), shape);
        Ok(self.node("Reshape", &[x, &shape], vec![], x.data_type))
    }

    fn expand(&mut self, x: &Value, shape: &[Dim<Value>]) -> Result<Value> {
        let shape = self.shape(None, shape);
        Ok(self.node("Expand", &[x, &shape], vec![], x.data_type))
    }

    fn permute(&mut self, x: &Value, axes: &[usize]) -> Result<Value> {
        let perm = AttributeProto::ints("perm", axes.iter().map(|&axis| axis as i64));
        Ok(self.node("Transpose", &[x], vec![perm], x.data_type))
    }

    fn slice(&mut self, x: &Value, axis: usize, start: i64, end: i64) -> Result<Value> {
        let [start, end, axis] = [start, end, axis as i64].map(|value| self.integers(&[1], &[value]));
        Ok(self.node("Slice", &[x, &start, &end, &axis], vec![], x.data_type))
    }

    fn concat(&mut self, xs: &[&Value], axis: usize) -> Result<Value> {
        let same = xs.iter().all(|x| x.data_type == xs[0].data_type);
        // The precisions differ only if one of the values is a cache. Caches are in the precision of the bundle.
        let data_type = if same { xs[0].data_type } else { self.compute };
        let xs: Vec<Value> = xs.iter().map(|x| self.cast(x, data_type)).collect();
        let axis = vec![AttributeProto::int("axis", axis as i64)];
        Ok(self.node("Concat", &xs.iter().collect::<Vec<_>>(), axis, data_type))
    }

    fn gather(&mut self, table: &Value, indices: &Value) -> Result<Value> {
        Ok(self.node("Gather", &[table, indices], vec![AttributeProto::int("axis", 0)], table.data_type))
    }

    fn unary(&mut self, op: Unary, x: &Value) -> Result<Value> {
        Ok(match op {
            Unary::Cos => self.precise("Cos", &[x], vec![]),
            Unary::Sin => self.precise("Sin", &[x], vec![]),
            Unary::Silu => {
                let gate = self.node("Sigmoid", &[x], vec![], x.data_type);
                self.node("Mul", &[x, &gate], vec![], x.data_type)
            }
            // ONNX does not define `Gelu` for BF16.
            Unary::Gelu if self.opset >= 20 && x.data_type == DataType::Bfloat16 => self.precise("Gelu", &[x], vec![]),
            Unary::Gelu if self.opset >= 20 => self.node("Gelu", &[x], vec![], x.data_type),
            Unary::Gelu => {
                let x = &self.cast(x, DataType::Float);
                let [half, one, root] =
                    [0.5, 1.0, std::f32::consts::FRAC_1_SQRT_2].map(|value| self.floats(&[], &[value]));
                let scaled = self.precise("Mul", &[x, &root], vec![]);
                let erf = self.precise("Erf", &[&scaled], vec![]);
                let erf = self.precise("Add", &[&erf, &one], vec![]);
                let x = self.precise("Mul", &[x, &half], vec![]);
                self.precise("Mul", &[&x, &erf], vec![])
            }
            Unary::ToFloat => self.cast(x, DataType::Float),
        })
    }

    fn binary(&mut self, op: Binary, a: &Value, b: &Value) -> Result<Value> {
        let name = match op {
            Binary::Add => "Add",
            Binary::Sub => "Sub",
            Binary::Mul => "Mul",
        };
        if a.data_type == b.data_type {
            return Ok(self.node(name, &[a, b], vec![], a.data_type));
        }
        Ok(self.precise(name, &[a, b], vec![]))
    }

    fn clamp(&mut self, x: &Value, low: f32, high: f32) -> Result<Value> {
        let [low, high] = [low, high].map(|value| self.floats(&[], &[value]));
        Ok(self.precise("Clip", &[x, &low, &high], vec![]))
    }

    fn mean(&mut self, x: &Value, axes: &[usize]) -> Result<Value> {
        Ok(self.reduce("ReduceMean", x, axes, false))
    }

    fn softmax(&mut self, x: &Value) -> Result<Value> {
        Ok(self.precise("Softmax", &[x], vec![AttributeProto::int("axis", -1)]))
    }

    fn matmul(&mut self, a: &Value, b: &Value) -> Result<Value> {
        Ok(self.computed("MatMul", &[a, b], vec![]))
    }

    fn gemm(&mut self, x: &Value, input: usize, output: usize) -> Result<Value> {
        let (weight, bias) = (self.param("weight", &[output, input])?, self.param("bias", &[output])?);
        Ok(self.gemm_node(x, &weight, &bias))
    }

    fn layer_normalization(
        &mut self,
        x: &Value,
        affine: Option<(&Value, &Value)>,
        width: usize,
        eps: f32,
    ) -> Result<Value> {
        let attributes = vec![AttributeProto::int("axis", -1), AttributeProto::float("epsilon", eps)];
        let Some((weight, bias)) = affine else {
            let ones = self.floats(&[width], &vec![1.0; width]);
            return Ok(self.precise("LayerNormalization", &[x, &ones], attributes));
        };
        Ok(self.precise("LayerNormalization", &[x, weight, bias], attributes))
    }

    // `GroupNormalization` has one scale per channel only since opset 21.
    fn group_normalization(
        &mut self,
        x: &Value,
        (weight, bias): (&Value, &Value),
        groups: usize,
        eps: f32,
    ) -> Result<Value> {
        let x = &self.cast(x, DataType::Float);
        let shape = self.size(x, None);
        let grouped = self.integers(&[3], &[0, groups as i64, -1]);
        let grouped = self.node("Reshape", &[x, &grouped], vec![], DataType::Float);
        let [ones, zeros] = [1.0, 0.0].map(|value| self.floats(&[groups], &vec![value; groups]));
        let epsilon = vec![AttributeProto::float("epsilon", eps)];
        let normed = self.node("InstanceNormalization", &[&grouped, &ones, &zeros], epsilon, DataType::Float);
        let normed = self.node("Reshape", &[&normed, &shape], vec![], DataType::Float);
        let channels = self.integers(&[3], &[-1, 1, 1]);
        let [weight, bias] =
            [weight, bias].map(|affine| self.node("Reshape", &[affine, &channels], vec![], affine.data_type));
        let scaled = self.precise("Mul", &[&normed, &weight], vec![]);
        Ok(self.precise("Add", &[&scaled, &bias], vec![]))
    }

    fn conv(&mut self, x: &Value, conv: Conv) -> Result<Value> {
        let (weight, bias) = (self.param("weight", &conv.weight_shape())?, self.param("bias", &[conv.output])?);
        let x = self.reflected(x, conv)?;
        Ok(self.computed("Conv", &[&x, &weight, &bias], conv_attributes(conv)))
    }

    fn pad_reflect(&mut self, x: &Value, spatial: usize) -> Result<Value> {
        let side = [vec![0; 2], vec![1; spatial]].concat();
        let pads = self.integers(&[2 * side.len()], &[side.clone(), side].concat());
        Ok(self.node("Pad", &[x, &pads], vec![AttributeProto::text("mode", "reflect")], x.data_type))
    }

    fn modulate(&mut self, x: &Value, shift: &Value, scale: &Value) -> Result<Value> {
        modulate_by_parts(self, x, shift, scale)
    }

    fn gated_residual(&mut self, x: &Value, gate: &Value, y: &Value) -> Result<Value> {
        residual_by_parts(self, x, gate, y)
    }

    fn pixel_shuffle(&mut self, x: &Value, channels: usize, rows: usize, (fy, fx): (usize, usize)) -> Result<Value> {
        if fy == fx {
            let attributes = vec![AttributeProto::int("blocksize", fy as i64), AttributeProto::text("mode", "CRD")];
            return Ok(self.node("DepthToSpace", &[x], attributes, x.data_type));
        }
        shuffle_by_transpose(self, x, channels, rows, (fy, fx))
    }

    fn dropout(&mut self, x: Value, _what: Dropped) -> Result<Value> {
        Ok(x)
    }

    fn begin_function(&mut self, name: &str, inputs: &[&Value]) -> Result<Vec<Value>> {
        if !self.functions {
            return Ok(inputs.iter().map(|&input| input.clone()).collect());
        }
        Ok(self.open(name, inputs))
    }

    fn end_function(&mut self, outputs: Vec<Value>) -> Result<Vec<Value>> {
        if self.functions { self.close(outputs) } else { Ok(outputs) }
    }

    fn begin_loop(&mut self, sequences: &[&Value], state: &Value) -> Result<Written> {
        let steps = self.size(sequences[0], Some(0));
        let first = self.integers(&[1], &[0]);
        let steps = self.node("Squeeze", &[&steps, &first], vec![], DataType::Int64);
        let sequences = Some(sequences.iter().map(|&sequence| sequence.clone()).collect());
        Ok(Written { sequences, steps, state: state.clone(), condition: String::new(), body: None })
    }

    fn next_iteration(&mut self, open: &mut Written) -> Result<Option<Iteration<Value>>> {
        let Some(sequences) = open.sequences.take() else { return Ok(None) };
        let names = ["iteration", "condition", "state", "body"].map(|part| self.local(&format!("Loop.{part}")));
        let [iteration, condition, carried, body] = names.map(|name| self.unique(name));
        let state = open.state.data_type;
        let input = vec![
            onnx::value_info(&iteration, DataType::Int64, Some(vec![])),
            onnx::value_info(&condition, DataType::Bool, Some(vec![])),
            onnx::value_info(&carried, state, None),
        ];
        open.condition = condition;
        self.frame().graphs.push(GraphProto { input, name: Some(body), ..GraphProto::default() });
        self.frame().sizes.push(HashMap::new());

        let iteration = Value { name: iteration, data_type: DataType::Int64 };
        let mut element = |sequence: &Value| self.gather(sequence, &iteration);
        let now = sequences.iter().map(&mut element).collect::<Result<_>>()?;
        Ok(Some((now, Value { name: carried, data_type: state })))
    }

    fn end_iteration(&mut self, open: &mut Written, state: Value) -> Result<()> {
        let next = self.cast(&state, open.state.data_type);
        let condition = Value { name: open.condition.clone(), data_type: DataType::Bool };
        let goes_on = self.node("Identity", &[&condition], vec![], DataType::Bool);
        self.graph().output = vec![
            onnx::value_info(&goes_on.name, DataType::Bool, Some(vec![])),
            onnx::value_info(&next.name, next.data_type, None),
        ];
        self.frame().sizes.pop();
        open.body = self.frame().graphs.pop();
        Ok(())
    }

    fn end_loop(&mut self, open: Written) -> Result<Value> {
        let goes_on = self.initializer(DataType::Bool, &[], vec![1]);
        let body = vec![AttributeProto::graph("body", open.body.unwrap_or_default())];
        Ok(self.node("Loop", &[&open.steps, &goes_on, &open.state], body, open.state.data_type))
    }
}
