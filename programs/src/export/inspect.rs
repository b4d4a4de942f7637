//! `eqim-export inspect`: prints the contents of a bundle, as text or JSON.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use eqim::bundle::{Bundle, Manifest};
use eqim::model::{Dimension, Stage, ValueInfo, ValueKind};
use eqim::{Config, Result, ResultExt};
use eqim_cli::table;
use eqim_engines::trt::{EngineRecord, EngineSet, Target};
use eqim_export::inspect::{Inspection, StageInspection, inspect};
use serde_json::Value;

/// Show the graphs, parameters and costs of a bundle, and verify every file.
#[derive(Args)]
pub struct Inspect {
    /// Bundle to show: a folder written by eqim-export onnx
    bundle: PathBuf,
    /// Number of tokens for the costs of the decoder and encoder
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    tokens: u32,
    /// Number of Euler steps for the costs of the sampler [default: the model's]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: Option<u32>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Prints the report of a bundle.
///
/// # Errors
/// [`eqim::Error::input`] if a file differs from the file that was exported.
pub fn run(arguments: &Inspect) -> Result<()> {
    let bundle = Bundle::open(&arguments.bundle)?;
    let steps = arguments.steps.map_or(bundle.manifest.model.generator.steps, |steps| steps as usize);
    let inspection = inspect(&bundle, arguments.tokens as usize, steps)?;
    if arguments.json {
        let json = serde_json::to_string_pretty(&inspection).or_run("--json")?;
        return eqim_cli::print(json);
    }
    eqim_cli::print(text(&inspection))
}

/// The report as text.
fn text(inspection: &Inspection) -> String {
    let Inspection { manifest, tokens, steps, stages, engines, fused } = inspection;
    let costs = format!(
        "Costs of one run of one row (decoder, encoder: {tokens} tokens; sampler: {steps} steps, no guidance):"
    );
    let mut parts = vec![model(manifest), costs, costs_of(stages)];
    parts.extend(Stage::ALL.iter().zip(stages).map(|(stage, found)| graph(stage, found, &manifest.model)));
    parts.extend(engines.as_ref().map(|engines| show_engines(engines, fused)));
    parts.join("\n\n")
}

fn model(manifest: &Manifest) -> String {
    let (g, t) = (&manifest.model.generator, &manifest.model.tokenizer);
    let mut lines = vec![format!("bundle of {}, {}, opset {}", manifest.producer, manifest.precision, manifest.opset)];
    lines.extend(
        manifest.quantization.as_ref().map(|int8| {
            format!("INT8 for {}: {} products of {}", int8.target, int8.scopes.len(), int8.stages.join(", "))
        }),
    );
    lines.push(format!(
        "generator: {} classes, width {}, {} blocks, {} heads, window {}, {} condition tokens, token of {} values",
        g.class_num, g.dim, g.depth, g.heads, g.window, g.buffer, g.embed
    ));
    lines.push(format!(
        "flow head: width {}, {} blocks, {} steps by default; vae_norm {}",
        g.flow_dim, g.flow_depth, g.steps, g.vae_norm
    ));
    let channels: Vec<usize> = t.decoder.levels.iter().map(|level| level.channels).collect();
    lines.push(format!(
        "tokenizer: tokens of {}×{} pixels, {} rows, levels of {channels:?} channels",
        t.token_width(),
        t.image_height(),
        t.rows,
    ));
    lines.push(format!("weights: {}B in {}, sha256 verified", short(manifest.weights.bytes), manifest.weights.file));
    lines.join("\n")
}

fn costs_of(stages: &[StageInspection]) -> String {
    let row = |stage: &StageInspection| {
        let bytes = [stage.parameter_bytes, stage.weight_bytes_read].map(|bytes| short(bytes) + "B");
        let nodes: usize = stage.operators.values().sum();
        let mut row = vec![stage.name.into(), short(stage.cost.parameters)];
        row.extend(bytes);
        row.extend([short(stage.cost.multiply_adds), nodes.to_string()]);
        row
    };
    table::text(&["stage", "parameters", "bytes", "weights read", "multiply-adds", "nodes"], stages.iter().map(row))
}

fn graph(stage: &Stage, found: &StageInspection, config: &Config) -> String {
    let operators: Vec<String> = found.operators.iter().map(|(name, count)| format!("{name} {count}")).collect();
    let scopes = found.scopes.iter().filter(|(_, row)| row.multiply_adds > 0);
    let rows = scopes.map(|(scope, row)| vec![scope.clone(), short(row.parameters), short(row.multiply_adds)]);
    [
        format!("{}.onnx, {}B", found.name, short(found.file_bytes)),
        format!("inputs:    {}", values(&stage.inputs(config))),
        format!("outputs:   {}", values(&stage.outputs(config))),
        format!("operators: {}", operators.join(", ")),
        table::text(&["scope", "parameters", "multiply-adds"], rows),
    ]
    .join("\n")
}

fn show_engines(set: &EngineSet, fused: &BTreeMap<&str, Value>) -> String {
    let targets: Vec<String> = set.targets.iter().map(Target::to_string).collect();
    let mut title = format!("Engines of {} for {}, built by {}", set.tensorrt, targets.join(", "), set.producer);
    if fused.is_empty() {
        title += "\nThe layers are those before fusion: TensorRT lists fused layers only on a GPU that can load the engines.";
    }
    let engine = |stage: Stage| Some(show_engine(stage, set.engines.get(stage.name())?, &set.model, fused));
    [title].into_iter().chain(Stage::ALL.into_iter().filter_map(engine)).collect::<Vec<_>>().join("\n\n")
}

fn show_engine(stage: Stage, engine: &EngineRecord, config: &Config, fused: &BTreeMap<&str, Value>) -> String {
    let precision = engine.precision.to_string();
    let precision = if engine.int8 { format!("int8 and {precision}") } else { precision };
    let (size, peak) = (short(engine.file.bytes), short(engine.peak_bytes));
    let mut lines = vec![
        format!("{}, {precision}, {size}B, built in {:.2} s with {peak}B", engine.file.file, engine.seconds),
        format!("inputs:    {}", values(&stage.inputs(config))),
        format!("outputs:   {}", values(&stage.outputs(config))),
    ];
    let profiles = engine.profiles.iter().map(|(input, profile)| {
        let [min, opt, max] = [&profile.min, &profile.opt, &profile.max].map(|shape| dimensions(shape));
        let group = input.split_once('.').map_or(&input[..], |(group, _)| group);
        format!("profile:   {group}: {min} … {opt} … {max}")
    });
    for profile in profiles {
        // The caches of all blocks have the same shape.
        if !lines.contains(&profile) {
            lines.push(profile);
        }
    }
    let layers = engine.layers.iter().map(|layers| format!("{} {} {}", layers.kind, layers.precision, layers.count));
    lines.push(format!("layers:    {}", layers.collect::<Vec<_>>().join(", ")));
    lines.extend(fused.get(stage.name()).map(|fused| format!("fused:     {fused}")));
    lines.join("\n")
}

fn dimensions(shape: &[i64]) -> String {
    shape.iter().map(i64::to_string).collect::<Vec<_>>().join("x")
}

fn values(infos: &[ValueInfo]) -> String {
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

/// A number with an SI prefix: 1.23 G.
fn short(value: u64) -> String {
    let (scale, unit) = match value {
        0..1_000 => return value.to_string(),
        1_000..1_000_000 => (1e3, "k"),
        1_000_000..1_000_000_000 => (1e6, "M"),
        _ => (1e9, "G"),
    };
    format!("{:.2} {unit}", value as f64 / scale)
}
