//! Reads and writes images: PNG and JPEG files, as arrays `[3, height, width]` with values in -1..1.

pub mod animation;
pub mod canvas;
pub mod folder;
mod jpeg;
pub mod quality;

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufReader, Cursor, Read};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use image::imageops::{self, FilterType};
use image::{DynamicImage, ExtendedColorType, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage};
use ndarray::{Array3, ArrayView3, Axis};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, ResultExt, files, kind};

/// Largest width of a picture that is read, in pixels after scaling. Without this limit, a very flat picture would be
/// scaled to gigabytes.
pub const WIDEST: usize = 1 << 16;

/// Largest number of pixels of a picture that is read. A small file can hold a picture of any size.
pub const MOST_PIXELS: u64 = 100_000_000;

/// Largest file of a picture that is read, in bytes.
const LARGEST_FILE: u64 = 256 << 20;

/// Pictures with more pixels are decoded one at a time, so that a folder of them is read in bounded memory.
const LARGE: u64 = 1 << 24;

/// Converts a channel's value in -1..1 to a byte, rounded as in the reference (`engine_generator.py`).
pub fn to_byte(value: f32) -> u8 {
    ((value + 1.0) / 2.0 * 255.0).clamp(0.0, 255.0).round_ties_even() as u8
}

/// Pixels of `image [3, height, width]` as bytes, row by row, in the order red, green, blue.
pub fn bytes(image: ArrayView3<f32>) -> Vec<u8> {
    image.permuted_axes([1, 2, 0]).iter().map(|&value| to_byte(value)).collect()
}

/// An image that arrives in strips.
pub struct Pixels {
    /// Width and height in pixels.
    pub size: (usize, usize),
    /// Bytes, `[height, width, 3]`.
    pub bytes: Vec<u8>,
}

impl Pixels {
    /// A black image.
    pub fn new(size: (usize, usize)) -> Self {
        Self { size, bytes: vec![0; 3 * size.0 * size.1] }
    }

    /// Writes columns `[3, height, width]` at pixel `x`.
    pub fn write(&mut self, x: usize, columns: ArrayView3<f32>) {
        let count = columns.dim().2;
        for (y, row) in bytes(columns).chunks(3 * count).enumerate() {
            let start = 3 * (y * self.size.0 + x);
            self.bytes[start..start + 3 * count].copy_from_slice(row);
        }
    }
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
    let file = encode(pixels, (width, height), Format::Png).map_err(|error| error.about(path.display()))?;
    files::write(path, &file)
}

/// Formats of pictures that are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Format {
    /// PNG, without loss.
    #[default]
    Png,
    /// JPEG.
    Jpeg,
    /// WebP, without loss.
    WebP,
}

/// Encodes pixels as a file. They are given row by row, in the order red, green, blue.
///
/// # Errors
/// [`Error::run`] if the format does not have pictures of this size.
pub fn encode(pixels: &[u8], (width, height): (u32, u32), format: Format) -> Result<Vec<u8>> {
    let format = match format {
        Format::Png => ImageFormat::Png,
        Format::Jpeg => ImageFormat::Jpeg,
        Format::WebP => ImageFormat::WebP,
    };
    let mut file = Cursor::new(vec![]);
    image::write_buffer_with_format(&mut file, pixels, width, height, ExtendedColorType::Rgb8, format)
        .map_err(|error| Error::run(format!("{width}×{height} pixels"), "cannot be encoded").because(error))?;
    Ok(file.into_inner())
}

/// A side of a picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
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

/// Reads the file of a picture. The bytes beyond the largest length that [`decode`] accepts are left out.
///
/// # Errors
/// [`Error::input`] if it cannot be opened; [`Error::run`] if it cannot be read.
pub fn contents(path: &Path) -> Result<Vec<u8>> {
    contents_of(path, files::open(path)?)
}

/// Reads the bytes of the picture at `path` from `file`, as [`contents`] does.
///
/// # Errors
/// [`Error::run`] if they cannot be read.
pub fn contents_of(path: &Path, file: impl Read) -> Result<Vec<u8>> {
    let mut bytes = vec![];
    let read = file.take(LARGEST_FILE + 1).read_to_end(&mut bytes);
    read.map_err(|error| Error::run(path.display(), "cannot be read").because(error))?;
    Ok(bytes)
}

/// Reads a PNG or JPEG in its upright orientation.
///
/// # Errors
/// Those of [`contents`] and [`decode`].
pub fn load(path: &Path) -> Result<RgbImage> {
    decode(path, &contents(path)?)
}

/// Decodes the bytes of the PNG or JPEG at `path`, in its upright orientation.
///
/// # Errors
/// [`Error::input`] if the file is not a PNG or JPEG, is truncated, or has more than [`MOST_PIXELS`] pixels.
pub fn decode(path: &Path, bytes: &[u8]) -> Result<RgbImage> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let bad = |problem: String| Error::input(path.display(), problem);
    let unreadable = |error: ImageError| bad("is not a PNG or JPEG that can be read".into()).because(error);
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(bad(format!("has more than {} MB, the most that is read", LARGEST_FILE >> 20)));
    }
    let truncated = |name: &str| bad(format!("is a truncated {name}: it has no size"));
    let (format, (width, height)) = match image::guess_format(bytes) {
        Ok(format @ ImageFormat::Png) => (format, png_size(bytes).ok_or_else(|| truncated("PNG"))?),
        Ok(format @ ImageFormat::Jpeg) => (format, jpeg::size(bytes).ok_or_else(|| truncated("JPEG"))?),
        _ => {
            let found = kind::recognise(bytes).map(|kind| kind.instead_of("a PNG or JPEG"));
            return Err(bad(found.unwrap_or_else(|| "is of an unknown format, expected a PNG or JPEG".into())));
        }
    };
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MOST_PIXELS {
        let most = MOST_PIXELS / 1_000_000;
        return Err(bad(format!("is {width}×{height} pixels, expected at most {most} million pixels: scale it down")));
    }
    let _turn = (pixels > LARGE).then(|| ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner));
    let bytes = match format {
        ImageFormat::Jpeg => {
            jpeg::completed(bytes).ok_or_else(|| bad("is a truncated JPEG: a part of its pixels is missing".into()))?
        }
        _ => Cow::Borrowed(bytes),
    };
    let failed = |error: ImageError| match error {
        ImageError::Limits(_) => bad(format!("has more metadata than fits a picture of {width}×{height} pixels")),
        error => unreadable(error),
    };
    let mut reader = ImageReader::with_format(Cursor::new(&bytes), format);
    reader.limits(limits(pixels));
    let mut decoder = reader.into_decoder().map_err(failed)?;
    // Cameras store pictures in the orientation of the sensor, and separately the rotation that turns them upright.
    let orientation = decoder.orientation().map_err(failed)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(failed)?;
    image.apply_orientation(orientation);
    Ok(image.into_rgb8())
}

/// Width and height in the header of a PNG.
fn png_size(bytes: &[u8]) -> Option<(u32, u32)> {
    let number = |at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    Some((number(16)?, number(20)?))
}

/// Limits of a decoder: four channels of 16 bits, and 64 MB for metadata.
fn limits(pixels: u64) -> Limits {
    let mut limits = Limits::default();
    limits.max_alloc = Some(8 * pixels + (64 << 20));
    limits
}

/// Width of a picture of this size after scaling to `height`.
///
/// # Errors
/// [`Error::input`] if the scaled picture is narrower than `2 · multiple` or wider than [`WIDEST`].
pub fn scaled_width(path: &Path, (width, of): (u32, u32), height: usize, multiple: usize) -> Result<usize> {
    let scaled = (f64::from(width) * height as f64 / f64::from(of)).round() as usize;
    if scaled / multiple < 2 || scaled > WIDEST {
        let least = 2 * multiple;
        let problem =
            format!("is {scaled} pixels wide at a height of {height}, expected {least} (two tokens) to {WIDEST}");
        return Err(Error::input(path.display(), problem));
    }
    Ok(scaled)
}

/// Reads a PNG or JPEG and [scales](scale) it.
///
/// # Errors
/// Those of [`load`] and [`scale`].
pub fn read(path: &Path, height: usize, multiple: usize, kept: Side) -> Result<Picture> {
    scale(path, load(path)?, height, multiple, kept)
}

/// Scales the picture at `path` to `height`, with its proportions kept. The width is then cropped to a multiple of
/// `multiple`; the side `kept` stays.
///
/// # Errors
/// Those of [`scaled_width`].
pub fn scale(path: &Path, image: RgbImage, height: usize, multiple: usize, kept: Side) -> Result<Picture> {
    let original = image.dimensions();
    let scaled = scaled_width(path, original, height, multiple)?;
    let width = scaled / multiple * multiple;
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

/// Makes the picture at `path` the beginning of an image that continues it on `side`: [scaled](scale), with that side kept,
/// and its columns in the order of generation, so mirrored if the image grows to the left.
///
/// # Errors
/// Those of [`scale`].
pub fn beginning(path: &Path, image: RgbImage, height: usize, multiple: usize, side: Side) -> Result<Picture> {
    let mut picture = scale(path, image, height, multiple, side)?;
    if side == Side::Left {
        picture.pixels.invert_axis(Axis(2));
    }
    Ok(picture)
}

/// Whether a file begins like a PNG or JPEG.
///
/// # Errors
/// [`Error::input`] if the file cannot be read.
pub fn is_picture(path: &Path) -> Result<bool> {
    Ok(matches!(open(path)?.format(), Some(ImageFormat::Png | ImageFormat::Jpeg)))
}

fn open(path: &Path) -> Result<ImageReader<BufReader<File>>> {
    let reader = ImageReader::new(BufReader::new(files::open(path)?));
    reader.with_guessed_format().or_input(path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(name: &str, bytes: &[u8]) -> String {
        let error = decode(Path::new(name), bytes).unwrap_err();
        assert!(error.is_input(), "{error}");
        error.to_string()
    }

    fn png(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = Cursor::new(vec![]);
        image::GrayImage::new(width, height).write_to(&mut bytes, ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn the_size_is_looked_at_before_the_pixels() {
        let mut png = png(3, 2);
        assert_eq!(decode(Path::new("a.png"), &png).unwrap().dimensions(), (3, 2));
        png[16..24].copy_from_slice(&[22000u32.to_be_bytes(), 22000u32.to_be_bytes()].concat());
        assert_eq!(
            refused("a.png", &png),
            "a.png: is 22000×22000 pixels, expected at most 100 million pixels: scale it down"
        );
        let mut jpeg = Cursor::new(vec![]);
        RgbImage::new(16, 8).write_to(&mut jpeg, ImageFormat::Jpeg).unwrap();
        let mut jpeg = jpeg.into_inner();
        let frame = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
        jpeg[frame + 5..frame + 9].copy_from_slice(&[13000u16.to_be_bytes(), 13000u16.to_be_bytes()].concat());
        assert!(refused("a.jpg", &jpeg).contains("is 13000×13000 pixels"));
    }

    #[test]
    fn other_formats_are_refused() {
        for bytes in [&b"RIFF\x10\0\0\0WEBPVP8 "[..], b"GIF89a", b"text", b"", b"\x89PNG\r\n\x1a\n"] {
            assert!(refused("a.png", bytes).starts_with("a.png: is "), "{bytes:?}");
        }
    }
}
