//! The ONNX messages that a lowered model uses (`onnx.proto`, IR versions 8 to 10), encoded with prost.

use prost::Message;

/// `ModelProto`.
#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    /// Version of the ONNX IR.
    #[prost(int64, optional, tag = "1")]
    pub ir_version: Option<i64>,
    /// Program that wrote the model.
    #[prost(string, optional, tag = "2")]
    pub producer_name: Option<String>,
    /// Version of this program.
    #[prost(string, optional, tag = "3")]
    pub producer_version: Option<String>,
    /// The graph.
    #[prost(message, optional, tag = "7")]
    pub graph: Option<GraphProto>,
    /// Operator sets that the graph uses.
    #[prost(message, repeated, tag = "8")]
    pub opset_import: Vec<OperatorSetIdProto>,
    /// Functions that the graph calls.
    #[prost(message, repeated, tag = "25")]
    pub functions: Vec<FunctionProto>,
}

/// `FunctionProto`.
#[derive(Clone, PartialEq, Message)]
pub struct FunctionProto {
    /// Name of the function: the operator type of the nodes that call it.
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// Names of the inputs in the body.
    #[prost(string, repeated, tag = "4")]
    pub input: Vec<String>,
    /// Names of the outputs in the body.
    #[prost(string, repeated, tag = "5")]
    pub output: Vec<String>,
    /// Nodes of the body in topological order.
    #[prost(message, repeated, tag = "7")]
    pub node: Vec<NodeProto>,
    /// Operator sets that the body uses.
    #[prost(message, repeated, tag = "9")]
    pub opset_import: Vec<OperatorSetIdProto>,
    /// Domain of the function.
    #[prost(string, optional, tag = "10")]
    pub domain: Option<String>,
}

/// `OperatorSetIdProto`.
#[derive(Clone, PartialEq, Message)]
pub struct OperatorSetIdProto {
    /// Domain of the operators. Empty for the standard operators.
    #[prost(string, optional, tag = "1")]
    pub domain: Option<String>,
    /// Version of the operator set.
    #[prost(int64, optional, tag = "2")]
    pub version: Option<i64>,
}

/// `GraphProto`.
#[derive(Clone, PartialEq, Message)]
pub struct GraphProto {
    /// Nodes in topological order.
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<NodeProto>,
    /// Name of the graph.
    #[prost(string, optional, tag = "2")]
    pub name: Option<String>,
    /// Weights and constants.
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<TensorProto>,
    /// Inputs of the graph.
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfoProto>,
    /// Outputs of the graph.
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfoProto>,
}

/// `NodeProto`.
#[derive(Clone, PartialEq, Message)]
pub struct NodeProto {
    /// Names of the input values.
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    /// Names of the output values.
    #[prost(string, repeated, tag = "2")]
    pub output: Vec<String>,
    /// Name of the node.
    #[prost(string, optional, tag = "3")]
    pub name: Option<String>,
    /// Type of the operator.
    #[prost(string, optional, tag = "4")]
    pub op_type: Option<String>,
    /// Attributes of the operator.
    #[prost(message, repeated, tag = "5")]
    pub attribute: Vec<AttributeProto>,
    /// Domain of the operator. Empty for the standard operators.
    #[prost(string, optional, tag = "7")]
    pub domain: Option<String>,
}

/// `AttributeProto`.
#[derive(Clone, PartialEq, Message)]
pub struct AttributeProto {
    /// Name of the attribute.
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// Value of a floating-point attribute.
    #[prost(float, optional, tag = "2")]
    pub f: Option<f32>,
    /// Value of an integer attribute.
    #[prost(int64, optional, tag = "3")]
    pub i: Option<i64>,
    /// Value of a text attribute.
    #[prost(bytes = "vec", optional, tag = "4")]
    pub s: Option<Vec<u8>>,
    /// Value of a tensor attribute.
    #[prost(message, optional, tag = "5")]
    pub t: Option<TensorProto>,
    /// Value of a graph attribute.
    #[prost(message, optional, tag = "6")]
    pub g: Option<GraphProto>,
    /// Values of an attribute that is a list of integers.
    #[prost(int64, repeated, packed = "false", tag = "8")]
    pub ints: Vec<i64>,
    /// Type of the attribute (`AttributeType`), which selects the field that holds the value.
    #[prost(int32, optional, tag = "20")]
    pub kind: Option<i32>,
}

/// `TensorProto`.
#[derive(Clone, PartialEq, Message)]
pub struct TensorProto {
    /// Shape of the tensor.
    #[prost(int64, repeated, packed = "false", tag = "1")]
    pub dims: Vec<i64>,
    /// Element type: [`DataType`].
    #[prost(int32, optional, tag = "2")]
    pub data_type: Option<i32>,
    /// Name of the tensor.
    #[prost(string, optional, tag = "8")]
    pub name: Option<String>,
    /// Values in little-endian order, if they are in this file.
    #[prost(bytes = "vec", optional, tag = "9")]
    pub raw_data: Option<Vec<u8>>,
    /// Location of the values, if they are in another file.
    #[prost(message, repeated, tag = "13")]
    pub external_data: Vec<StringStringEntryProto>,
    /// 1 if the values are in another file.
    #[prost(int32, optional, tag = "14")]
    pub data_location: Option<i32>,
}

/// `StringStringEntryProto`.
#[derive(Clone, PartialEq, Message)]
pub struct StringStringEntryProto {
    /// Key of the entry.
    #[prost(string, optional, tag = "1")]
    pub key: Option<String>,
    /// Value of the entry.
    #[prost(string, optional, tag = "2")]
    pub value: Option<String>,
}

/// `ValueInfoProto`.
#[derive(Clone, PartialEq, Message)]
pub struct ValueInfoProto {
    /// Name of the value.
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// Type of the value.
    #[prost(message, optional, tag = "2")]
    pub kind: Option<TypeProto>,
}

/// `TypeProto` of a tensor.
#[derive(Clone, PartialEq, Message)]
pub struct TypeProto {
    /// Type of the tensor.
    #[prost(message, optional, tag = "1")]
    pub tensor_type: Option<type_proto::Tensor>,
}

/// Messages inside [`TypeProto`].
pub mod type_proto {
    use prost::Message;

    use super::TensorShapeProto;

    /// `TypeProto.Tensor`.
    #[derive(Clone, PartialEq, Message)]
    pub struct Tensor {
        /// Element type: [`super::DataType`].
        #[prost(int32, optional, tag = "1")]
        pub elem_type: Option<i32>,
        /// Shape of the tensor, if it is declared.
        #[prost(message, optional, tag = "2")]
        pub shape: Option<TensorShapeProto>,
    }
}

/// `TensorShapeProto`.
#[derive(Clone, PartialEq, Message)]
pub struct TensorShapeProto {
    /// Sizes of the axes.
    #[prost(message, repeated, tag = "1")]
    pub dim: Vec<tensor_shape_proto::Dimension>,
}

/// Messages inside [`TensorShapeProto`].
pub mod tensor_shape_proto {
    use prost::Message;

    /// `TensorShapeProto.Dimension`. One of the two fields is set.
    #[derive(Clone, PartialEq, Message)]
    pub struct Dimension {
        /// A fixed size.
        #[prost(int64, optional, tag = "1")]
        pub dim_value: Option<i64>,
        /// A symbolic size.
        #[prost(string, optional, tag = "2")]
        pub dim_param: Option<String>,
    }
}

/// Element types that lowered models use (`TensorProto.DataType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum DataType {
    /// 32-bit floating point.
    Float = 1,
    /// Unsigned 8-bit integer.
    Uint8 = 2,
    /// 8-bit integer.
    Int8 = 3,
    /// 32-bit integer.
    Int32 = 6,
    /// 64-bit integer.
    Int64 = 7,
    /// Boolean.
    Bool = 9,
    /// 16-bit floating point.
    Float16 = 10,
    /// `bfloat16`.
    Bfloat16 = 16,
}

/// A tensor whose values are in the model file.
pub fn constant(name: &str, data_type: DataType, dims: &[usize], raw_data: Vec<u8>) -> TensorProto {
    TensorProto {
        dims: dims.iter().map(|&size| size as i64).collect(),
        data_type: Some(data_type as i32),
        name: Some(name.into()),
        raw_data: Some(raw_data),
        ..TensorProto::default()
    }
}

/// A tensor whose values are the `length` bytes at `offset` in the file `location`.
pub fn external(
    name: &str,
    data_type: DataType,
    dims: &[usize],
    location: &str,
    (offset, length): (u64, u64),
) -> TensorProto {
    let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.into()), value: Some(value) };
    TensorProto {
        dims: dims.iter().map(|&size| size as i64).collect(),
        data_type: Some(data_type as i32),
        name: Some(name.into()),
        external_data: vec![
            entry("location", location.into()),
            entry("offset", offset.to_string()),
            entry("length", length.to_string()),
        ],
        data_location: Some(1),
        ..TensorProto::default()
    }
}

/// The declaration of an input or output. Without `dims`, the shape is left to shape inference.
pub fn value_info(name: &str, data_type: DataType, dims: Option<Vec<tensor_shape_proto::Dimension>>) -> ValueInfoProto {
    let tensor_type =
        type_proto::Tensor { elem_type: Some(data_type as i32), shape: dims.map(|dim| TensorShapeProto { dim }) };
    ValueInfoProto { name: Some(name.into()), kind: Some(TypeProto { tensor_type: Some(tensor_type) }) }
}

impl AttributeProto {
    /// A floating-point attribute.
    pub fn float(name: &str, value: f32) -> Self {
        Self { name: Some(name.into()), f: Some(value), kind: Some(1), ..Self::default() }
    }

    /// An integer attribute.
    pub fn int(name: &str, value: i64) -> Self {
        Self { name: Some(name.into()), i: Some(value), kind: Some(2), ..Self::default() }
    }

    /// A text attribute.
    pub fn text(name: &str, value: &str) -> Self {
        Self { name: Some(name.into()), s: Some(value.into()), kind: Some(3), ..Self::default() }
    }

    /// A tensor attribute.
    pub fn tensor(name: &str, value: TensorProto) -> Self {
        Self { name: Some(name.into()), t: Some(value), kind: Some(4), ..Self::default() }
    }

    /// A graph attribute.
    pub fn graph(name: &str, value: GraphProto) -> Self {
        Self { name: Some(name.into()), g: Some(value), kind: Some(5), ..Self::default() }
    }

    /// An attribute that is a list of integers.
    pub fn ints(name: &str, values: impl IntoIterator<Item = i64>) -> Self {
        Self { name: Some(name.into()), ints: values.into_iter().collect(), kind: Some(7), ..Self::default() }
    }
}
