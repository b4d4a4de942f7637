//! Reads and writes images: PNG and JPEG files, as arrays `[3, height, width]` with values in -1..1.

pub mod animation;
pub mod canvas;
pub mod folder;
pub mod quality;

use std::fs::File;
use std::io::{BufReader, Cursor};
use std::path::Path;

use image::imageops::{self, FilterType};
use image::{ExtendedColorType, ImageDecoder, ImageError, ImageFormat, ImageReader, RgbImage};
use ndarray::{Array3, ArrayView3};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, ResultExt, files, kind};

/// Largest width of a picture that is read, in pixels after scaling. Without this limit, a very flat picture would be
/// scaled to gigabytes.
pub const WIDEST: usize = 1 << 16;

/// Converts a channel's value in -1..1 to a byte, rounded as in the reference (`engine_generator.py`).
pub fn to_byte(value: f32) -> u8 {
    ((value + 1.0) / 2.0 * 255.0).clamp(0.0, 255.0).round_ties_even() as u8
}

/// Pixels of `image [3, height, width]` as bytes, row by row, in the order red, green, blue.
pub fn bytes(image: ArrayView3<f32>) -> Vec<u8> {
    image.permuted_axes([1, 2, 0]).iter().map(|&value| to_byte(value)).collect()
}

/// Writes `image [3, height, width]` as a PNG. `path` is replaced only once the file is complete.
///
/// # Errors
/// [`Error::run`] if the file cannot be written.
pub fn write_png(path: &Path, image: ArrayView3<f32>) -> Result<()> {
    let (_, height, width) = image.dim();
    write_rgb(path, &bytes(image), (width as u32, height as u32))
}

/// Writes pixels as a PNG. They are given row by row, in the order red, green, blue. `path` is replaced only once the
/// file is complete.
///
/// # Errors
/// [`Error::run`] if the file cannot be written.
pub fn write_rgb(path: &Path, pixels: &[u8], (width, height): (u32, u32)) -> Result<()> {
    // The PNG is encoded in memory first. If it were encoded to a file and the disk became full, the end of the picture
    // could be lost without an error.
    let mut file = Cursor::new(vec![]);
    image::write_buffer_with_format(&mut file, pixels, width, height, ExtendedColorType::Rgb8, ImageFormat::Png)
        .map_err(|error| Error::run(path.display(), "cannot be written").because(error))?;
    files::write(path, file.get_ref())
}

/// A side of a picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Side {
    /// The first columns.
    Left,
    /// The last columns.
    #[default]
    Right,
}

/// A picture that was read, with its sizes before scaling and cropping.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Pixels `[3, height, width]` with values in -1..1.
    pub pixels: Array3<f32>,
    /// Width and height in the file, in the upright orientation.
    pub original: (u32, u32),
    /// Width after scaling, before cropping.
    pub scaled: usize,
}

/// Reads a PNG or JPEG in its upright orientation.
///
/// # Errors
/// [`Error::input`] if the file is not a PNG or JPEG, or is truncated.
pub fn load(path: &Path) -> Result<RgbImage> {
    let bad = |problem: String| Error::input(path.display(), problem);
    let unreadable = |error: ImageError| bad("is not a PNG or JPEG that can be read".into()).because(error);
    let reader = open(path)?;
    if !matches!(reader.format(), Some(ImageFormat::Png | ImageFormat::Jpeg))
        && let Some(kind) = kind::of(path)
    {
        return Err(bad(format!("is {kind}")));
    }
    if reader.format() == Some(ImageFormat::Jpeg) && !is_whole_jpeg(path)? {
        return Err(bad("is a truncated JPEG: its end is missing".into()));
    }
    let mut image = reader.decode().map_err(unreadable)?;
    // Cameras store pictures in the orientation of the sensor, and separately the rotation that turns them upright.
    let orientation = open(path)?.into_decoder().and_then(|mut decoder| decoder.orientation());
    image.apply_orientation(orientation.map_err(unreadable)?);
    Ok(image.to_rgb8())
}

/// Reads a PNG or JPEG and scales it to `height`, with its proportions kept. The width is then cropped to a multiple of
/// `multiple`; the side `kept` stays.
///
/// # Errors
/// [`Error::input`] if the file is not a PNG or JPEG, or if the scaled picture is narrower than `2 · multiple` or wider
/// than [`WIDEST`].
pub fn read(path: &Path, height: usize, multiple: usize, kept: Side) -> Result<Picture> {
    let bad = |problem: String| Error::input(path.display(), problem);
    let image = load(path)?;
    let original = (image.width(), image.height());
    let scaled = (original.0 as f64 * height as f64 / original.1 as f64).round() as usize;
    let width = scaled / multiple * multiple;
    if width < 2 * multiple || scaled > WIDEST {
        return Err(bad(format!(
            "is {scaled} pixels wide at a height of {height}, expected {} (two tokens) to {WIDEST}",
            2 * multiple
        )));
    }
    let same = original.1 as usize == height;
    let resized = || imageops::resize(&image, scaled as u32, height as u32, FilterType::Lanczos3);
    let pixels = if same { image } else { resized() };
    let cut = if kept == Side::Right { scaled - width } else { 0 };
    let pixels = Array3::from_shape_fn((3, height, width), |(channel, y, x)| {
        let pixel = pixels.get_pixel((x + cut) as u32, y as u32);
        f32::from(pixel[channel]) / 127.5 - 1.0
    });
    Ok(Picture { pixels, original, scaled })
}

/// Whether a file begins like a PNG or JPEG.
///
/// # Errors
/// [`Error::input`] if the file cannot be read.
pub fn is_picture(path: &Path) -> Result<bool> {
    Ok(matches!(open(path)?.format(), Some(ImageFormat::Png | ImageFormat::Jpeg)))
}

/// Whether a JPEG has its end marker. The decoder replaces missing data without an error.
fn is_whole_jpeg(path: &Path) -> Result<bool> {
    let bytes = files::read(path)?;
    let mut at = 2;
    while let Some(&[0xff, marker, ..]) = bytes.get(at..) {
        at += match marker {
            0xd9 => return Ok(true),
            // Fill bytes, and markers without a length.
            0xff => 1,
            0x01 | 0xd0..=0xd8 => 2,
            _ => {
                let Some(&[high, low, ..]) = bytes.get(at + 2..) else { return Ok(false) };
                2 + usize::from(u16::from_be_bytes([high, low]))
            }
        };
        if marker == 0xda {
            // Compressed data, up to a marker that is neither a stuffed byte nor a restart.
            let scan = bytes.get(at..).unwrap_or_default().windows(2);
            let end = |pair: &[u8]| pair[0] == 0xff && !matches!(pair[1], 0 | 0xd0..=0xd7);
            let Some(length) = scan.into_iter().position(end) else { return Ok(false) };
            at += length;
        }
    }
    Ok(false)
}

fn open(path: &Path) -> Result<ImageReader<BufReader<File>>> {
    let reader = ImageReader::new(BufReader::new(files::open(path)?));
    reader.with_guessed_format().or_input(path.display())
}
