//! The model, written once over [`crate::ops::Ops`]. Straight-line code; every size comes from the configuration.

pub mod flow;
pub mod tokenizer;
pub mod transformer;

use crate::ops::cost::Cost;
use crate::{Config, Result};

/// A part of the model that runs by itself: one graph of a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// What depends on the class alone: [`transformer::prefill`].
    Prefill,
    /// One token through the transformer: [`transformer::step`].
    Step,
    /// The flow head's whole ODE for one token: [`flow::sample`].
    Flow,
    /// Tokens to an image: [`tokenizer::decode`].
    Decode,
    /// An image to tokens: [`tokenizer::encode`].
    Encode,
}

impl Stage {
    /// All stages, in the order of a run.
    pub const ALL: [Self; 5] = [Self::Prefill, Self::Step, Self::Flow, Self::Decode, Self::Encode];

    /// Name of the stage's graph.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Step => "transformer_step",
            Self::Flow => "flow_sampler",
            Self::Decode => "decoder",
            Self::Encode => "encoder",
        }
    }
}

/// Names and shapes of all weights of a model, in the order of first use: what a checkpoint has to contain.
///
/// # Errors
/// When the configuration is not consistent.
pub fn parameters(config: &Config) -> Result<Vec<(String, Vec<usize>)>> {
    let mut cost = Cost::default();
    for stage in Stage::ALL {
        cost.stage(config, stage, 1, 2, 1)?;
    }
    Ok(cost.into_parameters())
}
