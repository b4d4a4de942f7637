//! The pictures that models are measured on.

use std::path::{Path, PathBuf};

use eqim::picture::{self, Side};
use eqim::{Config, Result};
use eqim_calibration::pictures;
use ndarray::Array3;

/// A picture as the tokenizer takes it, and its class.
pub struct Photo {
    /// Its file.
    pub path: PathBuf,
    /// `[3, height, width]` in -1..1.
    pub pixels: Array3<f32>,
    /// `None` where its folder is no class.
    pub class: Option<usize>,
}

/// The pictures of a folder, and how they got their classes.
///
/// # Errors
/// [`Error::Input`] for a folder without pictures, or one that cannot be read.
pub fn photos(folder: &Path, config: &Config) -> Result<(Vec<Photo>, &'static str)> {
    let paths = pictures(folder)?;
    let class_of = |path: &Path| -> Option<String> {
        let inside = path.strip_prefix(folder).ok()?.components().next()?;
        let name = inside.as_os_str().to_str()?;
        folder.join(name).is_dir().then(|| name.to_string())
    };
    let mut folders: Vec<String> = paths.iter().filter_map(|path| class_of(path)).collect();
    folders.sort();
    folders.dedup();
    let generator = &config.generator;
    let named = !folders.is_empty() && folders.iter().all(|name| generator.class_names.contains(name));
    let (known, how): (&[String], _) = if named {
        (&generator.class_names, "the names of their folders")
    } else if folders.len() == generator.class_num {
        (&folders, "the order of their folders")
    } else {
        (&[], "none: their folders are not the model's classes")
    };
    let class = |path: &Path| class_of(path).and_then(|name| known.iter().position(|known| *known == name));
    let (height, multiple) = (config.tokenizer.image_height(), config.tokenizer.token_width());
    let read = |path: PathBuf| {
        let pixels = picture::read(&path, height, multiple, Side::Left)?.pixels;
        Ok(Photo { class: class(&path), pixels, path })
    };
    Ok((paths.into_iter().map(read).collect::<Result<_>>()?, how))
}
