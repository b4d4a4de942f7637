//! What a bundle holds and what its stages cost.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write;

use eqim::bundle::{Bundle, Manifest};
use eqim::model::{Dimension, Stage, ValueInfo, ValueKind, report_group};
use eqim::ops::cost::Row;
use eqim::{Result, ResultExt, files};
use eqim_engines::trt::{self, EngineSet, FOLDER, Target};
use prost::Message;
use serde::Serialize;
use serde_json::Value;

use crate::onnx;

/// Everything that `eqim-export inspect` tells.
#[derive(Debug, Serialize)]
pub struct Inspection {
    /// What `config.json` says.
    pub manifest: Manifest,
    /// Length that decoder and encoder are counted for.
    pub tokens: usize,
    /// Euler steps that the sampler is counted for.
    pub steps: usize,
    /// Graphs in the order of a run.
    pub stages: Vec<StageInspection>,
    /// TensorRT engines, when there are any.
    pub engines: Option<EngineSet>,
    /// What TensorRT's engine inspector tells of them, by stage; empty where no GPU can load them.
    pub fused: BTreeMap<&'static str, Value>,
}

/// One graph.
#[derive(Debug, Serialize)]
pub struct StageInspection {
    /// Its name.
    pub name: &'static str,
    /// Number of nodes of every operator, loop bodies included.
    pub operators: BTreeMap<String, usize>,
    /// Size of the `.onnx` file.
    pub file_bytes: u64,
    /// Cost of one run of one row.
    pub cost: Row,
    /// Bytes of the weights it uses.
    pub parameter_bytes: u64,
    /// Bytes of weights read in one run, again for every turn of a loop.
    pub weight_bytes_read: u64,
    /// Cost by top-level scope.
    pub scopes: BTreeMap<String, Row>,
}

/// Reads a bundle, verifying every file, and counts its stages.
///
/// # Errors
/// [`eqim::Error::input`] for a file that is not what was exported.
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
        weight_bytes_read: bytes_read(&graph, &sizes, steps as u64),
        scopes,
    })
}

/// Name and length of a weight in the bundle's file of weights.
fn stored_bytes(tensor: &onnx::TensorProto) -> Option<(&str, u64)> {
    let length = tensor.external_data.iter().find(|entry| entry.key.as_deref() == Some("length"))?;
    Some((tensor.name.as_deref()?, length.value.as_ref()?.parse().ok()?))
}

/// Bytes of the weights that a graph's nodes use, once each, and again for each of the `turns` of a loop inside.
fn bytes_read(graph: &onnx::GraphProto, sizes: &HashMap<&str, u64>, turns: u64) -> u64 {
    let used: HashSet<&str> = graph.node.iter().flat_map(|node| &node.input).map(String::as_str).collect();
    let own: u64 = used.iter().filter_map(|name| sizes.get(name)).sum();
    let bodies = graph.node.iter().flat_map(|node| node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()));
    own + bodies.map(|body| turns * bytes_read(body, sizes, turns)).sum::<u64>()
}

/// Counts nodes by operator, those of loop bodies included.
pub(crate) fn count_operators(graph: &onnx::GraphProto, operators: &mut BTreeMap<String, usize>) {
    for node in &graph.node {
        *operators.entry(node.op_type.clone().unwrap_or_default()).or_default() += 1;
        for body in node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()) {
            count_operators(body, operators);
        }
    }
}

fn show_ports(infos: &[ValueInfo]) -> String {
    let caches = |info: &&ValueInfo| info.kind == ValueKind::Cache;
    let shape = |info: &ValueInfo| {
        let axes = info.shape.iter().map(|axis| match axis {
            Dimension::Fixed(size) => size.to_string(),
            Dimension::Symbolic(symbol) => symbol.name().to_string(),
        });
        axes.collect::<Vec<_>>().join(",")
    };
    let mut shown: Vec<String> =
        infos.iter().filter(|info| !caches(info)).map(|info| format!("{} [{}]", info.name, shape(info))).collect();
    let mut groups: BTreeMap<&str, Vec<&ValueInfo>> = BTreeMap::new();
    for info in infos.iter().filter(caches) {
        groups.entry(info.name.split('.').next().unwrap_or_default()).or_default().push(info);
    }
    for (group, infos) in groups {
        shown.push(format!("{group}.0..{}.key/value [{}]", infos.len() / 2 - 1, shape(infos[0])));
    }
    shown.join(", ")
}

/// A number with a unit prefix: 1.23 G.
fn short(value: u64) -> String {
    let (scale, unit) = match value {
        0..1_000 => return value.to_string(),
        1_000..1_000_000 => (1e3, "k"),
        1_000_000..1_000_000_000 => (1e6, "M"),
        _ => (1e9, "G"),
    };
    format!("{:.2} {unit}", value as f64 / scale)
}

impl Inspection {
    /// The report as text.
    pub fn text(&self) -> String {
        let manifest = &self.manifest;
        let (g, t) = (&manifest.model.generator, &manifest.model.tokenizer);
        let mut text = String::new();
        let mut line = |words: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{words}");
        };
        line(format!("bundle of {}, {}, opset {}", manifest.producer, manifest.precision, manifest.opset));
        if let Some(quantization) = &manifest.quantization {
            line(format!(
                "INT8 for {}: {} products of {}",
                quantization.target,
                quantization.scopes.len(),
                quantization.stages.join(", ")
            ));
        }
        line(format!(
            "generator: {} classes, width {}, {} blocks, {} heads, window {}, {} condition tokens, token of {} values",
            g.class_num, g.dim, g.depth, g.heads, g.window, g.buffer, g.embed
        ));
        line(format!(
            "flow head: width {}, {} blocks, {} steps by default; vae_norm {}",
            g.flow_dim, g.flow_depth, g.steps, g.vae_norm
        ));
        line(format!(
            "tokenizer: tokens of {}×{} pixels, {} rows, levels of {:?} channels",
            t.token_width(),
            t.image_height(),
            t.rows,
            t.decoder.levels.iter().map(|level| level.channels).collect::<Vec<_>>()
        ));
        line(format!("weights: {}B in {}, sha256 verified", short(manifest.weights.bytes), manifest.weights.file));
        line(format!(
            "\nCosts of one run of one row (decoder, encoder: {} tokens; sampler: {} steps, no guidance):\n",
            self.tokens, self.steps
        ));
        line(format!(
            "{:<18}{:>12}{:>12}{:>14}{:>14}{:>8}",
            "stage", "parameters", "bytes", "weights read", "multiply-adds", "nodes"
        ));
        for stage in &self.stages {
            line(format!(
                "{:<18}{:>12}{:>12}{:>14}{:>14}{:>8}",
                stage.name,
                short(stage.cost.parameters),
                short(stage.parameter_bytes) + "B",
                short(stage.weight_bytes_read) + "B",
                short(stage.cost.multiply_adds),
                stage.operators.values().sum::<usize>()
            ));
        }
        for (stage, report) in Stage::ALL.iter().zip(&self.stages) {
            line(format!("\n{}.onnx, {}B", report.name, short(report.file_bytes)));
            line(format!("  inputs:    {}", show_ports(&stage.inputs(&manifest.model))));
            line(format!("  outputs:   {}", show_ports(&stage.outputs(&manifest.model))));
            let operators: Vec<String> =
                report.operators.iter().map(|(name, count)| format!("{name} {count}")).collect();
            line(format!("  operators: {}", operators.join(", ")));
            for (scope, row) in report.scopes.iter().filter(|(_, row)| row.multiply_adds > 0) {
                let (weights, products) = (short(row.parameters), short(row.multiply_adds));
                line(format!("  {scope:<40} {weights:>10} parameters {products:>10} multiply-adds"));
            }
        }
        if let Some(engines) = &self.engines {
            text += &show_engines(engines, &self.fused);
        }
        text
    }
}

fn show_engines(set: &EngineSet, fused: &BTreeMap<&str, Value>) -> String {
    let targets: Vec<String> = set.targets.iter().map(Target::to_string).collect();
    let mut text = format!("\nEngines of {} for {}, built by {}\n", set.tensorrt, targets.join(", "), set.producer);
    if fused.is_empty() {
        text +=
            "Layers are those before fusion: TensorRT tells what it fused only where a GPU of these can load them.\n";
    }
    for stage in Stage::ALL {
        let Some(engine) = set.engines.get(stage.name()) else { continue };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "\n{}, {}, {}B, built in {:.2} s with {}B",
            engine.file.file,
            if engine.int8 { format!("int8 and {}", engine.precision) } else { engine.precision.to_string() },
            short(engine.file.bytes),
            engine.seconds,
            short(engine.peak_bytes)
        );
        let _ = writeln!(text, "  inputs:    {}", show_ports(&stage.inputs(&set.model)));
        let _ = writeln!(text, "  outputs:   {}", show_ports(&stage.outputs(&set.model)));
        let mut shown: Vec<String> = vec![];
        for (input, profile) in &engine.profiles {
            let [min, opt, max] = [&profile.min, &profile.opt, &profile.max].map(|shape| dimensions(shape));
            let group = input.split_once('.').map_or(&input[..], |(group, _)| group);
            let words = format!("{group}: {min} … {opt} … {max}");
            if !shown.contains(&words) {
                shown.push(words);
            }
        }
        for profile in shown {
            let _ = writeln!(text, "  profile:   {profile}");
        }
        let layers: Vec<String> = engine
            .layers
            .iter()
            .map(|layers| format!("{} {} {}", layers.kind, layers.precision, layers.count))
            .collect();
        let _ = writeln!(text, "  layers:    {}", layers.join(", "));
        if let Some(fused) = fused.get(stage.name()) {
            let _ = writeln!(text, "  fused:     {fused}");
        }
    }
    text
}

fn dimensions(shape: &[i64]) -> String {
    shape.iter().map(i64::to_string).collect::<Vec<_>>().join("x")
}
