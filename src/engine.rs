//! What the generation loop needs from whatever runs the model.

use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView3, ArrayView4};

use crate::generate::{self, Rollout, Times};
use crate::solver::Tableau;
use crate::{Config, Result};

/// A model that is ready to run: its weights are loaded. What one image needs beside them is a [`Session`].
pub trait Engine {
    /// The model's configuration.
    fn config(&self) -> &Config;

    /// What runs it, for people.
    fn name(&self) -> &str;

    /// Starts a batch of one row a label (`class_num`: unconditional); gives the conditions `[rows, D]` of the first
    /// tokens.
    ///
    /// # Errors
    /// When the backend fails.
    fn start(&self, labels: &[i64]) -> Result<(Box<dyn Session + '_>, Array2<f32>)>;

    /// Samples a token `[B, E]` for every row of `noise [B, E]`, as the tableau of a solver says.
    ///
    /// `z` holds the conditions of the B rows, `[B, D]`, or with guidance those of the unconditional stream after them,
    /// `[2B, D]`, weighed by `guidance [B]`.
    ///
    /// # Errors
    /// When the backend fails.
    fn sample(
        &self,
        z: ArrayView2<f32>,
        noise: ArrayView2<f32>,
        guidance: &[f32],
        tableau: &Tableau,
    ) -> Result<Array2<f32>>;

    /// Decodes latents `[B, N, E]`, at least two a row, to images `[B, 3, height, width]` in about -1..1.
    ///
    /// # Errors
    /// When the backend fails.
    fn decode(&self, latents: ArrayView3<f32>) -> Result<Array4<f32>>;

    /// Encodes images `[B, 3, height, width]` in -1..1, at least two tokens wide, to latents `[B, N, E]`.
    ///
    /// # Errors
    /// When the backend fails.
    fn encode(&self, images: ArrayView4<f32>) -> Result<Array3<f32>>;

    /// Generates all tokens of a batch, `[B, N, E]`, the prefix included. `progress` is told the number of tokens known
    /// so far. An engine on a device overrides this to keep everything there.
    ///
    /// # Errors
    /// When the backend fails, or a token is not finite.
    fn rollout(&self, rollout: &Rollout, progress: &mut dyn FnMut(usize)) -> Result<(Array3<f32>, Times)> {
        generate::token_by_token(self, rollout, progress)
    }
}

/// A batch on its way: the keys and values of its last tokens and of its classes.
pub trait Session {
    /// Passes one token a row, `[rows, E]` at `positions` from 0, through the transformer; gives the conditions
    /// `[rows, D]` of the next tokens.
    ///
    /// # Errors
    /// When the backend fails.
    fn step(&mut self, tokens: ArrayView2<f32>, positions: &[i64]) -> Result<Array2<f32>>;
}
