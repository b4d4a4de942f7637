//! Prepares batches of photographs as a training does, without a model, and prints the images per second:
//! `cargo run --release --example batches -- FOLDER BATCHES`

use std::env;
use std::path::Path;
use std::time::Instant;

use eqim::{Error, Result, ResultExt};
use eqim_training::data::{Ahead, Batches, Crops};
use eqim_training::photos::Photos;

/// Crops per batch.
const SIZE: usize = 64;
/// Height and width of a crop in pixels.
const PIXELS: usize = 256;

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [folder, count] = arguments.as_slice() else {
        return Err(Error::input("arguments", "expected FOLDER BATCHES"));
    };
    let count: usize = count.parse().or_input("BATCHES")?;
    let photos = Photos::open(Path::new(folder), PIXELS, PIXELS)?;
    let crops = Crops { height: PIXELS, width: PIXELS, largest_scale: 1.25, flip: true };
    let start = Instant::now();
    let mut ahead = Ahead::start(photos, crops, Batches { size: SIZE, seed: 1, rows: 0..SIZE }, 0..count)?;
    for _ in 0..count {
        ahead.next_batch()?;
    }
    println!("{:.0} images per second", (SIZE * count) as f64 / start.elapsed().as_secs_f64());
    Ok(())
}
