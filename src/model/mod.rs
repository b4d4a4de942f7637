//! The model, written once over [`crate::ops::Ops`]. The code does not branch on tensor values, and every size comes
//! from the configuration.

pub mod flow;
mod parameters;
mod stage;
pub mod tokenizer;
pub mod transformer;

pub use parameters::{
    FULL_PRECISION_MODULES, check_finite, keeps_full_precision, parameters, parameters_of, report_group,
};
pub use stage::{Dimension, Sizes, Stage, Symbol, ValueInfo, ValueKind};
