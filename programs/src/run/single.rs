//! A run with one batch of images.

use std::path::PathBuf;
use std::time::Duration;

use eqim::bundle::Bundle;
use eqim::checkpoint::tensors;
use eqim::engine::{Engine, candle};
use eqim::generate::finish::Finish;
use eqim::generate::generate;
use eqim::generate::tiles::{TileDecoder, Tiling};
use eqim::long::{self, Work};
use eqim::request::timing::{StageTimes, timed};
use eqim::request::{Generated, PreparedRequest, Request};
use eqim::{Error, Result, ResultExt};
use eqim_cli::Progress;
use ndarray::{Axis, concatenate};

use super::arguments::Arguments;
use super::decode::ImageWriter;
use super::inputs::{self, Inputs, Prefix};
use super::outputs::{self, Outputs};
use super::report::{RunReport, Seconds, Tiles};
use super::stream::{self, Context};
use super::trace::{self, Traced};

/// Generates the images that the flags describe.
///
/// # Errors
/// [`Error::input`] if a flag or a file cannot be used, before any slow work; [`Error::run`] if the run fails.
pub fn run(arguments: &Arguments) -> Result<()> {
    let outputs = Outputs::check(arguments)?;
    let bundle = Bundle::open(&arguments.engine)?;
    let config = &bundle.manifest.model;
    let Inputs { mut request, prefix, finish, tiling } =
        inputs::read(&arguments.settings, arguments.noise.as_deref(), arguments.output.as_deref(), config)?;
    if arguments.trace.is_some() && tiling.is_some() {
        let problem = "decodes each frame as a whole: omit --tile, and generate a shorter image";
        return Err(Error::input("--trace", problem));
    }
    let width = config.image_size(request.tokens).0;
    outputs.images.iter().try_for_each(|path| outputs::check_width(path, width))?;
    let prefix_tokens = prefix.as_ref().map_or(0, |prefix| prefix.tokens(config));

    let (mut load, mut encoder, mut decoder) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    if tiling.is_some() {
        outputs.images.iter().try_for_each(|path| long::check_owner(path))?;
    }
    let engine = timed(&mut load, || eqim_engines::open(&bundle, &arguments.options))?;
    let encoded = matches!(prefix, Some(Prefix::Picture(_)));
    if let Some(prefix) = prefix {
        request.prefix = Some(timed(&mut encoder, || prefix.encode(engine.as_ref(), request.classes.len()))?);
    }
    let (times, tiles) = match tiling {
        None => {
            let mut progress = Progress::new("generated", request.tokens, "tokens");
            let generated = generate(engine.as_ref(), &request, |done| progress.at(done))?;
            drop(progress);
            save_tokens(&outputs, &generated)?;
            decode(engine.as_ref(), &generated, &finish, &outputs.images, &mut decoder)?;
            if let Some(folder) = &outputs.trace {
                let traced = Traced {
                    engine: engine.as_ref(),
                    request: &request,
                    generated: &generated,
                    has_picture: encoded,
                    side: finish.side,
                    seed: arguments.settings.sampling.seed.unwrap_or_default(),
                };
                trace::write(&traced, folder)?;
            }
            (generated.times, None)
        }
        Some(tiling) => {
            let context = Context {
                engine: engine.as_ref(),
                weights: &bundle.manifest.weights.sha256,
                threads: arguments.options.threads,
                tiling,
                finish: &finish,
                keep_tokens: outputs.tokens.is_some(),
            };
            stream(&context, &request, &outputs, &mut decoder)?
        }
    };

    let seconds = Seconds::new(load, encoded.then_some(encoder), &times, decoder);
    let report = RunReport::new(arguments, engine.as_ref(), &request, prefix_tokens, &outputs, tiles, seconds);
    eqim_cli::print(if arguments.json { report.json()? } else { report.text() })
}

/// Generates and decodes long images in tiles, one image after another.
fn stream(
    context: &Context,
    request: &Request,
    outputs: &Outputs,
    decoder: &mut Duration,
) -> Result<(StageTimes, Option<Tiles>)> {
    let Tiling { tile, overlap } = context.tiling;
    let mut tiles = Tiles { tile, overlap, count: context.tiling.count(request.tokens), resumed_tokens: 0 };
    let mut times = StageTimes::default();
    let (mut rows, mut folders) = (vec![], vec![]);
    for (row, path) in outputs.images.iter().enumerate() {
        let mut progress = Progress::new("generated and decoded", request.tokens, "tokens");
        let streamed = stream::run(context, request, row, path, &mut |done| progress.at(done))?;
        times.prefill.0.extend(streamed.times.prefill.0);
        times.step.0.extend(streamed.times.step.0);
        times.flow.0.extend(streamed.times.flow.0);
        *decoder += streamed.decoder;
        tiles.resumed_tokens += streamed.resumed;
        folders.push(streamed.work);
        rows.extend(streamed.tokens.map(|tokens| tokens.insert_axis(Axis(0))));
    }
    if outputs.tokens.is_some() {
        let rows: Vec<_> = rows.iter().map(|row| row.view()).collect();
        let tokens = concatenate(Axis(0), &rows).or_run("tokens")?;
        let noise = PreparedRequest::new(context.engine.config(), request)?.noise;
        save_tokens(outputs, &Generated { tokens, noise, times: StageTimes::default() })?;
    }
    // Until everything is written, the same command finds here which images are done.
    folders.into_iter().try_for_each(Work::remove)?;
    Ok((times, Some(tiles)))
}

/// Writes tokens and noise, if requested.
fn save_tokens(outputs: &Outputs, generated: &Generated) -> Result<()> {
    let Some(path) = &outputs.tokens else { return Ok(()) };
    let [tokens, noise] = [&generated.tokens, &generated.noise].map(|array| candle::to_tensor(array.view()));
    tensors::write(path, &[("tokens", tokens?), ("noise", noise?)], Default::default())
}

/// Decodes and writes one image after another, so that only one image is in memory.
fn decode(
    engine: &dyn Engine,
    generated: &Generated,
    finish: &Finish,
    paths: &[PathBuf],
    time: &mut Duration,
) -> Result<()> {
    let mut progress = Progress::new("decoded", paths.len(), "images");
    for (row, path) in paths.iter().enumerate() {
        let tokens = generated.tokens.index_axis(Axis(0), row);
        let count = tokens.dim().0;
        let mut image = ImageWriter::new(path.clone(), finish.clone(), engine.config().image_size(count));
        let mut decoder = TileDecoder::new(engine, Tiling::whole(count), count);
        for token in tokens.rows() {
            if let Some(strip) = timed(time, || decoder.push(token))? {
                image.write(strip)?;
            }
        }
        progress.at(row + 1);
    }
    Ok(())
}
