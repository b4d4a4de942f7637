//! Checks that a graph has the inputs and outputs of its stage, so that no other graph can be run in its place.

use eqim::bundle::Precision;
use eqim::model::{Dimension, Sizes, ValueInfo, ValueKind};
use eqim::{Error, Result};
use ort::value::{DynValue, Outlet, TensorElementType, ValueType};

/// An input or output that a graph declares.
#[derive(Debug, PartialEq, Eq)]
struct Port {
    name: String,
    /// `None` for a value that is not a tensor.
    tensor: Option<(TensorElementType, Vec<i64>)>,
}

impl std::fmt::Display for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some((kind, shape)) = &self.tensor else { return write!(f, "{}, which is no tensor", self.name) };
        let sizes = shape.iter().map(|&size| if size < 0 { "?".into() } else { size.to_string() });
        write!(f, "{} of {kind} [{}]", self.name, sizes.collect::<Vec<String>>().join(", "))
    }
}

impl Port {
    fn found(name: &str, found: &ValueType) -> Self {
        let tensor = match found {
            ValueType::Tensor { ty, shape, .. } => Some((*ty, shape.to_vec())),
            ValueType::Sequence(_) | ValueType::Map { .. } | ValueType::Optional(_) => None,
        };
        Self { name: name.to_string(), tensor }
    }

    /// What an input or output has to be, with these sizes of its axes.
    fn expected(info: &ValueInfo, precision: Precision, size: impl FnMut(&Dimension) -> i64) -> Self {
        let shape = info.shape.iter().map(size).collect();
        Self { name: info.name.clone(), tensor: Some((element_type(info.kind, precision), shape)) }
    }
}

fn element_type(kind: ValueKind, precision: Precision) -> TensorElementType {
    match (kind, precision) {
        (ValueKind::Integer, _) => TensorElementType::Int64,
        (ValueKind::Float, _) | (ValueKind::Cache, Precision::Fp32) => TensorElementType::Float32,
        (ValueKind::Cache, Precision::Fp16) => TensorElementType::Float16,
        (ValueKind::Cache, Precision::Bf16) => TensorElementType::Bfloat16,
    }
}

/// Checks the names, element types and shapes that the graph `file` declares. `what` is `input` or `output`.
///
/// # Errors
/// [`Error::input`] naming the graph and the first value that differs.
pub(super) fn check_declared(
    file: &str,
    what: &str,
    found: &[Outlet],
    expected: &[ValueInfo],
    precision: Precision,
) -> Result<()> {
    let bad = |problem: String| Err(Error::input(file, format!("{problem}: export the bundle again")));
    if found.len() != expected.len() {
        return bad(format!("has {} {what}s, expected {}", found.len(), expected.len()));
    }
    let size = |axis: &Dimension| match *axis {
        Dimension::Fixed(size) => size as i64,
        Dimension::Symbolic(_) => -1,
    };
    let found = found.iter().map(|outlet| Port::found(outlet.name(), outlet.dtype()));
    let expected = expected.iter().map(|info| Port::expected(info, precision, size));
    match found.zip(expected).find(|(found, expected)| found != expected) {
        Some((found, expected)) => bad(format!("has the {what} {found}, expected {expected}")),
        None => Ok(()),
    }
}

/// Checks the element types and shapes of the values that the graph `file` gave. They can differ from what it declares,
/// because a graph can compute shapes.
///
/// # Errors
/// [`Error::run`] naming the graph and the first value that differs.
pub(super) fn check_given(
    file: &str,
    given: &[DynValue],
    expected: &[ValueInfo],
    sizes: &Sizes,
    precision: Precision,
) -> Result<()> {
    for (value, info) in given.iter().zip(expected) {
        let found = Port::found(&info.name, value.dtype());
        let expected = Port::expected(info, precision, |axis| axis.size(sizes) as i64);
        if found != expected {
            return Err(Error::run(file, format!("gave {found}, expected {expected}: export the bundle again")));
        }
    }
    Ok(())
}
