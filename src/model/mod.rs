//! The model, written once over [`crate::ops::Ops`]. Straight-line code; every size comes from the configuration.

pub mod flow;
mod stage;
pub mod tokenizer;
pub mod transformer;

pub use stage::{Axis, BATCH, Kind, Port, Stage};

use crate::ops::cost::Cost;
use crate::{Config, Result};

/// Names and shapes of all weights of a model, in the order of first use: what a checkpoint has to contain.
///
/// # Errors
/// When the configuration is not consistent.
pub fn parameters(config: &Config) -> Result<Vec<(String, Vec<usize>)>> {
    parameters_of(config, &Stage::ALL)
}

/// Names and shapes of the weights of some stages, in the order of first use.
///
/// # Errors
/// When the configuration is not consistent.
pub fn parameters_of(config: &Config, stages: &[Stage]) -> Result<Vec<(String, Vec<usize>)>> {
    let mut cost = Cost::default();
    for &stage in stages {
        cost.stage(config, stage, 1, 2, 1)?;
    }
    Ok(cost.into_parameters())
}
