//! A picture on disk that is written in columns and read in rows. Neither its width nor its height is limited by the
//! memory.

use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ndarray::ArrayView3;

use crate::digest::Hash;
use crate::picture::to_byte;
use crate::{Error, Result, files};

/// Bytes per pixel: red, green, blue.
const PIXEL: usize = 3;

/// A file with the pixels of a picture, row by row.
#[derive(Debug)]
pub struct Canvas {
    path: PathBuf,
    file: File,
    width: usize,
    height: usize,
}

impl Canvas {
    /// Opens the canvas at `path`, or creates it.
    ///
    /// # Errors
    /// [`Error::input`] if `path` is not a file; [`Error::run`] if it cannot be opened.
    pub fn open(path: &Path, width: usize, height: usize) -> Result<Self> {
        let file = files::open_or_create(path)?;
        Ok(Self { path: path.to_path_buf(), file, width, height })
    }

    /// Moves to pixel `x` of row `y`.
    fn seek(&mut self, x: usize, y: usize) -> std::io::Result<u64> {
        self.file.seek(SeekFrom::Start((PIXEL * (y * self.width + x)) as u64))
    }

    /// Writes columns `[3, height, columns]` with values in -1..1 at pixel `x`, and syncs them to the disk.
    ///
    /// # Errors
    /// [`Error::run`] if they cannot be written.
    pub fn write(&mut self, x: usize, columns: ArrayView3<f32>) -> Result<()> {
        let (_, height, count) = columns.dim();
        let mut write = || {
            let mut bytes = vec![0; PIXEL * count];
            for y in 0..height {
                for (index, byte) in bytes.iter_mut().enumerate() {
                    *byte = to_byte(columns[[index % PIXEL, y, index / PIXEL]]);
                }
                self.seek(x, y)?;
                self.file.write_all(&bytes)?;
            }
            self.file.sync_data()
        };
        write().map_err(failed(&self.path))
    }

    /// SHA-256 of `count` columns from pixel `x` on, row by row, in hexadecimal. `None` if the file ends before them.
    ///
    /// # Errors
    /// [`Error::run`] if they cannot be read.
    pub fn hash(&mut self, x: usize, count: usize) -> Result<Option<String>> {
        let (mut hash, mut bytes) = (Hash::default(), vec![0; PIXEL * count]);
        for y in 0..self.height {
            match self.seek(x, y).and_then(|_| self.file.read_exact(&mut bytes)) {
                Ok(()) => hash.add(&bytes),
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(unread(&self.path)(error)),
            }
        }
        Ok(Some(hash.hex()))
    }

    /// Writes the whole picture as a PNG. `path` is replaced only once the file is complete.
    ///
    /// # Errors
    /// [`Error::run`] if the file cannot be written.
    pub fn write_png(&mut self, path: &Path) -> Result<()> {
        self.seek(0, 0).map_err(unread(&self.path))?;
        let mut rows = BufReader::new(&self.file);
        files::write_beside(path, |beside| {
            let file = BufWriter::new(File::create(beside).map_err(failed(path))?);
            let mut encoder = png::Encoder::new(file, self.width as u32, self.height as u32);
            encoder.set_color(png::ColorType::Rgb);
            encoder.set_depth(png::BitDepth::Eight);
            encoder.set_compression(png::Compression::Fast);
            let mut writer = encoder.write_header().map_err(failed(path))?;
            let mut pixels = writer.stream_writer().map_err(failed(path))?;
            let mut row = vec![0; PIXEL * self.width];
            for _ in 0..self.height {
                rows.read_exact(&mut row).map_err(unread(&self.path))?;
                pixels.write_all(&row).map_err(failed(path))?;
            }
            pixels.finish().map_err(failed(path))?;
            writer.finish().map_err(failed(path))
        })
    }
}

fn failed<E: std::error::Error + Send + Sync + 'static>(path: &Path) -> impl Fn(E) -> Error {
    move |error| Error::run(path.display(), "cannot be written").because(error)
}

fn unread(path: &Path) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::run(path.display(), "cannot be read").because(error)
}
