//! The columns of an image in tiles: where they are written, and the result that they become.

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::digest::{Hash, sha256_of};
use crate::generate::tiles::Tiling;
use crate::picture::canvas::Canvas;
use crate::picture::{self, Side};
use crate::{Error, Result, ResultExt, files};
use ndarray::ArrayView3;
use serde::Serialize;

/// Name of the file that lists the tiles of a folder.
pub const INDEX_FILE: &str = "index.json";

/// Whether an image is written as a folder of tiles: its path ends in `/`.
pub fn is_folder(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(b"/")
}

/// Places of the tiles in an image.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Division into tiles.
    pub tiling: Tiling,
    /// Length of the image in tokens.
    pub tokens: usize,
    /// Width and height of the image in pixels.
    pub size: (usize, usize),
    /// Width of a token in pixels.
    pub token_width: usize,
    /// Side on which the image grows.
    pub side: Side,
}

impl Layout {
    /// Number of tiles.
    pub fn count(&self) -> usize {
        self.tiling.count(self.tokens)
    }

    /// Columns of the image that become complete with tile `index`, in pixels.
    pub fn columns(&self, index: usize) -> Range<usize> {
        let tokens = self.tiling.completes(index, self.tokens);
        let (begin, end) = (tokens.start * self.token_width, tokens.end * self.token_width);
        match self.side {
            Side::Right => begin..end,
            Side::Left => self.size.0 - end..self.size.0 - begin,
        }
    }

    /// Index of the folder of all tiles.
    pub fn index(&self) -> Index {
        let (width, height) = self.size;
        let tile = |index| {
            let columns = self.columns(index);
            Tile { file: tile_name(columns.start), x: columns.start, width: columns.len() }
        };
        let mut tiles: Vec<Tile> = (0..self.count()).map(tile).collect();
        tiles.sort_unstable_by_key(|tile| tile.x);
        Index { width, height, tiles }
    }

    /// Hash of the result at `path`: of the PNG, or of all files of the folder. `None` if a file is missing.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn hash_of_result(&self, path: &Path) -> Result<Option<String>> {
        if !is_folder(path) {
            return hash_of_file(path);
        }
        let mut hash = Hash::default();
        for name in (0..self.count()).map(|tile| tile_name(self.columns(tile).start)).chain([INDEX_FILE.into()]) {
            let Some(file) = hash_of_file(&path.join(name))? else { return Ok(None) };
            hash.add(file);
        }
        Ok(Some(hash.hex()))
    }
}

/// Content of the `index.json` of a folder of tiles.
#[derive(Debug, Serialize)]
pub struct Index {
    /// Width of the image in pixels.
    width: usize,
    /// Height of the image in pixels.
    height: usize,
    /// Tiles from left to right, without overlap.
    pub tiles: Vec<Tile>,
}

/// A tile of an image.
#[derive(Debug, Serialize)]
pub struct Tile {
    /// Name of the PNG in the folder.
    pub file: String,
    /// Position of the first column in the image, in pixels.
    x: usize,
    /// Width in pixels.
    width: usize,
}

/// Destination of finished columns, in the folder of the unfinished image.
#[derive(Debug)]
pub enum Sink {
    /// A file of pixels that becomes a PNG.
    Png(Canvas),
    /// A folder with one PNG per tile.
    Tiles(PathBuf),
}

impl Sink {
    /// Name of the file of pixels.
    pub const PIXELS: &str = "pixels.rgb";

    /// The destination in `folder` of the columns of an image at `path`.
    ///
    /// # Errors
    /// If the file of pixels cannot be opened.
    pub fn open(path: &Path, folder: &Path, (width, height): (usize, usize)) -> Result<Self> {
        if is_folder(path) {
            return Ok(Self::Tiles(folder.to_path_buf()));
        }
        Ok(Self::Png(Canvas::open(&folder.join(Self::PIXELS), width, height)?))
    }

    /// Writes columns `[3, height, n]` at pixel `x`, and syncs them to disk.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn write(&mut self, x: usize, columns: ArrayView3<f32>) -> Result<()> {
        match self {
            Self::Png(canvas) => canvas.write(x, columns),
            Self::Tiles(folder) => picture::write_png(&folder.join(tile_name(x)), columns),
        }
    }

    /// Hash of columns that were written. `None` if they are missing.
    ///
    /// # Errors
    /// If they cannot be read, or if a folder or a link is in the place of a tile.
    pub fn hash(&mut self, columns: &Range<usize>) -> Result<Option<String>> {
        match self {
            Self::Png(canvas) => canvas.hash(columns.start, columns.len()),
            Self::Tiles(folder) => {
                let path = folder.join(tile_name(columns.start));
                if path.symlink_metadata().is_ok_and(|found| !found.is_file()) {
                    return Err(Error::input(path.display(), "is not a file: remove it"));
                }
                hash_of_file(&path)
            }
        }
    }
}

/// SHA-256 of a file in hexadecimal. `None` if there is no file.
fn hash_of_file(path: &Path) -> Result<Option<String>> {
    if !path.symlink_metadata().is_ok_and(|found| found.is_file()) {
        return Ok(None);
    }
    let (_, hash) = sha256_of(files::open(path)?).or_run(path.display())?;
    Ok(Some(hash))
}

/// File name of a tile. File names sort in the order of the columns.
fn tile_name(x: usize) -> String {
    format!("{x:010}.png")
}
