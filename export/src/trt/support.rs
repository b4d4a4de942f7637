//! Reports which nodes of a graph TensorRT supports, before engines are built.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use eqim::{Result, ResultExt, files};
use eqim_engines::trt::{Profile, Target};
use prost::Message;
use serde::Serialize;

use super::builder;
use crate::inspect::count_operators;
use crate::onnx;

/// The support report of one graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Support {
    /// Name of the stage.
    pub stage: String,
    /// Number of nodes of the graph, without the nodes of loop bodies.
    pub nodes: usize,
    /// Number of products with weights and activations in INT8 (W8A8).
    pub w8a8: usize,
    /// Number of products with weights in INT8 and activations in another precision.
    pub weight_only: usize,
    /// Targets that the graph was compiled for. The engines were not written.
    pub targets: Vec<Target>,
    /// Nodes that are not supported.
    pub unsupported: Vec<Unsupported>,
}

/// A node that is not supported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unsupported {
    /// Name of the node in the graph, which begins with the scope of its weights; empty if TensorRT names no node.
    pub node: String,
    /// Operator of the node.
    pub operator: String,
    /// The GPU that does not support the node; `None` if no GPU supports it.
    pub target: Option<Target>,
    /// TensorRT's message.
    pub reason: String,
}

/// Checks every node of `model` with the parser. If all are supported, compiles the graph for each of `targets` with
/// the builder.
///
/// # Errors
/// If the library or the graph cannot be loaded. Nodes that are not supported are not errors. They are recorded in the
/// report.
pub fn check(stage: &str, model: &Path, profiles: &BTreeMap<String, Profile>, targets: &[Target]) -> Result<Support> {
    let bytes = files::read(model)?;
    let graph = onnx::ModelProto::decode(&bytes[..]).or_input(model.display())?;
    let graph = graph.graph.unwrap_or_default();
    let mut unsupported = builder::unsupported(model)?;
    // The builder can compile a graph only if the parser supports all of it.
    let targets = if unsupported.is_empty() { targets } else { &[] };
    for &target in targets {
        if let Err(error) = builder::compile(model, profiles, &[target], |_| {}) {
            let text = error.to_string();
            let reason = text.split_once("TensorRT: ").map_or(&text[..], |(_, reason)| reason);
            unsupported.push(refused(&graph, target, reason.to_string()));
        }
    }
    let mut operators = BTreeMap::new();
    count_operators(&graph, &mut operators);
    let [quantized, dequantized] =
        ["QuantizeLinear", "DequantizeLinear"].map(|operator| operators.get(operator).copied().unwrap_or_default());
    Ok(Support {
        stage: stage.to_string(),
        nodes: graph.node.len(),
        w8a8: quantized,
        // A W8A8 product dequantizes the weight and the quantized activations.
        weight_only: dequantized - 2 * quantized,
        targets: targets.to_vec(),
        unsupported,
    })
}

/// Finds the node that the builder's message names.
fn refused(graph: &onnx::GraphProto, target: Target, reason: String) -> Unsupported {
    let bodies = graph.node.iter().flat_map(|node| node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()));
    let nodes = bodies.flat_map(|body| &body.node).chain(&graph.node);
    let named = nodes.filter(|node| reason.contains(&format!("'{}'", node.name.as_deref().unwrap_or_default())));
    let node = named.max_by_key(|node| node.name.as_ref().map_or(0, String::len)).cloned().unwrap_or_default();
    Unsupported {
        node: node.name.unwrap_or_default(),
        operator: node.op_type.unwrap_or_default(),
        target: Some(target),
        reason,
    }
}

impl Support {
    /// Whether all nodes are supported.
    pub fn passed(&self) -> bool {
        self.unsupported.is_empty()
    }

    /// The report as text.
    pub fn text(&self) -> String {
        let targets: Vec<String> = self.targets.iter().map(Target::to_string).collect();
        let built = if targets.is_empty() { String::new() } else { format!(", compiles for {}", targets.join(", ")) };
        if self.passed() {
            let int8 = match (self.w8a8, self.weight_only) {
                (0, 0) => String::new(),
                (w8a8, weight_only) => format!(" (INT8: {w8a8} products W8A8, {weight_only} weight-only)"),
            };
            return format!("\t-[✓] {}.onnx: all {} nodes supported{int8}{built}", self.stage, self.nodes);
        }
        let mut text =
            format!("\t-[x] {}.onnx: {} of {} nodes not supported", self.stage, self.unsupported.len(), self.nodes);
        for node in &self.unsupported {
            let (name, target) = match (&node.node[..], node.target) {
                ("", Some(target)) => ("the graph".to_string(), format!(" on {target}")),
                (name, Some(target)) => (format!("{name} ({})", node.operator), format!(" on {target}")),
                (name, None) => (format!("{name} ({})", node.operator), String::new()),
            };
            // Writing to a string cannot fail.
            let _ = write!(text, "\n\t\t{name}{target}: {}\n\t\t  {}", node.reason, node.advice());
        }
        text
    }
}

impl Unsupported {
    /// Advice on how to avoid the problem.
    pub fn advice(&self) -> &'static str {
        match self.target {
            Some(_) if ["FP32", "datatypes: b16"].iter().any(|words| self.reason.contains(words)) => {
                "build in FP16, or omit this GPU from the targets"
            }
            Some(_) => "omit this GPU from the targets",
            None => "export the bundle with another operator set; if that does not help, report the node",
        }
    }
}
