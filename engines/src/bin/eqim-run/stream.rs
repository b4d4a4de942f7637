//! Images that are too long to decode as a whole. Tiles are decoded while tokens are generated. Finished tiles are kept
//! on disk, so that an interrupted run can be resumed.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use eqim::digest::Hash;
use eqim::engine::Engine;
use eqim::generate::batch::{Batch, Sequence};
use eqim::generate::tiles::{TileDecoder, Tiling};
use eqim::picture::canvas::Canvas;
use eqim::picture::{self, Side};
use eqim::request::settings::{Settings, TileSize};
use eqim::request::timing::{StageTimes, timed};
use eqim::request::{Noise, Request, Sampling};
use eqim::{Error, Result, ResultExt, files};
use ndarray::{Array1, Array2, ArrayView3, Axis, concatenate, s};
use serde::{Deserialize, Serialize};

use super::finish::Finish;
use super::outputs::is_folder;

/// Everything that an unfinished image depends on. Only a run with an equal record resumes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    settings: Settings,
    /// Name of the backend. Tokens of different backends differ in their last digits.
    backend: String,
    threads: Option<usize>,
    /// SHA-256 of the weights.
    weights: String,
    /// SHA-256 of the prefix tokens, the noise and the kept columns that were given.
    given: String,
}

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
}

/// Generates image `row` of a request. The result is a PNG at `path`, or a folder of tiles. `progress` receives the
/// number of tokens known so far.
///
/// # Errors
/// [`Error::input`] if there is an unfinished image with other settings; [`Error::run`] if the run fails. Finished work
/// is kept next to `path`.
pub fn run(
    context: &Context,
    request: &Request,
    row: usize,
    path: &Path,
    progress: &mut dyn FnMut(usize),
) -> Result<Streamed> {
    let Context { engine, tiling, finish, .. } = *context;
    let config = engine.config();
    request.check(config)?;
    let mut work = Work::open(partial(path), &record(context, request, row), config.generator.embed)?;
    let (width, height) = config.image_size(request.tokens);
    let mut sink = Sink::open(path, &work.folder, width, height)?;
    let done = work.forget_unfinished(tiling, request.tokens)?;
    let known = work.known;
    let mut streamed = Streamed { times: StageTimes::default(), decoder: Duration::ZERO, resumed: known, tokens: None };
    if known > 0 {
        eqim_cli::note(format_args!("{}: resuming after {known} of {} tokens", path.display(), request.tokens));
    }
    if known < request.tokens {
        let mut decoder = timed(&mut streamed.decoder, || decoder(context, request.tokens, done, &mut work))?;
        let mut batch = Batch::new(engine, Sampling::new(config, request))?;
        batch.admit(vec![(row, image(engine, request, row, &mut work)?)])?;
        let mut position = known.saturating_sub(reach(engine));
        let mut new: Vec<Array1<f32>> = vec![];
        while position < request.tokens {
            for (_, token) in batch.advance()? {
                let token = token?;
                if position >= known {
                    let strip = timed(&mut streamed.decoder, || decoder.push(token.view()))?;
                    new.push(token);
                    if let Some(strip) = strip {
                        timed(&mut streamed.decoder, || {
                            let (x, columns) = finish.columns(strip.x, strip.pixels, width);
                            sink.write(x, columns.view())
                        })?;
                        work.append(&new)?;
                        new.clear();
                    }
                    progress(position + 1);
                }
            }
            position += 1;
        }
        streamed.times = batch.times;
    }
    if context.keep_tokens {
        streamed.tokens = Some(work.read(0)?);
    }
    match sink {
        Sink::Png(mut canvas) => {
            timed(&mut streamed.decoder, || canvas.write_png(path))?;
            work.remove()?;
        }
        Sink::Tiles(_) => work.publish(path, &Index::new(context, request.tokens))?,
    }
    Ok(streamed)
}

/// A decoder for the tiles after the first `done` tiles. The tokens of the last finished tile are pushed again, because
/// this tile fades into the next one.
fn decoder<'a>(context: &Context<'a>, tokens: usize, done: usize, work: &mut Work) -> Result<TileDecoder<'a>> {
    let Context { engine, tiling, .. } = *context;
    let Some(last) = done.checked_sub(1) else { return Ok(TileDecoder::new(engine, tiling, tokens)) };
    let mut decoder = TileDecoder::from_tile(engine, tiling, tokens, last);
    for token in work.read(tiling.begin(last, tokens))?.rows() {
        decoder.push(token)?;
    }
    Ok(decoder)
}

/// Destination of finished columns.
enum Sink {
    /// A file of pixels that becomes a PNG.
    Png(Canvas),
    /// A folder with one PNG per tile.
    Tiles(PathBuf),
}

impl Sink {
    fn open(path: &Path, folder: &Path, width: usize, height: usize) -> Result<Self> {
        if is_folder(Some(path)) {
            return Ok(Self::Tiles(folder.to_path_buf()));
        }
        Ok(Self::Png(Canvas::open(&folder.join("pixels.rgb"), width, height)?))
    }

    /// Writes columns `[3, height, n]` at pixel `x`, and syncs them to disk.
    fn write(&mut self, x: usize, columns: ArrayView3<f32>) -> Result<()> {
        match self {
            Self::Png(canvas) => canvas.write(x, columns),
            Self::Tiles(folder) => {
                let path = folder.join(tile_name(x));
                picture::write_png(&path, columns)?;
                let synced = File::open(&path).and_then(|file| file.sync_data());
                synced.or_run(path.display())
            }
        }
    }
}

/// Content of the `index.json` of a folder of tiles.
#[derive(Debug, Serialize)]
struct Index {
    /// Width of the image in pixels.
    width: usize,
    /// Height of the image in pixels.
    height: usize,
    /// Tiles from left to right, without overlap.
    tiles: Vec<Tile>,
}

/// A tile of an image.
#[derive(Debug, Serialize)]
struct Tile {
    /// Name of the PNG in the folder.
    file: String,
    /// Position of the first column in the image, in pixels.
    x: usize,
    /// Width in pixels.
    width: usize,
}

impl Index {
    /// Index of an image of `tokens` tokens.
    fn new(context: &Context, tokens: usize) -> Self {
        let Context { engine, tiling, finish, .. } = *context;
        let (width, height) = engine.config().image_size(tokens);
        let tile = |index| {
            let columns = tiling.completes(index, tokens);
            let (begin, end) = (columns.start * finish.token_width, columns.end * finish.token_width);
            let x = if finish.side == Side::Left { width - end } else { begin };
            Tile { file: tile_name(x), x, width: end - begin }
        };
        let mut tiles: Vec<Tile> = (0..tiling.count(tokens)).map(tile).collect();
        tiles.sort_unstable_by_key(|tile| tile.x);
        Self { width, height, tiles }
    }
}

/// File name of a tile. File names sort in the order of the columns.
fn tile_name(x: usize) -> String {
    format!("{x:010}.png")
}

/// Number of earlier tokens that the condition of a token depends on: one window per transformer block, and one more.
fn reach(engine: &dyn Engine) -> usize {
    let g = &engine.config().generator;
    g.depth * g.window + 1
}

/// The remaining part of an image. The last known tokens become its prefix, as many as the transformer depends on.
fn image(engine: &dyn Engine, request: &Request, row: usize, work: &mut Work) -> Result<Sequence> {
    let mut image = Sequence::streamed(engine.config(), request, row);
    let (known, given) = (work.known, image.prefix.dim().0);
    image.begin = known.saturating_sub(reach(engine));
    let before = work.read(image.begin)?;
    let rest = image.prefix.slice(s![known.min(given).., ..]);
    image.prefix = concatenate(Axis(0), &[before.view(), rest]).or_run("tokens")?;
    for _ in given..known {
        image.noise.next(engine.config().generator.embed)?;
    }
    Ok(image)
}

/// The folder of an unfinished image.
fn partial(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    path.with_file_name(name)
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

/// The folder of an unfinished image: `run.json`, and the tokens of finished tiles.
struct Work {
    folder: PathBuf,
    tokens: File,
    /// Number of tokens in the file.
    known: usize,
    embed: usize,
}

impl Work {
    fn open(folder: PathBuf, record: &Record, embed: usize) -> Result<Self> {
        let description = folder.join("run.json");
        if folder.exists() {
            let found = std::fs::read(&description).ok().and_then(|text| serde_json::from_slice::<Record>(&text).ok());
            if found.as_ref() != Some(record) {
                let problem = "holds an unfinished image of another run: remove it, or name another --output";
                return Err(Error::input(folder.display(), problem));
            }
        } else {
            // The folder is renamed into place together with its `run.json`.
            let beside = files::temporary(0o777).tempdir_in(files::folder(&folder));
            let beside = beside.or_run(folder.display())?;
            files::write_json(&beside.path().join("run.json"), record)?;
            std::fs::rename(beside.keep(), &folder).or_run(folder.display())?;
        }
        let path = folder.join("tokens.f32");
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let tokens = opened.or_run(path.display())?;
        let bytes = tokens.metadata().or_run(path.display())?.len();
        Ok(Self { folder, tokens, known: bytes as usize / (4 * embed), embed })
    }

    fn failed(&self) -> impl Fn(std::io::Error) -> Error {
        let path = self.folder.join("tokens.f32");
        move |error| Error::run_caused(path.display(), error)
    }

    /// Drops the tokens after the last finished tile of an image of `tokens` tokens. Returns the number of finished
    /// tiles.
    fn forget_unfinished(&mut self, tiling: Tiling, tokens: usize) -> Result<usize> {
        let known = self.known;
        let done = (0..tiling.count(tokens)).take_while(|&tile| tiling.end(tile, tokens) <= known).count();
        self.known = done.checked_sub(1).map_or(0, |last| tiling.end(last, tokens));
        self.tokens.set_len((4 * self.embed * self.known) as u64).map_err(self.failed())?;
        Ok(done)
    }

    /// Reads the tokens from index `begin`, `[n, E]`.
    fn read(&mut self, begin: usize) -> Result<Array2<f32>> {
        let mut bytes = vec![0; 4 * self.embed * (self.known - begin)];
        let from = SeekFrom::Start((4 * self.embed * begin) as u64);
        let read = self.tokens.seek(from).and_then(|_| self.tokens.read_exact(&mut bytes));
        read.map_err(self.failed())?;
        let values = bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        Array2::from_shape_vec((self.known - begin, self.embed), values).or_run("tokens")
    }

    /// Appends tokens whose tile is on disk.
    fn append(&mut self, tokens: &[Array1<f32>]) -> Result<()> {
        let bytes: Vec<u8> = tokens.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
        let written = self.tokens.seek(SeekFrom::End(0)).and_then(|_| self.tokens.write_all(&bytes));
        written.and_then(|()| self.tokens.sync_data()).map_err(self.failed())?;
        self.known += tokens.len();
        Ok(())
    }

    /// Turns the folder into the finished image: writes the index, renames the folder to `path`, and removes the files
    /// that only a resumed run needs.
    fn publish(self, path: &Path, index: &Index) -> Result<()> {
        files::write_json(&self.folder.join("index.json"), index)?;
        std::fs::rename(&self.folder, path).or_run(path.display())?;
        for file in ["run.json", "tokens.f32"] {
            std::fs::remove_file(path.join(file)).or_run(path.display())?;
        }
        Ok(())
    }

    fn remove(self) -> Result<()> {
        std::fs::remove_dir_all(&self.folder).or_run(self.folder.display())
    }
}
