//! The autoregressive loop, which generates one column after another with any [`Engine`].

pub mod batch;
pub mod finish;
pub mod memory;
pub mod plan;
pub mod preview;
pub mod scheduler;
pub mod tiles;
pub mod worker;

use ndarray::{Array3, s};

use crate::Result;
use crate::engine::Engine;
use crate::request::timing::StageTimes;
use crate::request::{Generated, PreparedRequest, Request};
use batch::{Batch, Sequence};

/// Generates a batch of images as tokens. `progress` receives the number of tokens known so far, the prefix included.
///
/// # Errors
/// [`Error::input`](crate::Error::input) for a request that does not fit the model; errors of the engine.
pub fn generate(engine: &dyn Engine, request: &Request, mut progress: impl FnMut(usize)) -> Result<Generated> {
    let prepared = PreparedRequest::new(engine.config(), request)?;
    let (tokens, times) = match engine.fused_rollout(&prepared, &mut progress)? {
        Some(generated) => generated,
        None => token_by_token(engine, &prepared, &mut progress)?,
    };
    Ok(Generated { tokens, noise: prepared.noise, times })
}

/// Generates the tokens of a prepared request with a [`Batch`] on the engine.
///
/// # Errors
/// Errors of the engine; [`Error::run`](crate::Error::run) for a token that is not finite.
pub fn token_by_token<E: Engine + ?Sized>(
    engine: &E,
    prepared: &PreparedRequest,
    progress: &mut dyn FnMut(usize),
) -> Result<(Array3<f32>, StageTimes)> {
    let mut batch = Batch::new(engine, prepared.sampling.clone())?;
    batch.admit(Sequence::of_batch(prepared).into_iter().enumerate().collect())?;
    let mut tokens = Array3::zeros((prepared.batch(), prepared.tokens, engine.config().generator.embed));
    for known in 1..=prepared.tokens {
        for (row, token) in batch.advance()? {
            tokens.slice_mut(s![row, known - 1, ..]).assign(&token?);
        }
        if known > prepared.given() {
            progress(known);
        }
    }
    Ok((tokens, batch.times))
}
