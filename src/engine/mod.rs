//! What the generation loop needs from whatever runs the model.

pub mod candle;

use std::collections::HashMap;

use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView3, ArrayView4};

use crate::request::PreparedRequest;
use crate::request::condition::ClassMix;
use crate::request::solver::Tableau;
use crate::request::timing::StageTimes;
use crate::{Config, Error, Result};

/// A model that is ready to run: its weights are loaded. What one image needs beside them is a [`Session`].
pub trait Engine {
    /// The model's configuration.
    fn config(&self) -> &Config;

    /// What runs it, for people.
    fn name(&self) -> &str;

    /// A batch without rows.
    ///
    /// # Errors
    /// When the backend fails.
    fn session(&self) -> Result<Box<dyn Session + '_>>;

    /// Starts a batch of one row a label (`class_num`: unconditional); gives the conditions `[rows, D]` of the first
    /// tokens.
    ///
    /// # Errors
    /// When the backend fails.
    fn start(&self, labels: &[i64]) -> Result<(Box<dyn Session + '_>, Array2<f32>)> {
        let mut session = self.session()?;
        let rows: Vec<Row> = labels.iter().map(|&label| Row::new(ClassMix::of(label))).collect();
        let z = session.arrange(&rows)?;
        Ok((session, z))
    }

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

    /// Decodes tokens `[B, N, E]` as they are generated: latents times the model's `vae_norm`.
    ///
    /// # Errors
    /// Those of [`Engine::decode`].
    fn decode_tokens(&self, tokens: ArrayView3<f32>) -> Result<Array4<f32>> {
        self.decode((&tokens / self.config().generator.vae_norm as f32).view())
    }

    /// Encodes images `[B, 3, height, width]` in -1..1, at least two tokens wide, to latents `[B, N, E]`.
    ///
    /// # Errors
    /// When the backend fails.
    fn encode(&self, images: ArrayView4<f32>) -> Result<Array3<f32>>;

    /// Generates all tokens of a batch, `[B, N, E]`, the prefix included, in one go, where the engine has a loop of its own that
    /// keeps everything on its device; `None` where it has none for this request. `progress` is told the number of tokens known
    /// so far.
    ///
    /// # Errors
    /// When the backend fails, or a token is not finite.
    fn fused_rollout(
        &self,
        _rollout: &PreparedRequest,
        _progress: &mut dyn FnMut(usize),
    ) -> Result<Option<(Array3<f32>, StageTimes)>> {
        Ok(None)
    }
}

/// A row of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// The row of the batch before that it was; `None` for one that begins.
    pub kept: Option<usize>,
    /// What it is conditioned on from now on.
    pub condition: ClassMix,
}

impl Row {
    /// A row that begins.
    pub fn new(condition: ClassMix) -> Self {
        Self { kept: None, condition }
    }
}

/// A batch on its way: the keys and values of its last tokens and of its classes. Rows may begin and end at any time, since
/// each has its own position.
pub trait Session {
    /// Makes the batch consist of these rows; gives the conditions `[new rows, D]` of the first tokens of those that begin.
    /// What depends on a class alone is computed once for all rows of the batch that have it. Where a row fades from one class
    /// to another, all that it knows of them, the keys and values of cross-attention, is mixed by their shares.
    ///
    /// # Errors
    /// When the backend fails.
    fn arrange(&mut self, rows: &[Row]) -> Result<Array2<f32>>;

    /// Passes one token a row, `[rows, E]` at `positions` from 0, through the transformer; gives the conditions
    /// `[rows, D]` of the next tokens.
    ///
    /// # Errors
    /// When the backend fails.
    fn step(&mut self, tokens: ArrayView2<f32>, positions: &[i64]) -> Result<Array2<f32>>;
}

/// What the classes of a batch are known by.
#[derive(Debug)]
pub struct PrefillCache<C>(HashMap<i64, C>);

impl<C> Default for PrefillCache<C> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<C> PrefillCache<C> {
    /// Forgets classes that are not among those of `rows`, and computes those that are new, all at once.
    ///
    /// # Errors
    /// Those of `compute`, which is given labels and gives one value for each.
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

    /// What the classes of a condition are known by, and the share of the second.
    ///
    /// # Errors
    /// [`Error::run`] for a label that was not among the last ones.
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

/// `a`, of which `share` has become `b`.
pub fn lerp(a: f32, b: f32, share: f32) -> f32 {
    a + share * (b - a)
}
