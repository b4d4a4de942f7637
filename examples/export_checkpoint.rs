//! Exports a checkpoint as a bundle of ONNX graphs, and validates the graphs on ONNX Runtime against Candle.
//!
//! ```console
//! cargo run --release --example export_checkpoint -- assets/demo/model.safetensors target/example
//! ```

use std::path::PathBuf;

use eqim::bundle::Precision;
use eqim::checkpoint;
use eqim::engine::candle::CandleEngine;
use eqim_engines::native::find_onnxruntime;
use eqim_export::lower::NEWEST_OPSET;
use eqim_export::validate::{default_tolerance, validate};
use eqim_export::write::{Options, draft};

fn main() -> eqim::Result<()> {
    let mut arguments = std::env::args().skip(1).map(PathBuf::from);
    let (Some(weights), Some(folder)) = (arguments.next(), arguments.next()) else {
        return Err(eqim::Error::input("arguments", "expected WEIGHTS.safetensors BUNDLE"));
    };
    // A checkpoint of PyTorch is read by `checkpoint::load`.
    let (config, weights) = checkpoint::load_safetensors(&weights)?;

    let options = Options { precision: Precision::Fp32, opset: NEWEST_OPSET, policy: None, functions: true };
    let draft = draft(&folder, &config, &weights, options, |file| println!("writing {file}"))?;

    let (reference, library) = (CandleEngine::new(config, weights), find_onnxruntime()?);
    let atol = default_tolerance(options.precision);
    let report = validate(&draft.bundle, &reference, &library, atol, |line| println!("{line}"))?;
    if !report.passed() {
        return Err(eqim::Error::run("validation", "the graphs do not compute what the model does"));
    }
    println!("wrote {}", draft.publish()?.folder.display());
    Ok(())
}
