//! Distances between sets of images, by the features of a network: Fréchet distance (FID), kernel distance (KID),
//! precision, recall, density and coverage, and the inception score.
//!
//! A [`network::Network`] makes [`features::Features`] of [`pictures::Pictures`]; [`metrics::Metrics`] compares them. No
//! native library is needed here: programs bring the networks.
//!
//! ```
//! use eqim_evaluation::frechet::{Moments, distance};
//! use ndarray::array;
//!
//! let a = Moments::of(array![[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]].view())?;
//! let b = Moments::of(array![[3.0, 0.0], [5.0, 0.0], [3.0, 2.0], [5.0, 2.0]].view())?;
//! // Equal covariances; the means are 3 apart.
//! assert!((distance(&a, &b)? - 9.0).abs() < 1e-12);
//! # Ok::<(), eqim::Error>(())
//! ```

pub mod drift;
pub mod features;
pub mod frechet;
pub mod inception;
pub mod kernel;
mod linear;
pub mod metrics;
pub mod neighbours;
pub mod network;
mod numpy;
pub mod pictures;
pub mod random;
pub mod resize;
