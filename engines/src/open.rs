//! From a bundle to an engine.

use clap::ValueEnum;
use eqim::candle::CandleEngine;
use eqim::engine::Engine;
use eqim::{Error, Result, checkpoint};

use crate::bundle::Bundle;
use crate::native;
use crate::onnxruntime::OrtEngine;

/// What runs a bundle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// ONNX Runtime where its library is found, else Candle, and says which.
    #[default]
    Auto,
    /// ONNX Runtime.
    Ort,
    /// Candle, without any native library.
    Candle,
}

/// Prepares an engine for a bundle. `threads` limits ONNX Runtime's; by default it takes every core.
///
/// # Errors
/// [`Error::Input`] for weights that do not fit; [`Error::Run`] when ONNX Runtime was asked for and is not found.
pub fn open(bundle: &Bundle, backend: Backend, threads: Option<usize>) -> Result<Box<dyn Engine>> {
    if backend == Backend::Candle {
        return candle(bundle, threads);
    }
    match (backend, native::find_onnxruntime()) {
        (_, Ok(library)) => Ok(Box::new(OrtEngine::new(bundle, &library, threads)?)),
        (Backend::Auto, Err(problem)) => {
            tracing::warn!("{problem}; running on Candle, which is slower");
            candle(bundle, threads)
        }
        (_, Err(problem)) => Err(Error::Run(problem)),
    }
}

fn candle(bundle: &Bundle, threads: Option<usize>) -> Result<Box<dyn Engine>> {
    if threads.is_some() {
        tracing::warn!("--threads limits ONNX Runtime's threads; those of Candle are set by RAYON_NUM_THREADS");
    }
    let (config, weights) = checkpoint::load_safetensors(&bundle.weights_path())?;
    Ok(Box::new(CandleEngine::new(config, weights)))
}
