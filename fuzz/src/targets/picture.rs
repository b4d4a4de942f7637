//! PNG and JPEG files.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use eqim::picture::{self, Side};
use eqim::{Result, ResultExt};
use image::{ExtendedColorType, ImageFormat, RgbImage};

use super::{Place, write};
use crate::target::{Hostile, Target};

/// Decodes a picture and scales it.
pub(super) struct Pictures {
    _place: Place,
    path: PathBuf,
}

impl Pictures {
    pub(super) fn new() -> Result<Self> {
        let place = Place::new()?;
        let path = place.path("picture.png");
        Ok(Self { _place: place, path })
    }
}

fn encoded(width: u32, height: u32, format: ImageFormat) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(vec![]);
    let picture = RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8 * 5, y as u8 * 9, (x * y) as u8]));
    picture.write_to(&mut bytes, format).or_run("a picture")?;
    Ok(bytes.into_inner())
}

/// A grey picture, which compresses well.
fn flat(width: u32, height: u32) -> Result<Vec<u8>> {
    let (mut bytes, pixels) = (Cursor::new(vec![]), vec![0; width as usize * height as usize]);
    image::write_buffer_with_format(&mut bytes, &pixels, width, height, ExtendedColorType::L8, ImageFormat::Png)
        .or_run("a picture")?;
    Ok(bytes.into_inner())
}

/// A JPEG that says another size.
fn resized(size: u16) -> Result<Vec<u8>> {
    let mut bytes = encoded(16, 8, ImageFormat::Jpeg)?;
    if let Some(frame) = bytes.windows(2).position(|pair| pair == [0xff, 0xc0]) {
        bytes[frame + 5..frame + 9].copy_from_slice(&[size.to_be_bytes(), size.to_be_bytes()].concat());
    }
    Ok(bytes)
}

impl Target for Pictures {
    fn name(&self) -> &'static str {
        "pictures"
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        let seeds = [encoded(40, 24, ImageFormat::Png), encoded(40, 24, ImageFormat::Jpeg), flat(64, 16)];
        seeds.into_iter().flatten().collect()
    }

    fn hostile(&self) -> Vec<Hostile> {
        let inputs = [
            ("a PNG of 22000 by 22000 pixels", flat(22_000, 22_000)),
            ("a PNG of 10000 by 10000 pixels", flat(10_000, 10_000)),
            ("a JPEG that says 13000 by 13000 pixels", resized(13_000)),
            ("a JPEG that says 9000 by 9000 pixels", resized(9_000)),
            ("a flat picture", flat(1, 60_000)),
        ];
        inputs.into_iter().filter_map(|(name, bytes)| Some((name, bytes.ok()?))).collect()
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn read(&mut self, input: &[u8]) -> Result<String> {
        write(&self.path, input)?;
        let bytes = picture::contents(&self.path)?;
        let image = picture::decode(&self.path, &bytes)?;
        picture::scale(&self.path, image, 16, 4, Side::Right)?;
        Ok(String::new())
    }
}
