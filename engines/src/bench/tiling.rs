//! How far images decoded in tiles lie from images decoded as a whole.

use std::fmt::Write;
use std::time::Duration;

use eqim::Result;
use eqim::engine::Engine;
use eqim::generate::{Request, generate, timed};
use eqim::tiles::{Tiling, decode_tiles};
use ndarray::{Array3, ArrayView2, ArrayView3, Axis, s};
use serde::Serialize;

/// Tokens of a tile that are tried.
const TILES: [usize; 5] = [16, 32, 64, 128, 256];
/// Shares of a tile that two have in common.
const SHARED: [usize; 3] = [8, 4, 2];
/// Steps of a channel from black to white.
const LEVELS: f32 = 255.0;

/// What tiles of a size cost, and how close they come.
#[derive(Clone, Debug, Serialize)]
pub struct Tiled {
    /// Tokens of a tile; all for the whole image.
    pub tile: usize,
    /// Tokens that two share.
    pub overlap: usize,
    /// Largest difference of a channel from exact decoding, of 255.
    pub largest: f32,
    /// Mean difference of a channel, of 255.
    pub mean: f32,
    /// Mean step from column to column where tiles share tokens against that elsewhere, as a part of the same ratio of the
    /// exact image.
    pub seams: f32,
    /// Time to decode the image.
    pub seconds: f64,
}

/// Tries tiles on the first image of a request; `progress` is told what is next.
///
/// # Errors
/// When the engine fails.
pub fn try_tiles(engine: &dyn Engine, request: &Request, progress: &mut dyn FnMut(String)) -> Result<Vec<Tiled>> {
    progress(format!("generating {} tokens", request.tokens));
    let tokens = generate(engine, request, |_| {})?.tokens.index_axis_move(Axis(0), 0);
    progress("decoding the whole image".into());
    let whole = Tiling { tile: tokens.dim().0, overlap: 1 };
    let (exact, seconds) = decode(engine, whole, tokens.view())?;
    let mut all = vec![Tiled { tile: whole.tile, overlap: 0, largest: 0.0, mean: 0.0, seams: 1.0, seconds }];
    for tile in TILES.into_iter().filter(|&tile| tile < tokens.dim().0) {
        for overlap in SHARED.map(|share| tile / share) {
            progress(format!("tiles of {tile}, {overlap} shared"));
            let tiling = Tiling { tile, overlap };
            let (image, seconds) = decode(engine, tiling, tokens.view())?;
            let difference = (&image - &exact).mapv(|value| value.abs() * LEVELS / 2.0);
            let shared = shared(engine, tiling, tokens.dim().0);
            all.push(Tiled {
                tile,
                overlap,
                largest: difference.iter().copied().fold(0.0, f32::max),
                mean: difference.mean().unwrap_or(0.0),
                seams: steps(image.view(), &shared) / steps(exact.view(), &shared),
                seconds,
            });
        }
    }
    Ok(all)
}

/// An image `[3, height, width]` of tokens, in -1..1, and the seconds that it took.
fn decode(engine: &dyn Engine, tiling: Tiling, tokens: ArrayView2<f32>) -> Result<(Array3<f32>, f64)> {
    let (width, height) = engine.config().image_size(tokens.dim().0);
    let mut image = Array3::zeros((3, height, width));
    let mut time = Duration::ZERO;
    timed(&mut time, || {
        decode_tiles(engine, tiling, tokens, |strip| {
            let columns = strip.x..strip.x + strip.pixels.dim().2;
            image.slice_mut(s![.., .., columns]).assign(&strip.pixels.mapv(|value| value.clamp(-1.0, 1.0)));
            Ok(())
        })
    })?;
    Ok((image, time.as_secs_f64()))
}

/// Whether two tiles share a column of pixels, `[width]`.
fn shared(engine: &dyn Engine, tiling: Tiling, tokens: usize) -> Vec<bool> {
    let width = engine.config().tokenizer.token_width();
    let mut shared = vec![false; tokens * width];
    for index in 1..tiling.count(tokens) {
        let end = tiling.end(index - 1, tokens) * width;
        shared[end - tiling.overlap * width..end].fill(true);
    }
    shared
}

/// Mean step from column to column where tiles share them, against that elsewhere.
fn steps(image: ArrayView3<f32>, shared: &[bool]) -> f32 {
    let (mut sums, mut counts) = ([0.0; 2], [0.0; 2]);
    for (x, &shared) in shared.iter().enumerate().skip(1) {
        let step = &image.index_axis(Axis(2), x) - &image.index_axis(Axis(2), x - 1);
        let part = usize::from(shared);
        sums[part] += step.mapv(f32::abs).mean().unwrap_or(0.0);
        counts[part] += 1.0;
    }
    sums[1] / counts[1] / (sums[0] / counts[0])
}

impl Tiled {
    /// A table in Markdown, which people read too.
    pub fn table(all: &[Self], text: &mut String) {
        if all.is_empty() {
            return;
        }
        let _ =
            writeln!(text, "| tile | shared | largest, of 255 | mean, of 255 | steps where tiles meet | decoder, s |");
        let _ = writeln!(text, "|---:|---:|---:|---:|---:|---:|");
        for Self { tile, overlap, largest, mean, seams, seconds } in all {
            let _ = writeln!(text, "| {tile} | {overlap} | {largest:.1} | {mean:.3} | {seams:.4} | {seconds:.2} |");
        }
    }
}
