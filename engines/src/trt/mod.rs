//! TensorRT: engines that were built ahead of time, and the code that runs them.

#[cfg_attr(feature = "tensorrt", path = "enabled.rs")]
#[cfg_attr(not(feature = "tensorrt"), path = "disabled.rs")]
mod backend;
mod device;
#[cfg(feature = "tensorrt")]
#[cfg_attr(feature = "tensorrt-enterprise", path = "enterprise.rs")]
#[cfg_attr(not(feature = "tensorrt-enterprise"), path = "rtx.rs")]
pub mod edition;
mod engine;
#[cfg(feature = "tensorrt")]
pub mod library;
mod sidecar;
mod target;

/// Whether this program was built with TensorRT.
pub const ENABLED: bool = cfg!(feature = "tensorrt");

pub use backend::{inspected, open, ready};
pub use device::{ALIGNMENT, Address, Binding, Device};
pub use engine::TrtEngine;
pub use sidecar::{EngineRecord, EngineSet, FOLDER, Layers, Profile, SIDECAR_FILE, SIDECAR_FORMAT, file_name};
pub use target::Target;
