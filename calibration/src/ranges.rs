//! The largest absolute activation of every scope, to detect overflow in FP16.

use std::collections::BTreeMap;

use candle_core::Tensor;
use eqim::ops::eager::Eager;
use eqim::weights::Weights;
use eqim::{Error, Result};

use crate::observe::{Observe, Seen};

/// Largest absolute activation of every scope.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ranges {
    scopes: BTreeMap<String, f32>,
}

impl Ranges {
    /// Runs `work` on Candle and widens the ranges to include its activations.
    ///
    /// # Errors
    /// Errors of `work`; [`Error::run`] if an activation is not finite.
    pub fn observe<R>(
        &mut self,
        weights: &Weights,
        work: impl FnOnce(&mut Observe<Eager, &mut dyn FnMut(&str, Seen, &Tensor) -> Result<()>>) -> Result<R>,
    ) -> Result<R> {
        let mut record = |scope: &str, _: Seen, x: &Tensor| self.record(scope, x);
        work(&mut Observe::new(Eager::new(weights), &mut record))
    }

    fn record(&mut self, scope: &str, x: &Tensor) -> Result<()> {
        if x.elem_count() == 0 {
            return Ok(());
        }
        let largest = x.abs()?.max_all()?.to_scalar::<f32>()?;
        // A maximum can ignore a NaN, but a sum cannot.
        if !largest.is_finite() || x.sum_all()?.to_scalar::<f32>()?.is_nan() {
            return Err(Error::run("activation", "a value is not finite"));
        }
        let range = self.scopes.entry(scope.to_string()).or_default();
        *range = range.max(largest);
        Ok(())
    }

    /// The scope with the largest activation, and that activation; `None` if nothing was recorded.
    pub fn largest(&self) -> Option<(&str, f32)> {
        let widest = self.scopes.iter().max_by(|a, b| a.1.total_cmp(b.1));
        widest.map(|(scope, range)| (scope.as_str(), *range))
    }

    /// Ranges by scope.
    pub fn scopes(&self) -> &BTreeMap<String, f32> {
        &self.scopes
    }
}
