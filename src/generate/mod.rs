//! The autoregressive loop: one column after another, over any [`Engine`].

pub mod batch;
pub mod memory;
pub mod tiles;

use ndarray::{Array3, s};

use crate::Result;
use crate::engine::Engine;
use crate::request::timing::Times;
use crate::request::{Generated, Request, Rollout};
use batch::{Batch, Image};

/// Generates a batch of token rows. `progress` is told the number of tokens known so far, prefix included.
///
/// # Errors
/// [`crate::Error::Input`] for a request that does not fit the model; whatever the engine fails with.
pub fn generate(engine: &dyn Engine, request: &Request, mut progress: impl FnMut(usize)) -> Result<Generated> {
    let rollout = Rollout::new(engine.config(), request)?;
    let (tokens, times) = match engine.fused_rollout(&rollout, &mut progress)? {
        Some(generated) => generated,
        None => token_by_token(engine, &rollout, &mut progress)?,
    };
    Ok(Generated { tokens, noise: rollout.noise, times })
}

/// A rollout whose images are a [`Batch`] on the engine.
///
/// # Errors
/// Whatever the engine fails with; [`crate::Error::Run`] for a token that is not finite.
pub fn token_by_token<E: Engine + ?Sized>(
    engine: &E,
    rollout: &Rollout,
    progress: &mut dyn FnMut(usize),
) -> Result<(Array3<f32>, Times)> {
    let mut batch = Batch::new(engine, rollout.sampling.clone())?;
    batch.admit(Image::all(rollout).into_iter().enumerate().collect())?;
    let mut tokens = Array3::zeros((rollout.batch(), rollout.tokens, engine.config().generator.embed));
    for known in 1..=rollout.tokens {
        for (row, token) in batch.advance()? {
            tokens.slice_mut(s![row, known - 1, ..]).assign(&token?);
        }
        if known > rollout.given() {
            progress(known);
        }
    }
    Ok((tokens, batch.times))
}
