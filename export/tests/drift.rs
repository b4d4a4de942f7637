//! Drift of FP16 from FP32 over rollouts, and reports of graphs that overflow.

use std::path::Path;

use eqim::Config;
use eqim::bundle::Precision;
use eqim::checkpoint::{self, Hints, WeightSet};
use eqim::engine::candle::CandleEngine;
use eqim::weights::Weights;
use eqim_engines::native::find_onnxruntime;
use eqim_export::drift::{Drift, LEAST_PSNR, LENGTHS, measure};
use eqim_export::lower::NEWEST_OPSET;
use eqim_export::validate::default_tolerance;
use eqim_export::write::{Options, draft};

/// Folders of both sets of golden fixtures, and their numbers of attention heads.
const FIXTURES: [(&str, usize); 2] = [("", 2), ("other", 4)];

fn fixture((folder, heads): (&str, usize)) -> (Config, Weights) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(folder);
    let hints = Hints { heads: Some(heads), ..Hints::default() };
    let [generator, tokenizer] = ["generator.pth", "tokenizer.ckpt"].map(|file| folder.join(file));
    checkpoint::load(&generator, &tokenizer, WeightSet::Ema, &hints).unwrap()
}

/// A copy of the weights in which every tensor whose name ends in `suffix` is multiplied by `factor`.
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

/// Drift of graphs with `weights` in a precision from `reference` in FP32. Checks and prints the lines of the report.
fn drift(
    config: &Config,
    (weights, reference): (&Weights, &Weights),
    precision: Precision,
    lengths: &[usize],
) -> eqim::Result<Drift> {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { precision, opset: NEWEST_OPSET, policy: None, functions: true };
    let draft = draft(&folder.path().join("bundle"), config, weights, options, |_| {})?;
    let library = find_onnxruntime().unwrap_or_else(|problem| panic!("{problem}"));
    let reference = CandleEngine::new(config.clone(), reference.clone());
    let atol = default_tolerance(precision);
    let mut lines = vec![];
    let drift = measure(&draft.bundle, &reference, &library, lengths, atol, |line| lines.push(line.to_string()))?;
    println!("{precision}\n{}", lines.join("\n"));
    assert_eq!(drift.rollouts.iter().map(|rollout| rollout.tokens).collect::<Vec<_>>(), lengths);
    assert_eq!(lines.len(), lengths.len() + usize::from(precision == Precision::Fp16));
    for (rollout, line) in drift.rollouts.iter().zip(&lines) {
        assert!(line.starts_with(if rollout.passed { "\t-[✓] " } else { "\t-[x] " }), "{line}");
    }
    Ok(drift)
}

#[test]
fn fp32_does_not_drift() {
    for (config, weights) in FIXTURES.map(fixture) {
        let drift = drift(&config, (&weights, &weights), Precision::Fp32, &LENGTHS).unwrap();
        assert!(drift.passed() && drift.largest_activation.is_none());
        for rollout in &drift.rollouts {
            // Measured: 2.6e-6 for tokens, and one level for a few pixels at a rounding boundary.
            assert!(rollout.largest.unwrap() < 1e-5, "{rollout:?}");
            let image = rollout.image.as_ref().unwrap();
            assert!(image.largest <= 1 && image.mean < 1e-3, "{rollout:?}");
        }
    }
}

#[test]
fn fp16_drifts_a_little() {
    for (config, weights) in FIXTURES.map(fixture) {
        let drift = drift(&config, (&weights, &weights), Precision::Fp16, &LENGTHS).unwrap();
        assert!(drift.passed(), "{drift:?}");
        assert!(drift.largest_activation.is_some());
        for rollout in &drift.rollouts {
            // Measured: 2.5e-4 to 3.6e-3, and 61.7 dB. A drift below 1e-5 would mean that the graphs are in FP32.
            let (largest, mean) = (rollout.largest.unwrap(), rollout.mean.unwrap());
            assert!((1e-5..8e-3).contains(&largest) && mean < 1e-3 && mean < largest, "{rollout:?}");
            let image = rollout.image.as_ref().unwrap();
            assert!(image.largest <= 1 && image.psnr.unwrap() > 58.0, "{rollout:?}");
        }
    }
}

/// Keys and values are stored in FP16, so ONNX Runtime overflows there. The keys and values just before token 16 are
/// the first beyond the FP16 range.
#[test]
fn an_overflow_of_the_cache_is_found_where_it_happens() {
    let (config, weights) = fixture(FIXTURES[0]);
    let weights = scaled(&weights, "blocks.1.attn.qkv.weight", 2.7e4);
    let drift = drift(&config, (&weights, &weights), Precision::Fp16, &[16, 17, 64]).unwrap();
    assert!(!drift.passed());
    let [before, after @ ..] = &drift.rollouts[..] else { panic!("{drift:?}") };
    assert!(before.passed && before.first_not_finite.is_none() && before.image.is_some(), "{before:?}");
    for rollout in after {
        assert_eq!((rollout.first_not_finite, rollout.passed), (Some(16), false));
        assert!(rollout.largest.is_none() && rollout.mean.is_none() && rollout.image.is_none(), "{rollout:?}");
    }
}

/// ONNX Runtime computes the block in FP32, so the tokens pass. Only the largest activation shows the overflow.
#[test]
fn an_overflow_inside_a_block_is_found() {
    let (config, weights) = fixture(FIXTURES[0]);
    let weights = scaled(&weights, "blocks.1.mlp.fc1.weight", 1e5);
    let drift = drift(&config, (&weights, &weights), Precision::Fp16, &[2]).unwrap();
    assert!(drift.largest_activation.as_ref().unwrap().1 > 65504.0, "{drift:?}");
    assert!(!drift.passed());
}

#[test]
fn another_decoder_and_other_tokens_fail() {
    let (config, weights) = fixture(FIXTURES[0]);
    let brighter = scaled(&weights, "decoder.conv_out.weight", 1.5);
    let image = drift(&config, (&brighter, &weights), Precision::Fp32, &[16]).unwrap();
    assert!(image.rollouts[0].largest.unwrap() < 1e-5 && !image.passed(), "{image:?}");
    assert!(image.rollouts[0].image.as_ref().unwrap().psnr.unwrap() < LEAST_PSNR, "{image:?}");
    let other = scaled(&weights, "final_layer.linear.weight", 1.01);
    let tokens = drift(&config, (&other, &weights), Precision::Fp32, &[16]).unwrap();
    assert!(tokens.rollouts[0].largest.unwrap() > 1e-4 && !tokens.passed(), "{tokens:?}");
}

#[test]
fn lengths_that_the_decoder_does_not_take_are_refused() {
    let (config, weights) = fixture(FIXTURES[0]);
    for lengths in [&[][..], &[1, 16]] {
        let error = drift(&config, (&weights, &weights), Precision::Fp32, lengths).unwrap_err();
        assert!(error.is_input(), "{error}");
    }
}

#[test]
fn a_report_survives_json() {
    let (config, weights) = fixture(FIXTURES[0]);
    let overflown = scaled(&weights, "blocks.1.attn.qkv.weight", 1e5);
    for weights in [weights, overflown] {
        let drift = drift(&config, (&weights, &weights), Precision::Fp16, &[2, 16]).unwrap();
        let text = serde_json::to_string(&drift).unwrap();
        assert_eq!(serde_json::from_str::<Drift>(&text).unwrap(), drift, "{text}");
    }
}
