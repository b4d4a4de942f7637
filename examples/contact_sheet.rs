//! Puts pictures of one size side by side, in rows.
//!
//! ```console
//! cargo run --release --example contact_sheet -- sheet.png 5 target/example/*.png
//! ```

use std::path::PathBuf;

use eqim::{Error, Result, picture};
use image::RgbImage;
use image::imageops;

// Pixels between the pictures.
const GAP: u32 = 4;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (output, columns) = (arguments.next(), arguments.next().and_then(|columns| columns.parse::<u32>().ok()));
    let (Some(output), Some(columns @ 1..)) = (output.map(PathBuf::from), columns) else {
        return Err(Error::input("arguments", "expected SHEET.png COLUMNS PICTURE…"));
    };
    let pictures = arguments.map(|path| picture::load(path.as_ref())).collect::<Result<Vec<RgbImage>>>()?;
    let Some(first) = pictures.first() else {
        return Err(Error::input("arguments", "expected at least one picture"));
    };
    let (width, height) = first.dimensions();
    if pictures.iter().any(|picture| picture.dimensions() != (width, height)) {
        return Err(Error::input("pictures", format!("have several sizes, expected {width}×{height} of all")));
    }
    let rows = (pictures.len() as u32).div_ceil(columns);
    let white = image::Rgb([255; 3]);
    let mut sheet = RgbImage::from_pixel(columns * (width + GAP) - GAP, rows * (height + GAP) - GAP, white);
    for (place, picture) in (0u32..).zip(&pictures) {
        let (left, top) = (place % columns * (width + GAP), place / columns * (height + GAP));
        imageops::replace(&mut sheet, picture, left.into(), top.into());
    }
    picture::write_rgb(&output, sheet.as_raw(), sheet.dimensions())
}
