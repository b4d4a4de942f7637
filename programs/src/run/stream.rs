//! Images that are too long to decode as a whole. Tiles are decoded while tokens are generated. Finished tiles are kept
//! on disk, so that an interrupted run can be resumed.

use std::path::Path;
use std::time::Duration;

use eqim::digest::Hash;
use eqim::engine::Engine;
use eqim::generate::batch::{Batch, Sequence};
use eqim::generate::finish::Finish;
use eqim::generate::tiles::{Strip, TileDecoder, Tiling};
use eqim::long::{Layout, Record, Sink, Verified, Work, is_folder};
use eqim::request::settings::{Settings, TileSize};
use eqim::request::timing::{StageTimes, timed};
use eqim::request::{Noise, Request, Sampling};
use eqim::{Error, Result, ResultExt};
use ndarray::{Array1, Array2, ArrayView3, Axis, concatenate, s};

use super::outputs;

/// Inputs of a run in addition to the request.
pub struct Context<'a> {
    /// Engine that runs the model.
    pub engine: &'a dyn Engine,
    /// SHA-256 of the weights.
    pub weights: &'a str,
    /// Number of threads, if it was set.
    pub threads: Option<usize>,
    /// Tiling of the decoder.
    pub tiling: Tiling,
    /// Postprocessing of the images.
    pub finish: &'a Finish,
    /// Whether to return all tokens at the end.
    pub keep_tokens: bool,
}

/// Result of the generation of an image.
pub struct Streamed {
    /// Times of the generation.
    pub times: StageTimes,
    /// Time to decode and write the image.
    pub decoder: Duration,
    /// Number of tokens that an earlier run generated.
    pub resumed: usize,
    /// All tokens, `[N, E]`, if requested.
    pub tokens: Option<Array2<f32>>,
    /// The folder of the image. The caller must remove it once everything that the run writes is written.
    pub work: Work,
}

/// Generates image `row` of a request. The result is a PNG at `path`, or a folder of tiles. `progress` receives the
/// number of tokens known so far.
///
/// # Errors
/// [`Error::input`] if there is an unfinished image with other settings; [`Error::run`] if another process generates
/// the image, or if the run fails. Finished work is kept next to `path`.
pub fn run(
    context: &Context,
    request: &Request,
    row: usize,
    path: &Path,
    progress: &mut dyn FnMut(usize),
) -> Result<Streamed> {
    let config = context.engine.config();
    request.check(config)?;
    let layout = Layout {
        tiling: context.tiling,
        tokens: request.tokens,
        size: config.image_size(request.tokens),
        token_width: context.finish.token_width,
        side: context.finish.side,
    };
    let work = Work::open(path, record(context, request, row), layout, config.generator.embed)?;
    let (times, decoder) = Default::default();
    let mut image = Image { context, request, row, path, work, times, decoder };
    let resumed = image.complete(progress).inspect_err(|error| {
        if !error.is_input() {
            let path = path.display();
            eqim_cli::note(format_args!("{path}: the finished part is kept, the same command resumes from there"));
        }
    })?;
    let tokens = context.keep_tokens.then(|| image.work.read(0)).transpose()?;
    let Image { times, decoder, work, .. } = image;
    Ok(Streamed { times, decoder, resumed, tokens, work })
}

/// An image in progress.
struct Image<'a> {
    context: &'a Context<'a>,
    request: &'a Request,
    row: usize,
    path: &'a Path,
    work: Work,
    times: StageTimes,
    decoder: Duration,
}

impl<'a> Image<'a> {
    /// Does what is left of the image. Returns the number of tokens that were done before.
    fn complete(&mut self, progress: &mut dyn FnMut(usize)) -> Result<usize> {
        let Self { request, path, .. } = *self;
        if self.is_published()? {
            progress(request.tokens);
            return Ok(request.tokens);
        }
        if is_folder(path) {
            outputs::is_new("output", path)?;
        }
        self.work.tidy()?;
        let mut sink = Sink::open(path, self.work.folder(), self.work.layout().size)?;
        let layout = self.work.layout();
        let Verified { tiles: done, is_changed } =
            self.work.verify(|tile, hash| Ok(sink.hash(&layout.columns(tile))?.as_deref() == Some(hash)))?;
        if is_changed {
            let problem = format!("tile {done} is not what was written: this tile and all after it are done again");
            eqim_cli::note(format_args!("{}: {problem}", self.work.folder().display()));
        }
        let resumed = self.work.known();
        if resumed > 0 {
            let path = path.display();
            eqim_cli::note(format_args!("{path}: resuming after {resumed} of {} tokens", request.tokens));
        }
        if resumed < request.tokens {
            self.generate(&mut sink, done, progress)?;
        }
        self.publish(sink)?;
        Ok(resumed)
    }

    /// Whether an earlier run has published the image, and was interrupted before it removed the folder.
    fn is_published(&mut self) -> Result<bool> {
        let Some(published) = self.work.published() else { return Ok(false) };
        let layout = self.work.layout();
        if layout.hash_of_result(self.path)?.as_deref() != Some(published) {
            return Ok(false);
        }
        // The columns of a published image are not kept.
        Ok(!self.context.keep_tokens || self.work.verify(|_, _| Ok(true))?.tiles == layout.count())
    }

    /// Generates and decodes the tokens after the first `done` tiles.
    fn generate(&mut self, sink: &mut Sink, done: usize, progress: &mut dyn FnMut(usize)) -> Result<()> {
        let engine = self.context.engine;
        let (known, tokens) = (self.work.known(), self.request.tokens);
        let mut time = Duration::ZERO;
        let mut decoder = timed(&mut time, || self.tile_decoder(done))?;
        self.decoder += time;
        let mut batch = Batch::new(engine, Sampling::new(engine.config(), self.request))?;
        batch.admit(vec![(self.row, self.sequence()?)])?;
        let mut new: Vec<Array1<f32>> = vec![];
        for position in known.saturating_sub(reach(engine))..tokens {
            for (_, token) in batch.advance()? {
                let token = token?;
                if position < known {
                    continue;
                }
                let strip = timed(&mut self.decoder, || decoder.push(token.view()))?;
                new.push(token);
                if let Some(strip) = strip {
                    self.keep(sink, strip, &new)?;
                    new.clear();
                }
                progress(position + 1);
            }
        }
        self.times = batch.times;
        Ok(())
    }

    /// A decoder for the tiles after the first `done` tiles. The tokens of the last finished tile are pushed again,
    /// because this tile fades into the next one.
    fn tile_decoder(&self, done: usize) -> Result<TileDecoder<'a>> {
        let (&Context { engine, tiling, .. }, tokens) = (self.context, self.request.tokens);
        let Some(last) = done.checked_sub(1) else { return Ok(TileDecoder::new(engine, tiling, tokens)) };
        let mut decoder = TileDecoder::from_tile(engine, tiling, tokens, last);
        for token in self.work.read(tiling.begin(last, tokens))?.rows() {
            decoder.push(token)?;
        }
        Ok(decoder)
    }

    /// The remaining part of the image. The last known tokens become its prefix, as many as the transformer depends on.
    fn sequence(&self) -> Result<Sequence> {
        let engine = self.context.engine;
        let mut image = Sequence::streamed(engine.config(), self.request, self.row);
        let (known, given) = (self.work.known(), image.prefix.dim().0);
        image.begin = known.saturating_sub(reach(engine));
        let before = self.work.read(image.begin)?;
        let rest = image.prefix.slice(s![known.min(given).., ..]);
        image.prefix = concatenate(Axis(0), &[before.view(), rest]).or_run("tokens")?;
        for _ in given..known {
            image.noise.next(engine.config().generator.embed)?;
        }
        Ok(image)
    }

    /// Writes the columns that a tile completes, and then its tokens.
    fn keep(&mut self, sink: &mut Sink, strip: Strip, tokens: &[Array1<f32>]) -> Result<()> {
        let Self { context, work, decoder, .. } = self;
        let (tile, layout) = (strip.index, work.layout());
        timed(decoder, || {
            let (x, columns) = context.finish.columns(strip.x, strip.pixels, layout.size.0);
            sink.write(x, columns.view())
        })?;
        let written = sink.hash(&layout.columns(tile))?;
        let lost = || Error::run(work.folder().display(), "was changed by another program");
        let hash = written.ok_or_else(lost)?;
        work.append(tile, tokens, hash)
    }

    /// Publishes the finished image at its path.
    fn publish(&mut self, sink: Sink) -> Result<()> {
        let Self { work, decoder, .. } = self;
        let path = self.path;
        let layout = work.layout();
        match sink {
            Sink::Png(mut canvas) => {
                timed(decoder, || canvas.write_png(path))?;
                work.mark_published(layout.hash_of_result(path)?)?;
                work.discard(Sink::PIXELS)
            }
            Sink::Tiles(_) => {
                let result = work.gather(&layout.index())?;
                // The name ends in `/`, as that of the final folder.
                work.mark_published(layout.hash_of_result(&result.join(""))?)?;
                std::fs::rename(&result, path).or_run(path.display())
            }
        }
    }
}

/// Number of earlier tokens that the condition of a token depends on: one window per transformer block, and one more.
fn reach(engine: &dyn Engine) -> usize {
    let g = &engine.config().generator;
    g.depth * g.window + 1
}

fn record(context: &Context, request: &Request, row: usize) -> Record {
    let mut hash = Hash::default();
    let mut add = |values: ArrayView3<f32>| hash.add_values(values);
    if let Some(prefix) = &request.prefix {
        add(prefix.slice(s![row..=row, .., ..]));
    }
    if let Noise::Given(noise) = &request.noise {
        add(noise.slice(s![row..=row, .., ..]));
    }
    if let Some(kept) = &context.finish.kept {
        add(kept.view());
    }
    let own = Settings {
        direction: Some(context.finish.side),
        tile: Some(TileSize::Tokens(context.tiling.tile)),
        overlap: Some(context.tiling.overlap),
        ..Settings::default()
    };
    Record {
        settings: own.resolved(request, row),
        backend: context.engine.name().into(),
        threads: context.threads,
        weights: context.weights.into(),
        given: hash.hex(),
    }
}
