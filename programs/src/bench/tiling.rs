//! Difference between images decoded in tiles and images decoded as a whole, and between both and photographs.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use eqim::close;
use eqim::engine::Engine;
use eqim::generate::generate;
use eqim::generate::tiles::{Tiling, decode_tiles};
use eqim::picture::quality;
use eqim::request::Request;
use eqim::request::timing::timed;
use eqim::{Result, ResultExt};
use eqim_cli::table;
use ndarray::{Array2, Array3, ArrayView2, ArrayView3, Axis, concatenate, s};
use serde::Serialize;

use super::photos::photos;

/// Tile sizes in tokens to try.
const TILES: [usize; 5] = [16, 32, 64, 128, 256];
/// Divisors of the tile size that give the overlaps to try.
const SHARED: [usize; 3] = [8, 4, 2];
/// Difference between black and white in a channel.
const LEVELS: f32 = 255.0;

/// Result of a tile size and an overlap.
#[derive(Clone, Debug, Serialize)]
pub struct Tiled {
    /// Number of tokens of a tile. If the image is decoded as a whole, the number of all tokens.
    pub tile: usize,
    /// Number of tokens that neighbouring tiles share.
    pub overlap: usize,
    /// Largest difference of a channel from the image decoded as a whole, on a scale of 0 to 255.
    pub largest: f32,
    /// Mean difference of a channel, on a scale of 0 to 255.
    pub mean: f32,
    /// Visibility of seams. Let r be the mean difference of neighbouring columns inside the overlaps, divided by the
    /// mean outside. The value is r of this image, divided by r of the image decoded as a whole.
    pub seams: f32,
    /// PSNR against the photographs in dB, if the image is a row of photographs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psnr: Option<f32>,
    /// Seconds to decode the image.
    pub seconds: f64,
}

/// Results of `--tiling`.
#[derive(Clone, Debug, Serialize)]
pub struct Tilings {
    /// If the image is a row of photographs: their number, and their PSNR in dB if each is decoded alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alone: Option<(usize, f32)>,
    /// One result per tiling. The image decoded as a whole is the first.
    pub tiles: Vec<Tiled>,
}

/// A row of tokens to decode.
struct Row {
    /// Tokens `[N, E]`.
    tokens: Array2<f32>,
    /// Photographs side by side, `[3, height, width]`, if the tokens encode photographs.
    photographs: Option<Array3<f32>>,
    alone: Option<(usize, f32)>,
}

impl Row {
    /// Generates the first image of a request.
    fn generated(engine: &dyn Engine, request: &Request) -> Result<Self> {
        let tokens = generate(engine, request, |_| {})?.tokens.index_axis_move(Axis(0), 0);
        Ok(Self { tokens, photographs: None, alone: None })
    }

    /// Encodes each photograph alone, and puts their tokens side by side.
    fn photographs(engine: &dyn Engine, folder: &Path) -> Result<Self> {
        let (photos, _) = photos(folder, engine.config())?;
        let (mut tokens, mut pixels, mut decoded) = (vec![], vec![], vec![]);
        for photo in photos {
            let latent = engine.encode(photo.pixels.view().insert_axis(Axis(0)))?;
            decoded
                .push(engine.decode(latent.view())?.index_axis_move(Axis(0), 0).mapv(|value| value.clamp(-1.0, 1.0)));
            tokens.push(latent.index_axis_move(Axis(0), 0) * engine.config().generator.vae_norm as f32);
            pixels.push(photo.pixels);
        }
        let [pixels, decoded] = [&pixels, &decoded].map(|images| beside(images));
        let tokens: Vec<_> = tokens.iter().map(|tokens| tokens.view()).collect();
        let count = tokens.len();
        let tokens = concatenate(Axis(0), &tokens).or_run("tokens")?;
        let (pixels, decoded) = (pixels?, decoded?);
        let alone = psnr(&decoded, &pixels).map(|psnr| (count, psnr));
        Ok(Self { tokens, photographs: Some(pixels), alone })
    }
}

/// Puts images `[3, height, width]` side by side.
fn beside(images: &[Array3<f32>]) -> Result<Array3<f32>> {
    let images: Vec<_> = images.iter().map(|image| image.view()).collect();
    concatenate(Axis(2), &images).or_run("images")
}

/// PSNR of an image against photographs in dB; `None` if they are equal.
fn psnr(found: &Array3<f32>, expected: &Array3<f32>) -> Option<f32> {
    quality::psnr(found.view().insert_axis(Axis(0)), expected.view().insert_axis(Axis(0)))
}

/// Tries tilings on the first image of a request, or on the pictures of a folder side by side. `progress` receives a
/// description of the next run.
///
/// # Errors
/// [`eqim::Error::input`] if the pictures cannot be used; [`eqim::Error::run`] if the engine fails.
pub fn try_tiles(
    engine: &dyn Engine,
    request: &Request,
    images: Option<&Path>,
    progress: &mut dyn FnMut(String),
) -> Result<Tilings> {
    progress("making the tokens".into());
    let Row { tokens, photographs, alone } = match images {
        Some(folder) => Row::photographs(engine, folder)?,
        None => Row::generated(engine, request)?,
    };
    let psnr = |image: &Array3<f32>| photographs.as_ref().and_then(|expected| psnr(image, expected));
    progress("decoding the whole image".into());
    let whole = Tiling { tile: tokens.dim().0, overlap: 1 };
    let (exact, seconds) = decode(engine, whole, tokens.view())?;
    let (tile, psnr_exact) = (whole.tile, psnr(&exact));
    let mut all = vec![Tiled { tile, overlap: 0, largest: 0.0, mean: 0.0, seams: 1.0, psnr: psnr_exact, seconds }];
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
                largest: close::largest(&difference),
                mean: difference.mean().unwrap_or(0.0),
                seams: steps(image.view(), &shared) / steps(exact.view(), &shared),
                psnr: psnr(&image),
                seconds,
            });
        }
    }
    Ok(Tilings { alone, tiles: all })
}

/// Decodes tokens to an image `[3, height, width]` in -1..1. Returns the image and the time in seconds.
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

/// For each column of pixels, whether two tiles share it, `[width]`.
fn shared(engine: &dyn Engine, tiling: Tiling, tokens: usize) -> Vec<bool> {
    let width = engine.config().tokenizer.token_width();
    let mut shared = vec![false; tokens * width];
    for index in 1..tiling.count(tokens) {
        let end = tiling.end(index - 1, tokens) * width;
        shared[end - tiling.overlap * width..end].fill(true);
    }
    shared
}

/// Mean difference of neighbouring columns where tiles overlap, divided by the mean elsewhere.
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

impl Tilings {
    /// Writes the results as a table in Markdown.
    pub fn table(&self, text: &mut String) {
        let mut head =
            vec!["tile", "shared", "largest, of 255", "mean, of 255", "steps where tiles meet", "decoder, s"];
        if let Some((count, psnr)) = self.alone {
            let _ = writeln!(text, "{count} pictures side by side; each decoded alone: {psnr:.2} dB\n");
            head.push("PSNR, dB");
        }
        let row = |Tiled { tile, overlap, largest, mean, seams, psnr, seconds }: &Tiled| {
            let (largest, mean) = (format!("{largest:.1}"), format!("{mean:.3}"));
            let mut row = vec![tile.to_string(), overlap.to_string(), largest, mean];
            row.extend([format!("{seams:.4}"), format!("{seconds:.2}")]);
            row.extend(psnr.map(|psnr| format!("{psnr:.2}")));
            row
        };
        let _ = writeln!(text, "{}", table::markdown(&head, self.tiles.iter().map(row)));
    }
}
