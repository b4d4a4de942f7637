//! The contents of a bundle and the costs of its stages.

use std::collections::{BTreeMap, HashMap, HashSet};

use eqim::bundle::{Bundle, Manifest};
use eqim::model::{Stage, report_group};
use eqim::ops::cost::Row;
use eqim::{Result, ResultExt, files};
use eqim_engines::trt::{self, EngineSet, FOLDER};
use prost::Message;
use serde::Serialize;
use serde_json::Value;

use crate::onnx::{self, FunctionProto, NodeProto};

/// The report of `eqim-export inspect`.
#[derive(Debug, Serialize)]
pub struct Inspection {
    /// Content of `config.json`.
    pub manifest: Manifest,
    /// Number of tokens that the costs of the decoder and the encoder are for.
    pub tokens: usize,
    /// Number of Euler steps that the costs of the sampler are for.
    pub steps: usize,
    /// Graphs, in the order in which they run.
    pub stages: Vec<StageInspection>,
    /// TensorRT engines, if there are any.
    pub engines: Option<EngineSet>,
    /// Output of TensorRT's engine inspector, by stage; empty if no GPU can load the engines.
    pub fused: BTreeMap<&'static str, Value>,
}

/// Report of one graph.
#[derive(Debug, Serialize)]
pub struct StageInspection {
    /// Name of the stage.
    pub name: &'static str,
    /// Number of nodes of every operator, including loop bodies. A call of a function is one node.
    pub operators: BTreeMap<String, usize>,
    /// Size of the `.onnx` file in bytes.
    pub file_bytes: u64,
    /// Cost of one run with one row.
    pub cost: Row,
    /// Bytes of the weights that the graph uses.
    pub parameter_bytes: u64,
    /// Bytes of weights read in one run. Weights inside a loop count once per iteration.
    pub weight_bytes_read: u64,
    /// Cost by group of scopes ([`report_group`]).
    pub scopes: BTreeMap<String, Row>,
}

/// Reads a bundle, verifies every file, and counts the costs of its stages.
///
/// # Errors
/// [`eqim::Error::input`] if a file differs from the file that was exported.
pub fn inspect(bundle: &Bundle, tokens: usize, steps: usize) -> Result<Inspection> {
    bundle.manifest.weights.verify(&bundle.folder)?;
    let stages = Stage::ALL.iter().map(|&stage| report(bundle, stage, tokens, steps)).collect::<Result<_>>()?;
    let engines = EngineSet::open(bundle)?;
    for engine in engines.iter().flat_map(|set| set.engines.values()) {
        engine.file.verify(&bundle.folder.join(FOLDER))?;
    }
    let fused = match &engines {
        Some(set) if trt::ready().is_ok() => fused(bundle, set).unwrap_or_else(|error| {
            tracing::warn!("TensorRT's engine inspector is left out: {error}");
            BTreeMap::new()
        }),
        _ => BTreeMap::new(),
    };
    Ok(Inspection { manifest: bundle.manifest.clone(), tokens, steps, stages, engines, fused })
}

fn fused(bundle: &Bundle, set: &EngineSet) -> Result<BTreeMap<&'static str, Value>> {
    let layers = |stage: Stage| {
        let text = trt::inspected(bundle, set, stage)?;
        Ok((stage.name(), serde_json::from_str(&text).unwrap_or(Value::String(text))))
    };
    Stage::ALL.into_iter().map(layers).collect()
}

fn report(bundle: &Bundle, stage: Stage, tokens: usize, steps: usize) -> Result<StageInspection> {
    let path = bundle.graph_path(stage)?;
    let bytes = files::read(&path)?;
    let model = onnx::ModelProto::decode(&bytes[..]).or_input(path.display())?;
    let graph = model.graph.unwrap_or_default();
    let functions = &model.functions;
    let mut operators = BTreeMap::new();
    count_operators(&graph, &mut operators);
    let sizes: HashMap<&str, u64> = graph.initializer.iter().filter_map(stored_bytes).collect();

    let cost = stage.cost(&bundle.manifest.model, 1, tokens, steps)?;
    let mut scopes: BTreeMap<String, Row> = BTreeMap::new();
    for (scope, row) in cost.rows() {
        *scopes.entry(report_group(scope)).or_default() += *row;
    }
    let total = cost.total();
    Ok(StageInspection {
        name: stage.name(),
        operators,
        file_bytes: bytes.len() as u64,
        cost: total,
        parameter_bytes: sizes.values().sum(),
        weight_bytes_read: bytes_read(&graph.node, functions, &sizes, steps as u64),
        scopes,
    })
}

/// Name of a weight, and its size in bytes in the bundle's weights file.
fn stored_bytes(tensor: &onnx::TensorProto) -> Option<(&str, u64)> {
    let length = tensor.external_data.iter().find(|entry| entry.key.as_deref() == Some("length"))?;
    Some((tensor.name.as_deref()?, length.value.as_ref()?.parse().ok()?))
}

/// Bytes of the weights that nodes read: every weight once, and every weight of a loop body once for each of the `turns`
/// iterations. Calls of `functions` read what the nodes of their bodies do.
fn bytes_read(nodes: &[NodeProto], functions: &[FunctionProto], sizes: &HashMap<&str, u64>, turns: u64) -> u64 {
    let function = |node: &NodeProto| functions.iter().find(|function| function.name == node.op_type);
    let plain = nodes.iter().filter(|node| function(node).is_none());
    let used: HashSet<&str> = plain.flat_map(|node| &node.input).map(String::as_str).collect();
    let own: u64 = used.iter().filter_map(|name| sizes.get(name)).sum();
    let bodies = nodes.iter().flat_map(|node| node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()));
    let loops = bodies.map(|body| turns * bytes_read(&body.node, functions, sizes, turns)).sum::<u64>();
    let calls = nodes.iter().filter_map(|node| {
        let function = function(node)?;
        let inputs = function.input.iter().zip(&node.input);
        let sizes = inputs.filter_map(|(inner, outer)| Some((inner.as_str(), *sizes.get(outer.as_str())?))).collect();
        Some(bytes_read(&function.node, functions, &sizes, turns))
    });
    own + loops + calls.sum::<u64>()
}

/// Counts nodes by operator, including the nodes of loop bodies.
pub(crate) fn count_operators(graph: &onnx::GraphProto, operators: &mut BTreeMap<String, usize>) {
    for node in &graph.node {
        *operators.entry(node.op_type.clone().unwrap_or_default()).or_default() += 1;
        for body in node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()) {
            count_operators(body, operators);
        }
    }
}
