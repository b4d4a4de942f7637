//! `eqim-run`: images from a bundle.

mod arguments;
mod inputs;
mod jobs;
mod outputs;
mod report;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use arguments::Arguments;
pub(crate) use arguments::{MOST_TOKENS, solvers, within};
use eqim::engine::Engine;
use eqim::generate::{Generated, generate, timed};
use eqim::{Error, Result, candle, picture, tensors};
pub(crate) use inputs::check_memory;
use ndarray::{ArrayView3, Axis, s};

use crate::bundle::Bundle;
use crate::cli::{self, Progress};
use crate::{Backend, Options};
use inputs::Prefix;
use outputs::Outputs;
use report::{Report, Seconds};

/// Generates images as the command line says.
///
/// # Errors
/// [`Error::Input`] naming the flag or file that cannot be used, before anything slow runs; [`Error::Run`] for a run
/// that failed.
pub fn run(arguments: &Arguments) -> Result<()> {
    if let Some(file) = &arguments.jobs {
        return jobs::run(arguments, file);
    }
    let outputs = Outputs::check(arguments)?;
    let bundle = Bundle::open(&arguments.engine)?;
    let config = &bundle.manifest.model;
    let (mut request, prefix) = inputs::request(arguments, config)?;
    let prefix_tokens = prefix.as_ref().map_or(0, |prefix| prefix.tokens(config));

    let (mut load, mut encoder, mut decoder) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    let engine = timed(&mut load, || crate::open(&bundle, options(arguments)?))?;
    let encoded = matches!(prefix, Some(Prefix::Picture(_)));
    if let Some(prefix) = prefix {
        request.prefix = Some(timed(&mut encoder, || prefix.encode(engine.as_ref(), request.labels.len()))?);
    }
    let mut progress = Progress::new("generated", request.tokens, "tokens");
    let generated = generate(engine.as_ref(), &request, |done| progress.at(done))?;
    drop(progress);
    if let Some(path) = &outputs.tokens {
        let tokens = candle::to_tensor(generated.tokens.view())?;
        let noise = candle::to_tensor(generated.noise.view())?;
        tensors::write(path, &[("tokens", tokens), ("noise", noise)], Default::default())?;
    }
    decode(engine.as_ref(), &generated, &outputs.images, &mut decoder)?;

    let times = &generated.times;
    let seconds = Seconds::new(load, encoded.then_some(encoder), times, decoder);
    let report = Report::new(arguments, engine.as_ref(), &request, prefix_tokens, &outputs, seconds);
    cli::print(if arguments.json { report.json()? } else { report.table() })
}

fn options(arguments: &Arguments) -> Result<Options> {
    let &Arguments { backend, threads, cuda_graph, .. } = arguments;
    if cuda_graph && backend != Backend::Trt {
        return Err(Error::input("--cuda-graph", "needs --backend trt: only a GPU captures graphs"));
    }
    Ok(Options { backend, threads, cuda_graph })
}

/// Decodes and writes image by image, so that the memory of one is enough.
fn decode(engine: &dyn Engine, generated: &Generated, paths: &[PathBuf], time: &mut Duration) -> Result<()> {
    let mut progress = Progress::new("decoded", paths.len(), "images");
    for (row, path) in paths.iter().enumerate() {
        decode_to(engine, generated.tokens.slice(s![row..=row, .., ..]), path, time)?;
        progress.at(row + 1);
    }
    Ok(())
}

/// Decodes the tokens `[1, N, E]` of one image and writes it.
fn decode_to(engine: &dyn Engine, tokens: ArrayView3<f32>, path: &Path, time: &mut Duration) -> Result<()> {
    let images = timed(time, || engine.decode_tokens(tokens))?;
    if images.iter().any(|value| !value.is_finite()) {
        let path = path.display();
        let problem = format!("the image for {path} has values that are not finite: its precision does not fit");
        return Err(Error::run(engine.name(), problem));
    }
    picture::write_png(path, images.index_axis(Axis(0), 0))
}
