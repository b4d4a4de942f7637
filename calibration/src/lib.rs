//! INT8: interpreters around others that watch the model run, and that put its products into 8 bits.
//!
//! [`Observe`] shows every computed value. A [`Collection`] runs the model on pictures and rollouts and counts what it
//! shows; an [`Estimator`] makes a [`Table`] of that. A [`Policy`] says by rules which product runs in INT8 and how, and
//! [`Quantize`] applies it around any interpreter: around Candle as a [`Preview`], around the lowering as an export.
//!
//! ```
//! use eqim_calibration::{Estimator, Histogram};
//!
//! // One value lies far from the others.
//! let mut activations: Vec<f32> = (0..10_000).map(|i| (i as f32).sin()).collect();
//! activations.push(40.0);
//! let mut histogram = Histogram::default();
//! histogram.add(&activations)?;
//!
//! // The scale of INT8 is the threshold divided by 127: a small threshold cuts the outlier off and keeps the others precise.
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

pub use collect::{Collection, hashes, read_picture};
pub use estimate::Estimator;
pub use histogram::Histogram;
pub use observe::{Observe, Seen};
pub use policy::{Policy, Scheme};
pub use preview::{Preview, levels};
pub use quantize::{QuantizationPlan, Quantize, plan};
pub use ranges::Ranges;
pub use sensitivity::{quantized, search};
pub use table::{Damage, Entry, Range, Ranked, Samples, Sensitivity, Table, fingerprint};
