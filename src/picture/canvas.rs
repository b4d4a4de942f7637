//! A picture on disk that is written column by column and read row by row, so that neither its width nor its height has to
//! fit in memory.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ndarray::ArrayView3;

use crate::picture::to_byte;
use crate::{Error, Result, files};

/// Bytes of a pixel: red, green, blue.
const PIXEL: usize = 3;

/// The pixels of a picture, row after row, in a file.
#[derive(Debug)]
pub struct Canvas {
    path: PathBuf,
    file: File,
    width: usize,
    height: usize,
}

impl Canvas {
    /// Opens the canvas at `path`, or makes it.
    ///
    /// # Errors
    /// [`Error::run`] when it cannot be opened.
    pub fn open(path: &Path, width: usize, height: usize) -> Result<Self> {
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = open.map_err(|error| failed(path)(error))?;
        Ok(Self { path: path.to_path_buf(), file, width, height })
    }

    /// Writes columns `[3, height, columns]` in -1..1 at pixel `x`, down to the disk.
    ///
    /// # Errors
    /// [`Error::run`] when they cannot be written.
    pub fn write(&mut self, x: usize, columns: ArrayView3<f32>) -> Result<()> {
        let (_, height, count) = columns.dim();
        let mut write = || {
            let mut bytes = vec![0; PIXEL * count];
            for y in 0..height {
                for (index, byte) in bytes.iter_mut().enumerate() {
                    *byte = to_byte(columns[[index % PIXEL, y, index / PIXEL]]);
                }
                self.file.seek(SeekFrom::Start((PIXEL * (y * self.width + x)) as u64))?;
                self.file.write_all(&bytes)?;
            }
            self.file.sync_data()
        };
        write().map_err(failed(&self.path))
    }

    /// Writes the whole picture as a PNG, replacing `path` when all of it is written.
    ///
    /// # Errors
    /// [`Error::run`] when it cannot be written.
    pub fn write_png(&mut self, path: &Path) -> Result<()> {
        self.file.seek(SeekFrom::Start(0)).map_err(failed(&self.path))?;
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
                rows.read_exact(&mut row).map_err(failed(&self.path))?;
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
