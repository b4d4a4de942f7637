//! The model, written once over [`crate::ops::Ops`]. Straight-line code; every size comes from the configuration.

pub mod flow;
mod parameters;
mod stage;
pub mod tokenizer;
pub mod transformer;

pub use parameters::{parameters, parameters_of};
pub use stage::{Axis, BATCH, Kind, Port, Stage};
