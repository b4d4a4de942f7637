//! Writing of decoded strips to an image file.

use std::path::{Path, PathBuf};

use eqim::generate::finish::Finish;
use eqim::generate::tiles::Strip;
use eqim::picture::canvas::Canvas;
use eqim::temporary::Temporary;
use eqim::{Result, ResultExt, files, picture};

/// An image that is written when its last strip arrives.
pub struct ImageWriter {
    path: PathBuf,
    finish: Finish,
    /// Width and height in pixels.
    size: (usize, usize),
    /// The strips of an image of several tiles, in a temporary folder.
    canvas: Option<(Temporary, Canvas)>,
}

impl ImageWriter {
    /// An image of `size` pixels at `path`.
    pub fn new(path: PathBuf, finish: Finish, size: (usize, usize)) -> Self {
        Self { path, finish, size, canvas: None }
    }

    /// Path of the image.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the next strip. Writes the image if it is complete, and returns whether it is.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&mut self, strip: Strip) -> Result<bool> {
        let (width, height) = self.size;
        let is_last = strip.x + strip.pixels.dim().2 == width;
        if is_last && strip.x == 0 {
            picture::write_png(&self.path, self.finish.columns(0, strip.pixels, width).1.view())?;
            return Ok(true);
        }
        if self.canvas.is_none() {
            let beside = Temporary::new(files::folder(&self.path), 0o700).or_run(self.path.display())?;
            let canvas = Canvas::open(&beside.path().join("pixels.rgb"), width, height)?;
            self.canvas = Some((beside, canvas));
        }
        let Some((_, canvas)) = &mut self.canvas else { return Ok(false) };
        let (x, pixels) = self.finish.columns(strip.x, strip.pixels, width);
        canvas.write(x, pixels.view())?;
        if is_last {
            canvas.write_png(&self.path)?;
        }
        Ok(is_last)
    }
}
