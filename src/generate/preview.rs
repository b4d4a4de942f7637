//! Decodes the newest tokens of an image before their tile is complete, so that somebody who watches sees them at once.
//! Previews lack the neighbours to the right; the tiles replace them.

use std::collections::VecDeque;

use ndarray::{Array1, ArrayView1, s};

use super::tiles::{Strip, decode};
use crate::Result;
use crate::engine::Engine;

/// Largest number of new tokens in a preview.
const STEP: usize = 8;
/// Number of known tokens that are decoded with a preview, to its left, so that it fits them.
const CONTEXT: usize = 2;

/// Previews of an image whose tokens arrive one after another.
pub struct Preview<'a> {
    engine: &'a dyn Engine,
    /// Number of tokens of the image.
    tokens: usize,
    /// Index of the first token in `kept`.
    first: usize,
    /// The tokens received, from the first one that the next preview needs on.
    kept: VecDeque<Array1<f32>>,
    /// Number of tokens that a preview or a tile has shown.
    shown: usize,
    /// Number of tokens with final columns.
    done: usize,
    /// Index of the next preview.
    index: usize,
}

impl<'a> Preview<'a> {
    /// Previews of an image of `tokens` tokens.
    pub fn new(engine: &'a dyn Engine, tokens: usize) -> Self {
        Self { engine, tokens, first: 0, kept: VecDeque::new(), shown: 0, done: 0, index: 0 }
    }

    /// Takes the next generated token `[E]`.
    pub fn keep(&mut self, token: ArrayView1<f32>) {
        self.kept.push_back(token.to_owned());
    }

    /// Number of known tokens.
    fn known(&self) -> usize {
        self.first + self.kept.len()
    }

    /// Whether there are enough new tokens: 1, then 1, 2, 4, and later 8. The end of an image has no preview, because its
    /// last tile follows at once.
    pub fn is_due(&self) -> bool {
        let known = self.known();
        known < self.tokens && known >= self.shown + self.shown.clamp(1, STEP)
    }

    /// Whether nothing of the image was shown.
    pub fn is_first(&self) -> bool {
        self.shown == 0
    }

    /// Leaves out tokens whose columns are final: the first `done`.
    pub fn skip(&mut self, done: usize) {
        self.done = done;
        self.shown = self.shown.max(done);
        self.forget();
    }

    /// Decodes new tokens. The last one that was shown is drawn again, because its neighbour to the right is known now.
    /// The pixels are not [checked](Strip::checked).
    ///
    /// # Errors
    /// If the engine fails.
    pub fn decode(&mut self) -> Result<Strip> {
        let begin = self.shown.saturating_sub(1).max(self.done);
        let end = self.known().min(self.shown + STEP);
        let from = begin.saturating_sub(CONTEXT).max(self.first);
        // The padding of the decoder mirrors columns, and a single token has none to mirror: it is its own neighbour.
        let tokens = self.kept.range(from - self.first..end - self.first);
        let last = tokens.clone().next_back().filter(|_| tokens.len() == 1);
        let pixels = decode(self.engine, tokens.chain(last))?;
        let width = self.engine.config().tokenizer.token_width();
        let pixels = pixels.slice_move(s![.., .., (begin - from) * width..(end - from) * width]);
        let strip = Strip { index: self.index, x: begin * width, pixels };
        self.index += 1;
        self.shown = end;
        self.forget();
        Ok(strip)
    }

    /// Removes the tokens that no preview needs any more.
    fn forget(&mut self) {
        let needed = self.shown.saturating_sub(1 + CONTEXT).max(self.first).min(self.known());
        self.kept.drain(..needed - self.first);
        self.first = needed;
    }
}
