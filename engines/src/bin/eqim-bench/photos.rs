//! Pictures to measure models on.

use std::path::{Path, PathBuf};

use eqim::picture::folder::{Classes, classes, none_in};
use eqim::picture::{self, Side};
use eqim::{Config, Result};
use ndarray::Array3;

/// A picture in the form that the tokenizer needs, and its class.
pub struct Photo {
    /// Path of the file.
    pub path: PathBuf,
    /// Pixels `[3, height, width]` in -1..1.
    pub pixels: Array3<f32>,
    /// Class of the picture; `None` if its folder is not a class of the model.
    pub class: Option<usize>,
}

/// Reads the pictures of a folder. The second result says how their classes were determined.
///
/// # Errors
/// [`eqim::Error::input`] if the folder contains no pictures, or if a picture or the folder cannot be read.
pub fn photos(folder: &Path, config: &Config) -> Result<(Vec<Photo>, &'static str)> {
    let Classes { names, pictures } = classes(folder)?;
    if pictures.is_empty() {
        return Err(none_in(folder));
    }
    let generator = &config.generator;
    let named = !names.is_empty() && names.iter().all(|name| generator.class_names.contains(name));
    let (known, how): (&[String], _) = if named {
        (&generator.class_names, "the names of their folders")
    } else if names.len() == generator.class_num {
        (&names, "the order of their folders")
    } else {
        (&[], "nothing: the folders are not the model's classes")
    };
    let class = |index: Option<usize>| index.and_then(|index| known.iter().position(|known| *known == names[index]));
    let (height, multiple) = (config.tokenizer.image_height(), config.tokenizer.token_width());
    let read = |(path, index): (PathBuf, Option<usize>)| {
        let pixels = picture::read(&path, height, multiple, Side::Left)?.pixels;
        Ok(Photo { class: class(index), pixels, path })
    };
    Ok((pictures.into_iter().map(read).collect::<Result<_>>()?, how))
}
