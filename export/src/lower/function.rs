//! Functions of the model as functions of the graph (ONNX `FunctionProto`).

use std::collections::HashMap;

use eqim::ops::{function, scoped};
use eqim::{Error, Result};

use super::{Frame, Lower, Value};
use crate::onnx::{FunctionProto, GraphProto, NodeProto};

/// The call of a function whose body is being written.
pub(super) struct Call {
    name: String,
    /// Values that the caller passes.
    arguments: Vec<Value>,
    /// Full names of the weights that the body uses, in the order of their first use. They are inputs too.
    weights: Vec<String>,
    /// Name of the scope of the call, with a dot at its end.
    prefix: String,
    /// Number of scopes outside of the function.
    pub(super) scopes: usize,
}

impl Call {
    /// Adds a weight to the inputs. Returns its name in the body.
    pub(super) fn weight<'a>(&mut self, name: &'a str) -> &'a str {
        self.weights.push(name.into());
        self.local(name)
    }

    fn local<'a>(&self, weight: &'a str) -> &'a str {
        weight.strip_prefix(&self.prefix).unwrap_or(weight)
    }
}

/// Name of an input in the body.
fn input(index: usize) -> String {
    format!("input_{index}")
}

impl Frame {
    pub(super) fn new(call: Option<Call>) -> Self {
        Self { graphs: vec![GraphProto::default()], sizes: vec![HashMap::new()], call, ..Self::default() }
    }
}

impl Lower<'_> {
    /// Begins the body of a function. Returns its inputs.
    pub(super) fn open(&mut self, name: &str, arguments: &[&Value]) -> Vec<Value> {
        self.frames.push(Frame::new(Some(Call {
            name: name.into(),
            arguments: arguments.iter().map(|&argument| argument.clone()).collect(),
            weights: vec![],
            prefix: scoped(&self.scope, ""),
            scopes: self.scope.len(),
        })));
        let inputs = arguments.iter().enumerate();
        inputs.map(|(index, argument)| Value { name: input(index), data_type: argument.data_type }).collect()
    }

    /// Ends the body of the innermost function, and appends a node that calls it. Returns the outputs of the node.
    pub(super) fn close(&mut self, outputs: Vec<Value>) -> Result<Vec<Value>> {
        // A function cannot give one value twice, nor an input.
        let outputs: Vec<Value> =
            outputs.iter().map(|output| self.node("Identity", &[output], vec![], output.data_type)).collect();
        let opset_import = self.opset_import(true);
        let frame = self.frames.pop();
        let Some(Frame { graphs, call: Some(call), .. }) = frame else {
            return Err(Error::run("function", "was not begun"));
        };
        let weights = call.weights.iter().map(|weight| call.local(weight).to_string());
        let body = FunctionProto {
            name: None,
            input: (0..call.arguments.len()).map(input).chain(weights).collect(),
            output: outputs.iter().map(|output| output.name.clone()).collect(),
            node: graphs.into_iter().flat_map(|graph| graph.node).collect(),
            opset_import,
            domain: Some(function::DOMAIN.into()),
        };
        let name = self.define(&call.name, body);
        let weights = call.weights.iter().map(|weight| self.stored(weight)).collect::<Result<Vec<_>>>()?;
        let node = self.local(&call.name);
        let node = self.unique(node);
        let types = outputs.iter().map(|output| output.data_type).enumerate();
        let values: Vec<Value> =
            types.map(|(index, data_type)| Value { name: format!("{node}_output_{index}"), data_type }).collect();
        self.graph().node.push(NodeProto {
            input: call.arguments.iter().chain(&weights).map(|value| value.name.clone()).collect(),
            output: values.iter().map(|value| value.name.clone()).collect(),
            name: Some(node),
            op_type: Some(name),
            attribute: vec![],
            domain: Some(function::DOMAIN.into()),
        });
        Ok(values)
    }

    /// Defines a function, if there is none with the same body. Functions that differ get different names.
    fn define(&mut self, name: &str, body: FunctionProto) -> String {
        let mut names = (0..).map(|variant| function::variant(name, variant));
        let named = |name: &String| FunctionProto { name: Some(name.clone()), ..body.clone() };
        let is_other =
            |defined: &FunctionProto, name: &String| defined.name.as_ref() == Some(name) && *defined != named(name);
        let name = names.find(|name| !self.defined.iter().any(|defined| is_other(defined, name))).unwrap_or_default();
        if !self.defined.iter().any(|defined| defined.name.as_ref() == Some(&name)) {
            self.defined.push(named(&name));
        }
        name
    }
}
