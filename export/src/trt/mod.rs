//! TensorRT engines of a bundle, built ahead of time for the GPUs that will run them.

#[cfg_attr(feature = "tensorrt", path = "enabled.rs")]
#[cfg_attr(not(feature = "tensorrt"), path = "disabled.rs")]
mod builder;
mod set;
mod shapes;
mod support;

pub use builder::{check_targets, version};
pub use set::{Built, build, check_weights, lowered, publish};
pub use shapes::{Limits, Shapes};
pub use support::{Support, check};
