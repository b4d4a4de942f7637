//! Decodes long images in tiles. The decoder normalizes over a whole image and attends to all of it, so its memory
//! grows with the square of the width. Each tile is decoded as a separate image, and neighbouring tiles are blended in
//! their overlap.

use std::collections::VecDeque;
use std::ops::Range;

use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, Axis, concatenate, s};

use crate::engine::Engine;
use crate::{Error, Result, ResultExt};

/// How an image is divided into tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    /// Number of tokens per tile.
    pub tile: usize,
    /// Number of tokens that a tile shares with the previous one.
    pub overlap: usize,
}

impl Default for Tiling {
    fn default() -> Self {
        Self { tile: 64, overlap: 16 }
    }
}

impl Tiling {
    /// One tile for an image of `tokens` tokens: it is decoded as a whole.
    pub fn whole(tokens: usize) -> Self {
        Self { tile: tokens, overlap: tokens / 2 }
    }

    /// Checks that the overlap is at least one token and at most half of a tile.
    ///
    /// # Errors
    /// [`Error::setting`] naming the overlap.
    pub fn check(&self) -> Result<()> {
        if self.overlap == 0 || 2 * self.overlap > self.tile {
            let problem =
                format!("is {}, expected 1 to {}: half of a tile of {}", self.overlap, self.tile / 2, self.tile);
            return Err(Error::setting("overlap", problem));
        }
        Ok(())
    }

    /// Number of tokens from the start of a tile to the start of the next.
    fn step(&self) -> usize {
        self.tile - self.overlap
    }

    /// Number of tiles of an image of `tokens` tokens.
    pub fn count(&self, tokens: usize) -> usize {
        1 + tokens.saturating_sub(self.tile).div_ceil(self.step())
    }

    /// First token of tile `index`. The last tile is as long as the others, so it may share more than `overlap` tokens
    /// with the tile before it.
    pub fn begin(&self, index: usize, tokens: usize) -> usize {
        (index * self.step()).min(tokens.saturating_sub(self.tile))
    }

    /// Tokens whose columns become complete with tile `index`.
    pub fn completes(&self, index: usize, tokens: usize) -> Range<usize> {
        let last = index + 1 == self.count(tokens);
        index * self.step()..if last { tokens } else { (index + 1) * self.step() }
    }

    /// Number of tokens that must be known before tile `index` can be decoded.
    pub fn end(&self, index: usize, tokens: usize) -> usize {
        (index * self.step() + self.tile).min(tokens)
    }
}

/// Finished columns of an image.
#[derive(Clone, Debug)]
pub struct Strip {
    /// Index of the tile that completed the columns.
    pub index: usize,
    /// Number of pixels to the left of the columns.
    pub x: usize,
    /// Pixels `[3, height, width]` with values of about -1..1.
    pub pixels: Array3<f32>,
}

impl Strip {
    /// The strip, which an engine has decoded, if all of its pixels are finite.
    ///
    /// # Errors
    /// [`Error::run`] if one is not.
    pub fn checked(self, engine: &dyn Engine) -> Result<Self> {
        if self.pixels.iter().all(|value| value.is_finite()) {
            return Ok(self);
        }
        Err(Error::run(engine.name(), "a pixel is not finite: the precision does not fit the model"))
    }
}

/// Decodes an image whose tokens arrive one after another.
pub struct TileDecoder<'a> {
    engine: &'a dyn Engine,
    tiling: Tiling,
    /// Number of tokens of the image.
    tokens: usize,
    /// Index of the first token in `kept`.
    first: usize,
    /// The tokens received, from the first one of the next tile on.
    kept: VecDeque<Array1<f32>>,
    /// Index of the next tile.
    index: usize,
    /// Weighted pixels of the last tile in its overlap with the next tile, `[3, height, width]`.
    fading: Option<Array3<f32>>,
}

impl<'a> TileDecoder<'a> {
    /// Creates a decoder for an image of `tokens` tokens.
    pub fn new(engine: &'a dyn Engine, tiling: Tiling, tokens: usize) -> Self {
        Self { engine, tiling, tokens, first: 0, kept: VecDeque::new(), index: 0, fading: None }
    }

    /// Creates a decoder that begins with tile `index`, whose first token must be pushed first. The first strip lacks
    /// the blended part of the previous tile. All later strips are the same as without skipping.
    pub fn from_tile(engine: &'a dyn Engine, tiling: Tiling, tokens: usize, index: usize) -> Self {
        Self { first: tiling.begin(index, tokens), index, ..Self::new(engine, tiling, tokens) }
    }

    /// Takes the next generated token `[E]`. Returns the columns that it completes, if any.
    ///
    /// # Errors
    /// If the engine fails or a pixel is not finite.
    pub fn push(&mut self, token: ArrayView1<f32>) -> Result<Option<Strip>> {
        self.keep(token);
        if self.is_ready() { self.decode()?.checked(self.engine).map(Some) } else { Ok(None) }
    }

    /// Takes the next generated token `[E]` without decoding. Tokens are kept until their tile is decoded.
    pub fn keep(&mut self, token: ArrayView1<f32>) {
        self.kept.push_back(token.to_owned());
    }

    /// Number of tokens whose columns are final.
    pub fn done(&self) -> usize {
        if self.is_done() { self.tokens } else { self.index * self.tiling.step() }
    }

    /// Whether the tokens of the next tile are known.
    pub fn is_ready(&self) -> bool {
        !self.is_done() && self.first + self.kept.len() >= self.tiling.end(self.index, self.tokens)
    }

    /// Whether all tiles are decoded.
    pub fn is_done(&self) -> bool {
        self.index == self.tiling.count(self.tokens)
    }

    /// Decodes the next tile, which must be [ready](Self::is_ready). The pixels are not [checked](Strip::checked).
    ///
    /// # Errors
    /// If the engine fails.
    pub fn decode(&mut self) -> Result<Strip> {
        let (begin, end) = (self.tiling.begin(self.index, self.tokens), self.tiling.end(self.index, self.tokens));
        let pixels = decode(self.engine, self.kept.range(begin - self.first..end - self.first))?;
        let width = self.engine.config().tokenizer.token_width();
        let first = self.index * self.tiling.step();
        let mut pixels = pixels.slice_move(s![.., .., (first - begin) * width..]);
        let ramp = ramp(self.tiling.overlap * width);
        if let Some(fading) = self.fading.take() {
            let mut shared = pixels.slice_mut(s![.., .., ..ramp.len()]);
            shared *= &ramp;
            shared += &fading;
        }
        if end < self.tokens {
            let cut = pixels.dim().2 - ramp.len();
            self.fading = Some(&pixels.slice(s![.., .., cut..]) * &ramp.mapv(|share| 1.0 - share));
            pixels = pixels.slice_move(s![.., .., ..cut]);
        }
        let strip = Strip { index: self.index, x: first * width, pixels };
        self.index += 1;
        let next = self.tiling.begin(self.index, self.tokens);
        self.kept.drain(..(next - self.first).min(self.kept.len()));
        self.first = next;
        Ok(strip)
    }
}

/// Decodes tokens `[E]` as an image `[3, height, width]`.
///
/// # Errors
/// If the engine fails.
pub fn decode<'a>(engine: &dyn Engine, tokens: impl Iterator<Item = &'a Array1<f32>>) -> Result<Array3<f32>> {
    let rows: Vec<_> = tokens.map(|token| token.view().insert_axis(Axis(0))).collect();
    let tokens: Array2<f32> = concatenate(Axis(0), &rows).or_run("tile")?;
    Ok(engine.decode_tokens(tokens.insert_axis(Axis(0)).view())?.index_axis_move(Axis(0), 0))
}

/// Weights of the right one of two tiles in their overlap: half a period of a cosine. The end of a tile, where its
/// neighbouring pixels are missing, has little weight.
pub fn ramp(width: usize) -> Array1<f32> {
    let share = |x| (1.0 - (std::f64::consts::PI * (x as f64 + 0.5) / width as f64).cos()) / 2.0;
    (0..width).map(|x| share(x) as f32).collect()
}

/// Decodes the tokens `[N, E]` of an image. `strip` receives the columns from left to right.
///
/// # Errors
/// If the engine fails or a pixel is not finite; errors of `strip`.
pub fn decode_tiles(
    engine: &dyn Engine,
    tiling: Tiling,
    tokens: ArrayView2<f32>,
    mut strip: impl FnMut(Strip) -> Result<()>,
) -> Result<()> {
    let mut decoder = TileDecoder::new(engine, tiling, tokens.dim().0);
    for token in tokens.rows() {
        if let Some(done) = decoder.push(token)? {
            strip(done)?;
        }
    }
    Ok(())
}
