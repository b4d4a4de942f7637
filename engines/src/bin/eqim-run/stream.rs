//! Images too long to be decoded at once: tiles are decoded while tokens are generated, and what is done is kept on disk, so
//! that a run that was interrupted goes on where it stopped.

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

/// What an unfinished image is made from: only a run of the same goes on with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    settings: Settings,
    /// What runs the model, since another engine's tokens differ in their last digits.
    backend: String,
    threads: Option<usize>,
    /// SHA-256 of the weights.
    weights: String,
    /// SHA-256 of the tokens, the noise and the columns that were given.
    given: String,
}

/// What a run is told beside the request.
pub struct Context<'a> {
    /// What runs the model.
    pub engine: &'a dyn Engine,
    /// SHA-256 of its weights.
    pub weights: &'a str,
    /// Threads that were asked for.
    pub threads: Option<usize>,
    /// How images are decoded.
    pub tiling: Tiling,
    /// How they are finished.
    pub finish: &'a Finish,
    /// Whether to give all tokens in the end.
    pub keep_tokens: bool,
}

/// Where the time of an image went.
pub struct Streamed {
    /// Generation.
    pub times: StageTimes,
    /// Decoding and writing.
    pub decoder: Duration,
    /// Tokens that an earlier run had done.
    pub resumed: usize,
    /// All tokens, `[N, E]`, where they were asked for.
    pub tokens: Option<Array2<f32>>,
}

/// Generates image `row` of a request into a PNG at `path`, or tiles in a folder there. `progress` is told the number of
/// tokens known so far.
///
/// # Errors
/// [`Error::input`] where an unfinished image of other settings lies; [`Error::run`] for a run that failed: what it had done
/// is kept beside `path`.
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

/// A decoder of what comes after the first `done` tiles: it has seen the tokens of the last of them.
fn decoder<'a>(context: &Context<'a>, tokens: usize, done: usize, work: &mut Work) -> Result<TileDecoder<'a>> {
    let Context { engine, tiling, .. } = *context;
    let Some(last) = done.checked_sub(1) else { return Ok(TileDecoder::new(engine, tiling, tokens)) };
    let mut decoder = TileDecoder::from_tile(engine, tiling, tokens, last);
    for token in work.read(tiling.begin(last, tokens))?.rows() {
        decoder.push(token)?;
    }
    Ok(decoder)
}

/// Where finished columns go.
enum Sink {
    /// To a file that becomes a PNG.
    Png(Canvas),
    /// To a PNG each, in this folder.
    Tiles(PathBuf),
}

impl Sink {
    fn open(path: &Path, folder: &Path, width: usize, height: usize) -> Result<Self> {
        if is_folder(Some(path)) {
            return Ok(Self::Tiles(folder.to_path_buf()));
        }
        Ok(Self::Png(Canvas::open(&folder.join("pixels.rgb"), width, height)?))
    }

    /// Writes columns `[3, height, n]` at pixel `x`, down to the disk.
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

/// What `index.json` of a folder of tiles says.
#[derive(Debug, Serialize)]
struct Index {
    /// Pixels of the image.
    width: usize,
    /// Pixels of the image.
    height: usize,
    /// From left to right, side by side.
    tiles: Vec<Tile>,
}

/// Columns of an image.
#[derive(Debug, Serialize)]
struct Tile {
    /// A PNG in the folder.
    file: String,
    /// Pixels to the left of it.
    x: usize,
    /// Pixels.
    width: usize,
}

impl Index {
    /// The index of an image of `tokens`.
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

/// Files sort as their columns do.
fn tile_name(x: usize) -> String {
    format!("{x:010}.png")
}

/// Tokens back to which a token's condition reaches: a window a block.
fn reach(engine: &dyn Engine) -> usize {
    let g = &engine.config().generator;
    g.depth * g.window + 1
}

/// The image that is left to do: tokens known before are passed through the transformer again, as far back as it looks.
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

/// The folder of an image that is not finished.
fn partial(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    path.with_file_name(name)
}

fn record(context: &Context, request: &Request, row: usize) -> Record {
    let mut hash = Hash::default();
    let mut add = |values: ArrayView3<f32>| hash.add_values(&values);
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

/// The folder of an unfinished image: `run.json`, and the tokens whose tiles are done.
struct Work {
    folder: PathBuf,
    tokens: File,
    /// Tokens in the file.
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
            // The folder appears with its description.
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

    /// Drops the tokens of an image of `tokens` whose tile was not finished; gives the number of tiles that are.
    fn forget_unfinished(&mut self, tiling: Tiling, tokens: usize) -> Result<usize> {
        let known = self.known;
        let done = (0..tiling.count(tokens)).take_while(|&tile| tiling.end(tile, tokens) <= known).count();
        self.known = done.checked_sub(1).map_or(0, |last| tiling.end(last, tokens));
        self.tokens.set_len((4 * self.embed * self.known) as u64).map_err(self.failed())?;
        Ok(done)
    }

    /// Tokens from `begin` on, `[n, E]`.
    fn read(&mut self, begin: usize) -> Result<Array2<f32>> {
        let mut bytes = vec![0; 4 * self.embed * (self.known - begin)];
        let from = SeekFrom::Start((4 * self.embed * begin) as u64);
        let read = self.tokens.seek(from).and_then(|_| self.tokens.read_exact(&mut bytes));
        read.map_err(self.failed())?;
        let values = bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        Array2::from_shape_vec((self.known - begin, self.embed), values).or_run("tokens")
    }

    /// Adds tokens whose tile is on disk.
    fn append(&mut self, tokens: &[Array1<f32>]) -> Result<()> {
        let bytes: Vec<u8> = tokens.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
        let written = self.tokens.seek(SeekFrom::End(0)).and_then(|_| self.tokens.write_all(&bytes));
        written.and_then(|()| self.tokens.sync_data()).map_err(self.failed())?;
        self.known += tokens.len();
        Ok(())
    }

    /// Makes the folder a finished image's: with an index, under its own name, without what a run needs to go on.
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
