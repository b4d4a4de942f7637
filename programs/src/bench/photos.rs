//! Pictures to measure models on.

use std::path::{Path, PathBuf};

use eqim::picture::folder::{Entry, Folder};
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

/// Reads the pictures of a folder, and names those that are skipped. The second result says how their classes were
/// determined.
///
/// # Errors
/// Those of [`Folder::open`].
pub fn photos(folder: &Path, config: &Config) -> Result<(Vec<Photo>, &'static str)> {
    let (height, multiple) = (config.tokenizer.image_height(), config.tokenizer.token_width());
    let look = |path: &Path, bytes: &[u8]| {
        let image = picture::decode(path, bytes)?;
        Ok(picture::scale(path, image, height, multiple, Side::Left)?.pixels)
    };
    let Folder { classes, pictures, skipped } = Folder::open(folder, look)?;
    skipped.iter().for_each(|problem| eqim_cli::note(format_args!("skipped: {problem}")));
    if !skipped.is_empty() {
        eqim_cli::note(format_args!("{} pictures ({} skipped)", pictures.len(), skipped.len()));
    }
    let generator = &config.generator;
    let named = !classes.is_empty() && classes.iter().all(|name| generator.class_names.contains(name));
    let (known, how): (&[String], _) = if named {
        (&generator.class_names, "the names of their folders")
    } else if classes.len() == generator.class_num {
        (&classes, "the order of their folders")
    } else {
        (&[], "nothing: the folders are not the model's classes")
    };
    let class = |index: usize| known.iter().position(|known| *known == classes[index]);
    let photo = |Entry { path, class: index, content: pixels }| Photo { class: index.and_then(class), pixels, path };
    Ok((pictures.into_iter().map(photo).collect(), how))
}
