//! INT8 calibration and quantization. Two interpreters wrap another interpreter: one records the activations, the other
//! runs matrix products and convolutions in INT8.
//!
//! [`Observe`] passes the activations to a callback. A [`Collection`] runs the model on pictures and rollouts and
//! counts the activations in histograms. An [`Estimator`] chooses the ranges, which are stored in a [`Table`]. A
//! [`Policy`] holds the rules that choose the products to run in INT8 and their schemes. [`Quantize`] applies a policy
//! around any interpreter: around Candle it gives a [`Preview`], around the lowering it gives an export.
//!
//! ```
//! use eqim_calibration::{Estimator, Histogram};
//!
//! // One value is an outlier.
//! let mut activations: Vec<f32> = (0..10_000).map(|i| (i as f32).sin()).collect();
//! activations.push(40.0);
//! let mut histogram = Histogram::default();
//! histogram.add(&activations)?;
//!
//! // The INT8 scale is the threshold divided by 127.
//! // A small threshold clips the outlier and gives the other values a finer resolution.
//! assert_eq!(Estimator::Max.threshold(&histogram), 40.0);
//! assert!(Estimator::Percentile(99.9).threshold(&histogram) < 2.0);
//! # Ok::<(), eqim::Error>(())
//! ```

mod collect;
mod estimate;
mod histogram;
pub mod int8;
mod observe;
pub mod policy;
mod preview;
mod quantize;
mod ranges;
mod sensitivity;
mod table;

pub use collect::{Collection, survey};
pub use estimate::Estimator;
pub use histogram::Histogram;
pub use observe::{Observe, Seen};
pub use policy::{Policy, Scheme};
pub use preview::{Preview, levels};
pub use quantize::{QuantizationPlan, Quantize, plan};
pub use ranges::Ranges;
pub use sensitivity::{quantized, search};
pub use table::{Damage, Entry, Range, Ranked, Samples, Sensitivity, Table, fingerprint};
