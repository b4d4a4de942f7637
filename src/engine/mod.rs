//! The interface between the generation loop and the engines that run the model.

pub mod candle;
#[cfg(feature = "cuda")]
mod cuda;

use std::collections::HashMap;
use std::time::Duration;

use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView3, ArrayView4};

use crate::model::Stage;
use crate::request::PreparedRequest;
use crate::request::condition::ClassMix;
use crate::request::solver::Tableau;
use crate::request::timing::StageTimes;
use crate::{Config, Error, Result};

/// A model that is ready to run: its weights are loaded. The state of a batch is in a [`Session`].
pub trait Engine {
    /// The model's configuration.
    fn config(&self) -> &Config;

    /// Name of the engine, for display.
    fn name(&self) -> &str;

    /// How long each stage took to open, if the engine opens stages separately. They may have opened side by side.
    fn opening(&self) -> Vec<(Stage, Duration)> {
        vec![]
    }

    /// Creates an empty batch.
    ///
    /// # Errors
    /// If the backend fails.
    fn session(&self) -> Result<Box<dyn Session + '_>>;

    /// Starts a batch with one row per label (`class_num`: unconditional). Returns the conditions `[rows, D]` of the
    /// first tokens.
    ///
    /// # Errors
    /// If the backend fails.
    fn start(&self, labels: &[i64]) -> Result<(Box<dyn Session + '_>, Array2<f32>)> {
        let mut session = self.session()?;
        let rows: Vec<Row> = labels.iter().map(|&label| Row::new(ClassMix::of(label))).collect();
        let z = session.arrange(&rows)?;
        Ok((session, z))
    }

    /// Samples one token `[B, E]` per row of `noise [B, E]` with the solver that `tableau` describes.
    ///
    /// `z` holds the conditions of the B rows, `[B, D]`. With guidance, it is `[2B, D]`: the conditions of the
    /// unconditional stream follow, and `guidance [B]` holds the guidance scales.
    ///
    /// # Errors
    /// If the backend fails.
    fn sample(
        &self,
        z: ArrayView2<f32>,
        noise: ArrayView2<f32>,
        guidance: &[f32],
        tableau: &Tableau,
    ) -> Result<Array2<f32>>;

    /// Decodes latents `[B, N, E]`, N at least 2, to images `[B, 3, height, width]` with values of about -1..1.
    ///
    /// # Errors
    /// If the backend fails.
    fn decode(&self, latents: ArrayView3<f32>) -> Result<Array4<f32>>;

    /// Decodes generated tokens `[B, N, E]`, which are latents times the model's `vae_norm`.
    ///
    /// # Errors
    /// Errors of [`Engine::decode`].
    fn decode_tokens(&self, tokens: ArrayView3<f32>) -> Result<Array4<f32>> {
        self.decode((&tokens / self.config().generator.vae_norm as f32).view())
    }

    /// Encodes images `[B, 3, height, width]` with values in -1..1, at least two tokens wide, to latents `[B, N, E]`.
    ///
    /// # Errors
    /// If the backend fails.
    fn encode(&self, images: ArrayView4<f32>) -> Result<Array3<f32>>;

    /// Encodes images to tokens `[B, N, E]`, which are latents times the model's `vae_norm`.
    ///
    /// # Errors
    /// Errors of [`Engine::encode`].
    fn encode_tokens(&self, images: ArrayView4<f32>) -> Result<Array3<f32>> {
        Ok(self.encode(images)? * self.config().generator.vae_norm as f32)
    }

    /// Generates all tokens of a batch, `[B, N, E]`, the prefix included, in a loop of the engine that keeps all data
    /// on its device. Returns `None` if the engine has no loop for this request. `progress` receives the number of
    /// tokens known so far.
    ///
    /// # Errors
    /// If the backend fails or a token is not finite.
    fn fused_rollout(
        &self,
        _prepared: &PreparedRequest,
        _progress: &mut dyn FnMut(usize),
    ) -> Result<Option<(Array3<f32>, StageTimes)>> {
        Ok(None)
    }
}

/// A row of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// Index of the row in the previous batch; `None` for a new row.
    pub kept: Option<usize>,
    /// Condition of the row from now on.
    pub condition: ClassMix,
}

impl Row {
    /// A new row.
    pub fn new(condition: ClassMix) -> Self {
        Self { kept: None, condition }
    }
}

/// A batch in progress: the keys and values of its last tokens and of its classes. Rows can begin and end at any time,
/// because each row has its own position.
pub trait Session {
    /// Sets the rows of the batch. Returns the conditions `[new rows, D]` of the first tokens of the new rows. The
    /// results that depend only on a class are computed once for all rows with this class. If a row fades from one
    /// class to another, the results of the two classes, such as the keys and values of cross-attention, are mixed by
    /// their shares.
    ///
    /// # Errors
    /// If the backend fails.
    fn arrange(&mut self, rows: &[Row]) -> Result<Array2<f32>>;

    /// Runs one token per row, `[rows, E]` at `positions` counted from 0, through the transformer. Returns the
    /// conditions `[rows, D]` of the next tokens.
    ///
    /// # Errors
    /// If the backend fails.
    fn step(&mut self, tokens: ArrayView2<f32>, positions: &[i64]) -> Result<Array2<f32>>;
}

/// Results of the prefill by class label.
#[derive(Debug)]
pub struct PrefillCache<C>(HashMap<i64, C>);

impl<C> Default for PrefillCache<C> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<C> PrefillCache<C> {
    /// Removes the classes that are not in `rows`, and computes the new ones in one call.
    ///
    /// # Errors
    /// Errors of `compute`, which receives labels and returns one value per label.
    pub fn update(&mut self, rows: &[Row], compute: impl FnOnce(&[i64]) -> Result<Vec<C>>) -> Result<()> {
        let labels: Vec<i64> = rows.iter().flat_map(|row| row.condition.labels()).collect();
        self.0.retain(|label, _| labels.contains(label));
        let mut new: Vec<i64> = labels.iter().copied().filter(|label| !self.0.contains_key(label)).collect();
        new.sort_unstable();
        new.dedup();
        if !new.is_empty() {
            self.0.extend(new.iter().copied().zip(compute(&new)?));
        }
        Ok(())
    }

    /// The values of the classes of a condition, and the share of the second class.
    ///
    /// # Errors
    /// [`Error::run`] for a label that was not in the last [`update`](Self::update).
    pub fn get(&self, condition: ClassMix) -> Result<(&C, Option<(&C, f32)>)> {
        let known = |label| {
            let missing = || Error::run("batch", format!("class {label} was not computed"));
            self.0.get(&label).ok_or_else(missing)
        };
        let one = known(condition.label)?;
        match condition.blend {
            Some((label, share)) => Ok((one, Some((known(label)?, share)))),
            None => Ok((one, None)),
        }
    }
}

/// Interpolates from `a` to `b` by `share`.
pub fn lerp(a: f32, b: f32, share: f32) -> f32 {
    a + share * (b - a)
}
