//! Selection and creation of the engine of a bundle.

use std::path::Path;

use clap::{Args, ValueEnum};
use eqim::engine::Engine;
use eqim::engine::candle::{self, CandleEngine};
use eqim::{Error, Result};
use eqim_cli::flags::within;

use crate::native;
use crate::onnxruntime::{OrtEngine, Providers};
use crate::trt::{self, EngineSet};
use eqim::bundle::Bundle;

/// The library that runs a bundle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// TensorRT if the bundle has engines that this machine can run, else ONNX Runtime if its library is found, else
    /// Candle. Reports name the backend that was used.
    #[default]
    Auto,
    /// TensorRT, with the engines that eqim-export trt built.
    Trt,
    /// ONNX Runtime.
    Ort,
    /// Candle, which needs no native library.
    Candle,
}

/// How to run a bundle: the flags of all programs that run bundles.
#[derive(Args, Clone, Debug, Default)]
pub struct Options {
    /// Backend that runs the model
    #[arg(long, value_enum, value_name = "BACKEND", default_value_t)]
    pub backend: Backend,

    /// Number of threads of ONNX Runtime [default: all cores]
    #[arg(long, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,

    /// Execution providers of ONNX Runtime. With them, the backend is ONNX Runtime
    #[command(flatten)]
    pub providers: Providers,

    /// Device of --backend candle: cpu, or cuda:N if built with the feature cuda [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,

    /// Capture the transformer step as a CUDA graph; needs --backend trt
    #[arg(long)]
    pub cuda_graph: bool,
}

/// Largest number of threads of ONNX Runtime.
pub const MOST_THREADS: usize = 1024;

fn threads(text: &str) -> Result<usize, String> {
    within(text, 1..=MOST_THREADS)
}

/// Creates an engine for a bundle.
///
/// # Errors
/// [`Error::input`] if the weights do not fit, if the backend cannot run the bundle, or if TensorRT engines are missing
/// or stale; [`Error::run`] if the library or the GPU of the backend is not found.
pub fn open(bundle: &Bundle, options: &Options) -> Result<Box<dyn Engine>> {
    let &Options { backend, threads, ref providers, ref device, cuda_graph } = options;
    if cuda_graph && backend != Backend::Trt {
        return Err(Error::setting("cuda_graph", "needs --backend trt: only a GPU captures graphs"));
    }
    let candle = || candle(bundle, threads, device.as_deref().unwrap_or("cpu"));
    let ort = || onnxruntime(bundle, &native::find_onnxruntime()?, threads, providers);
    match backend {
        Backend::Trt | Backend::Candle if !providers.order.is_empty() => {
            Err(Error::setting("provider", format!("{providers} is part of ONNX Runtime: the backend has to be ort")))
        }
        Backend::Trt | Backend::Ort if device.is_some() => {
            Err(Error::setting("device", "is the device of Candle: the backend has to be candle"))
        }
        Backend::Auto if device.is_some() && !providers.order.is_empty() => {
            Err(Error::setting("device", "is the device of Candle, which has no execution providers"))
        }
        Backend::Trt => tensorrt(bundle, cuda_graph),
        Backend::Ort => ort(),
        Backend::Candle => candle(),
        Backend::Auto if !providers.order.is_empty() => ort(),
        Backend::Auto if device.is_some() => candle(),
        Backend::Auto => match fitting_tensorrt(bundle) {
            Ok(Some(engine)) => Ok(engine),
            Ok(None) => on_cpu(bundle, threads),
            Err(error) => {
                tracing::warn!("the bundle's TensorRT engines are not used: {error}");
                on_cpu(bundle, threads)
            }
        },
    }
}

/// The TensorRT engine, or `None` if the bundle has no engines. The error says why existing engines cannot run.
fn fitting_tensorrt(bundle: &Bundle) -> Result<Option<Box<dyn Engine>>> {
    let Some(set) = EngineSet::open(bundle)? else { return Ok(None) };
    trt::ready()?;
    trt::open(bundle, &set, false).map(Some)
}

fn on_cpu(bundle: &Bundle, threads: Option<usize>) -> Result<Box<dyn Engine>> {
    match native::find_onnxruntime() {
        Ok(library) => onnxruntime(bundle, &library, threads, &Providers::default()),
        Err(missing) => {
            tracing::warn!("{missing}; running on Candle, which is slower");
            candle(bundle, threads, "cpu")
        }
    }
}

fn tensorrt(bundle: &Bundle, cuda_graph: bool) -> Result<Box<dyn Engine>> {
    let missing = || Error::input(bundle.folder.display(), "has no TensorRT engines: build them with eqim-export trt");
    let set = EngineSet::open(bundle)?.ok_or_else(missing)?;
    trt::open(bundle, &set, cuda_graph)
}

fn onnxruntime(
    bundle: &Bundle,
    library: &Path,
    threads: Option<usize>,
    providers: &Providers,
) -> Result<Box<dyn Engine>> {
    Ok(Box::new(OrtEngine::new(bundle, library, threads, providers)?))
}

fn candle(bundle: &Bundle, threads: Option<usize>, device: &str) -> Result<Box<dyn Engine>> {
    if threads.is_some() {
        tracing::warn!("threads limits the threads of ONNX Runtime; RAYON_NUM_THREADS limits those of Candle");
    }
    if bundle.manifest.quantization.is_some() {
        let problem =
            "is in INT8, which Candle does not run: use ONNX Runtime, or the FP32 bundle that it was made from";
        return Err(Error::input(bundle.folder.display(), problem));
    }
    let device = candle::open_device(device)?;
    let (config, weights) = bundle.load_weights()?;
    Ok(Box::new(CandleEngine::new(config, weights.to_device(&device)?)))
}
