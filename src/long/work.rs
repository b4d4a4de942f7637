//! The folder of an unfinished image. It keeps what is done, so that a run that was interrupted resumes:
//!
//! | file | content |
//! |---|---|
//! | `lock` | the number of the process that generates the image, which has locked this file |
//! | `run.json` | all that the image depends on, and the hash of the result once it is published |
//! | `tokens.f32` | the tokens of finished tiles |
//! | `pixels.rgb`, or one PNG per tile | the columns of finished tiles |
//! | `tiles.jsonl` | one line per finished tile: the hashes of its tokens and of its columns |
//!
//! A tile is finished when its line is complete. Only a tile that still has the hashes of its line is taken over.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::digest::sha256;
use crate::lock::{LOCK_FILE, Lock};
use crate::request::settings::Settings;
use crate::temporary::{self, is_temporary};
use crate::{Error, Result, ResultExt, files};
use ndarray::{Array1, Array2};
use serde::{Deserialize, Serialize};

use super::sink::{INDEX_FILE, Index, Layout};

/// Name of the file that describes an unfinished image.
const RUN_FILE: &str = "run.json";
const TOKENS: &str = "tokens.f32";
const JOURNAL: &str = "tiles.jsonl";
/// Folder for the tiles that are about to be published.
const RESULT: &str = "result";
/// More than the length of a line of the journal in bytes.
const LONGEST_LINE: u64 = 1024;

/// Everything that an image depends on. Only a run with an equal record resumes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Settings of the image.
    #[serde(flatten)]
    pub settings: Settings,
    /// Name of the backend. Tokens of different backends differ in their last digits.
    pub backend: String,
    /// Number of threads, if it was set.
    pub threads: Option<usize>,
    /// SHA-256 of the weights.
    pub weights: String,
    /// SHA-256 of the prefix tokens, the noise and the kept columns that were given.
    pub given: String,
}

/// Content of `run.json`.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    #[serde(flatten)]
    record: Record,
    /// Hash of the result, once it is published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    published: Option<String>,
}

/// A line of the journal.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    /// Index of the tile.
    tile: usize,
    /// SHA-256 of the tokens that this tile needs and the tiles before it do not.
    tokens: String,
    /// SHA-256 of the columns that become complete with this tile.
    pixels: String,
}

/// The folder of an unfinished image, locked by this process.
#[derive(Debug)]
pub struct Work {
    folder: PathBuf,
    state: State,
    layout: Layout,
    tokens: File,
    journal: File,
    /// Number of tokens that are kept and verified.
    known: usize,
    embed: usize,
    lock: Lock,
}

/// The tiles of an unfinished image that are as they were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Number of good tiles, from the first one on.
    pub tiles: usize,
    /// Whether the next tile was finished and is no longer what was written.
    pub is_changed: bool,
}

/// The folder of the unfinished image that is written to `path`.
fn partial(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    path.with_file_name(name)
}

/// Whether there is an unfinished image at `path`, which a run may finish.
pub fn is_begun(path: &Path) -> bool {
    partial(path).join(RUN_FILE).exists()
}

/// Removes the folder of an unfinished image at `path` if it holds nothing but a lock of nobody: a run was killed when it had
/// nothing else to do.
pub fn remove_empty(path: &Path) {
    let folder = partial(path);
    if names(&folder).is_ok_and(|names| names.iter().all(|name| name == LOCK_FILE)) {
        drop(Lock::take(&folder));
        // Fails if the folder has files. A run that has just created the folder creates it again.
        let _ = std::fs::remove_dir(&folder);
    }
}

/// Fails if another process generates the image at `path`. The folder of the image does not need to exist.
///
/// # Errors
/// [`Error::run`] with the number of that process.
pub fn check_owner(path: &Path) -> Result<()> {
    let folder = partial(path);
    match folder.join(LOCK_FILE).exists() {
        true => Lock::take(&folder).map(drop),
        false => Ok(()),
    }
}

impl Work {
    /// Opens the folder of the unfinished image at `path`, or creates it. `embed` is the number of values of a token.
    ///
    /// # Errors
    /// [`Error::input`] if the folder belongs to a run with another record; [`Error::run`] if another process generates
    /// the image, or if a file cannot be opened.
    pub fn open(path: &Path, record: Record, layout: Layout, embed: usize) -> Result<Self> {
        let folder = partial(path);
        let lock = lock(&folder, &record)?;
        let state = match State::read(&folder, &record)? {
            Some(state) => state,
            None => {
                let state = State { record, published: None };
                files::write_json(&folder.join(RUN_FILE), &state)?;
                state
            }
        };
        let [tokens, journal] = [TOKENS, JOURNAL].map(|name| files::open_or_create(&folder.join(name)));
        let (tokens, journal) = (tokens?, journal?);
        Ok(Self { folder, state, layout, tokens, journal, known: 0, embed, lock })
    }

    /// Path of the folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Places of the tiles in the image.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Number of tokens that are kept.
    pub fn known(&self) -> usize {
        self.known
    }

    /// Hash of the result, once it is published.
    pub fn published(&self) -> Option<&str> {
        self.state.published.as_deref()
    }

    /// Removes temporary files of a run that was killed, and moves back the tiles that it was about to publish.
    ///
    /// # Errors
    /// If a file cannot be moved or removed.
    pub fn tidy(&self) -> Result<()> {
        let result = self.folder.join(RESULT);
        if result.symlink_metadata().is_ok_and(|found| found.is_dir()) {
            for name in names(&result)? {
                let from = result.join(&name);
                match name == INDEX_FILE || is_temporary(&name) {
                    true => remove(&from)?,
                    false => std::fs::rename(&from, self.folder.join(&name)).or_run(from.display())?,
                }
            }
            remove(&result)?;
        }
        temporary::remove_in(&self.folder).or_run(self.folder.display())
    }

    /// Verifies the tiles, and forgets what follows the last good one. `has` tells whether the columns of a tile have a
    /// hash.
    ///
    /// # Errors
    /// [`Error::input`] if a token is not finite although its hash is right; errors of `has`; if a file cannot be read.
    pub fn verify(&mut self, mut has: impl FnMut(usize, &str) -> Result<bool>) -> Result<Verified> {
        let (mut done, mut end, mut is_changed) = (0, 0, false);
        let mut lines = BufReader::new(&self.journal);
        lines.rewind().map_err(self.failed(JOURNAL))?;
        while done < self.layout.count() {
            let mut text = vec![];
            lines.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut text).map_err(self.failed(JOURNAL))?;
            // A line without its end is one that a run was writing when it was killed.
            if text.is_empty() || text.last() != Some(&b'\n') && (text.len() as u64) < LONGEST_LINE {
                break;
            }
            if !self.is_good(&text, done, &mut has)? {
                is_changed = true;
                break;
            }
            (done, end) = (done + 1, end + text.len() as u64);
        }
        self.known = self.span(done).start;
        self.journal.set_len(end).map_err(self.failed(JOURNAL))?;
        self.tokens.set_len(self.place(self.known)).map_err(self.failed(TOKENS))?;
        Ok(Verified { tiles: done, is_changed })
    }

    /// Whether a line of the journal is that of tile `tile`, and its hashes are those of the tile's files.
    fn is_good(&self, line: &[u8], tile: usize, has: &mut impl FnMut(usize, &str) -> Result<bool>) -> Result<bool> {
        let Ok(line) = serde_json::from_slice::<Line>(line) else { return Ok(false) };
        let tokens = self.span(tile);
        let Some(bytes) = self.bytes(tokens.clone())? else { return Ok(false) };
        if line.tile != tile || line.tokens != sha256(&bytes) || !has(tile, &line.pixels)? {
            return Ok(false);
        }
        if let Some(index) = values(&bytes).position(|value| !value.is_finite()) {
            let (token, folder) = (tokens.start + index / self.embed, self.folder.display());
            let problem = format!("token {token} is not finite: remove {folder} to begin again");
            return Err(Error::input(self.folder.join(TOKENS).display(), problem));
        }
        Ok(true)
    }

    /// Tokens that tile `tile` needs and the tiles before it do not.
    fn span(&self, tile: usize) -> Range<usize> {
        let Layout { tiling, tokens, .. } = self.layout;
        tile.checked_sub(1).map_or(0, |last| tiling.end(last, tokens))..tiling.end(tile, tokens)
    }

    fn failed(&self, name: &str) -> impl Fn(std::io::Error) -> Error + use<> {
        let path = self.folder.join(name);
        move |error| Error::run_caused(path.display(), error)
    }

    /// Position of token `index` in the file of tokens.
    fn place(&self, index: usize) -> u64 {
        (4 * self.embed * index) as u64
    }

    /// Bytes of tokens. `None` if the file ends before them.
    fn bytes(&self, tokens: Range<usize>) -> Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; 4 * self.embed * tokens.len()];
        let mut file = &self.tokens;
        let from = SeekFrom::Start(self.place(tokens.start));
        match file.seek(from).and_then(|_| file.read_exact(&mut bytes)) {
            Ok(()) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(self.failed(TOKENS)(error)),
        }
    }

    /// Reads the known tokens from index `begin`, `[n, E]`.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn read(&self, begin: usize) -> Result<Array2<f32>> {
        let missing = || Error::run(self.folder.join(TOKENS).display(), "has become shorter during the run");
        let bytes = self.bytes(begin..self.known)?.ok_or_else(missing)?;
        Array2::from_shape_vec((self.known - begin, self.embed), values(&bytes).collect()).or_run("tokens")
    }

    /// Appends the tokens of tile `tile`, whose columns are on disk and have the hash `pixels`.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn append(&mut self, tile: usize, tokens: &[Array1<f32>], pixels: String) -> Result<()> {
        let bytes: Vec<u8> = tokens.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
        let line = Line { tile, tokens: sha256(&bytes), pixels };
        let line = serde_json::to_string(&line).or_run(JOURNAL)? + "\n";
        let end = self.place(self.known);
        let append = |mut file: &File, place: SeekFrom, bytes: &[u8]| {
            file.seek(place).and_then(|_| file.write_all(bytes)).and_then(|()| file.sync_data())
        };
        append(&self.tokens, SeekFrom::Start(end), &bytes).map_err(self.failed(TOKENS))?;
        append(&self.journal, SeekFrom::End(0), line.as_bytes()).map_err(self.failed(JOURNAL))?;
        self.known += tokens.len();
        Ok(())
    }

    /// Records that the result is published, or will be by a single rename, and has this hash.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn mark_published(&mut self, hash: Option<String>) -> Result<()> {
        self.state.published = hash;
        files::write_json(&self.folder.join(RUN_FILE), &self.state)
    }

    /// Moves the tiles to a new folder, which then holds nothing but them and their index. Returns the new folder.
    ///
    /// # Errors
    /// If a file cannot be moved or written.
    pub fn gather(&self, index: &Index) -> Result<PathBuf> {
        let result = self.folder.join(RESULT);
        std::fs::create_dir(&result).or_run(result.display())?;
        for tile in &index.tiles {
            let from = self.folder.join(&tile.file);
            std::fs::rename(&from, result.join(&tile.file)).or_run(from.display())?;
        }
        files::write_json(&result.join(INDEX_FILE), index)?;
        temporary::remove_in(&result).or_run(result.display())?;
        Ok(result)
    }

    /// Removes a file of the folder that is no longer needed.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn discard(&self, name: &str) -> Result<()> {
        remove(&self.folder.join(name))
    }

    /// Removes the folder of an image whose result is published. `run.json` is removed last: after an interruption, the
    /// same command finds there that the image is done.
    ///
    /// # Errors
    /// If a file cannot be removed.
    pub fn remove(self) -> Result<()> {
        let Self { folder, lock, .. } = self;
        for name in names(&folder)?.into_iter().filter(|name| name != LOCK_FILE && name != RUN_FILE) {
            remove(&folder.join(name))?;
        }
        drop(lock);
        remove(&folder.join(RUN_FILE))?;
        match std::fs::remove_dir(&folder) {
            // Another process has already begun to generate the image again.
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed.or_run(folder.display()),
        }
    }
}

impl State {
    /// Reads the state of a folder. `None` if the folder is missing or holds no image yet.
    ///
    /// # Errors
    /// [`Error::input`] if the folder holds something else than an unfinished image with this record.
    fn read(folder: &Path, record: &Record) -> Result<Option<Self>> {
        let other = || {
            let problem = "holds an unfinished image of another run: remove it, or name another --output";
            Error::input(folder.display(), problem)
        };
        let path = folder.join(RUN_FILE);
        if path.symlink_metadata().is_ok() {
            let text = match files::read(&path) {
                // The process that had the folder has just removed it.
                Err(_) if path.symlink_metadata().is_err() => return Ok(None),
                read => read.map_err(|error| other().because(error))?,
            };
            let found = serde_json::from_slice::<Self>(&text).ok();
            return found.filter(|found| found.record == *record).map(Some).ok_or_else(other);
        }
        match names(folder)?.iter().any(|name| name != LOCK_FILE && !is_temporary(name)) {
            true => Err(other()),
            false => Ok(None),
        }
    }
}

/// Creates the folder of an image if it does not exist, and takes its lock. A folder that is not of a run with this
/// record is not touched.
fn lock(folder: &Path, record: &Record) -> Result<Lock> {
    loop {
        if folder.symlink_metadata().is_ok_and(|found| !found.is_dir()) {
            return Err(Error::input(folder.display(), "is not a folder: remove it, or name another --output"));
        }
        if !folder.join(LOCK_FILE).exists() {
            State::read(folder, record)?;
        }
        match std::fs::create_dir(folder) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error).or_run(folder.display()),
            _ => {}
        }
        if let Some(lock) = Lock::take(folder)? {
            return Ok(lock);
        }
    }
}

fn values(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes))
}

/// Names of the files and folders in a folder. None if the folder is missing.
fn names(folder: &Path) -> Result<Vec<OsString>> {
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.map(|entry| entry.file_name());
    match std::fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(vec![]),
        Err(error) => Err(error).or_run(folder.display()),
        Ok(entries) => entries.map(name).collect::<Result<_, _>>().or_run(folder.display()),
    }
}

/// Removes a file, or a folder with all its files. It does not need to exist.
fn remove(path: &Path) -> Result<()> {
    match temporary::delete(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed.or_run(path.display()),
    }
}
