//! How far FP16 lies from FP32 along rollouts, and that graphs that overflow are reported.

use std::path::Path;

use eqim::candle::CandleEngine;
use eqim::checkpoint::{self, Hints, WeightSet};
use eqim::weights::Weights;
use eqim::{Config, Error};
use eqim_engines::bundle::Precision;
use eqim_engines::native::find_onnxruntime;
use eqim_export::drift::{Drift, ImageDrift, LEAST_PSNR, LENGTHS, measure};
use eqim_export::lower::NEWEST_OPSET;
use eqim_export::validate::default_tolerance;
use eqim_export::write::{Options, draft};

/// Both sets of golden fixtures, and their attention heads.
const FIXTURES: [(&str, usize); 2] = [("", 2), ("other", 4)];

fn fixture((folder, heads): (&str, usize)) -> (Config, Weights) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(folder);
    let hints = Hints { heads: Some(heads), ..Hints::default() };
    let [generator, tokenizer] = ["generator.pth", "tokenizer.ckpt"].map(|file| folder.join(file));
    checkpoint::load(&generator, &tokenizer, WeightSet::Ema, &hints).unwrap()
}

/// The weights with those whose names end in `suffix` multiplied by `factor`.
fn scaled(weights: &Weights, suffix: &str, factor: f64) -> Weights {
    let mut scaled = Weights::default();
    let mut found = false;
    for (name, tensor) in weights.iter() {
        let this = name.ends_with(suffix);
        found |= this;
        let tensor = if this { (tensor * factor).unwrap() } else { tensor.clone() };
        scaled.insert(name.to_string(), &tensor).unwrap();
    }
    assert!(found, "no weight {suffix}");
    scaled
}

/// Drift of graphs with `weights` in a precision from FP32 with `reference`; its lines are checked and shown.
fn drift(
    config: &Config,
    (weights, reference): (&Weights, &Weights),
    precision: Precision,
    lengths: &[usize],
) -> eqim::Result<Drift> {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { precision, opset: NEWEST_OPSET };
    let draft = draft(&folder.path().join("bundle"), config, weights, options, |_| {})?;
    let library = find_onnxruntime().unwrap_or_else(|problem| panic!("{problem}"));
    let reference = CandleEngine::new(config.clone(), reference.clone());
    let atol = default_tolerance(precision);
    let mut lines = vec![];
    let drift = measure(&draft.bundle, &reference, &library, lengths, atol, |line| lines.push(line.to_string()))?;
    println!("{precision}\n{}", lines.join("\n"));
    assert_eq!(drift.rollouts.iter().map(|rollout| rollout.tokens).collect::<Vec<_>>(), lengths);
    assert_eq!(lines.len(), lengths.len());
    for (rollout, line) in drift.rollouts.iter().zip(&lines) {
        assert!(line.starts_with(if rollout.passed { "\t-[✓] " } else { "\t-[x] " }), "{line}");
    }
    Ok(drift)
}

#[test]
fn scan() {
    let (config, weights) = fixture(FIXTURES[0]);
    for (n, t) in weights
        .iter()
        .filter(|(n, _)| n.starts_with("z_proj") || n.contains("blocks.1.mlp") || n.contains("input_proj"))
    {
        println!("{n} {:?} {}", t.dims(), t.abs().unwrap().max_all().unwrap());
    }
    for (s, factor) in [
        ("z_proj.weight", 8e4),
        ("z_proj.weight", 1e5),
        ("z_proj.weight", 1.3e5),
        ("z_proj.weight", 1.7e5),
        ("z_proj.weight", 2.5e5),
        ("blocks.1.mlp.fc1.weight", 1e4),
        ("blocks.1.mlp.fc1.weight", 1e5),
        ("input_proj.weight", 1e5),
    ] {
        let w = scaled(&weights, s, factor);
        println!("{s} {factor} {:?}", drift(&config, (&w, &w), Precision::Fp16, &[2, 3, 5, 16, 64]).map(|_| ()));
    }
}
