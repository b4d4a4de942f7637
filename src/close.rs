//! Compares computed values with expected values. A value that is not finite is never close to another value.

use std::fmt;

use candle_core::{DType, Tensor};

use crate::Result;

/// Largest allowed difference between values. Each named level has a reason.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Name of the tolerance.
    pub name: &'static str,
    /// Largest allowed difference.
    pub limit: f32,
    /// How the difference is measured.
    pub measure: Measure,
}

/// How a difference is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// `|found - expected|`.
    Absolute,
    /// `|found - expected| / max(1, |expected|)`.
    Scaled,
    /// `‖found - expected‖ / ‖expected‖` over all values.
    Norm,
}

impl Tolerance {
    /// For the same products of the same numbers: only the order of summation may differ, for example with the batch
    /// size.
    pub const SUMS: Self = Self::absolute("sums", 1e-6);
    /// For noise of a seed: PyTorch's vectorized logarithm and cosine differ from libm's in the last place.
    pub const NOISE: Self = Self::absolute("noise", 1e-6);
    /// For one activation: both sides round values near 1 by about 1e-7, a few hundred times.
    pub const ACTIVATION: Self = Self::absolute("activation", 1e-5);
    /// For a complete sampling run: differences pass through up to 60 tokens of 10 steps with guidance.
    pub const SAMPLING: Self = Self::absolute("sampling", 1e-4);
    /// For graphs and rollouts in FP32: both sides round values near 1 by about 1e-7, a few hundred times in a row.
    pub const FP32: Self = Self::scaled("fp32", 1e-4);
    /// For graphs and rollouts in FP16 and BF16: FP16 rounds by 5e-4. With random weights of four model sizes, the
    /// difference was at most 4e-3.
    pub const FP16: Self = Self::scaled("fp16", 2e-2);
    /// For tokens in a lower precision or of another solver: below this limit, the image shows the same content.
    pub const ALIKE: Self = Self { name: "alike", limit: 0.1, measure: Measure::Norm };
    /// For bytes of an image: rounding may change a value by one level.
    pub const LEVEL: Self = Self::absolute("level", 1.0);

    /// A limit on the absolute difference.
    pub const fn absolute(name: &'static str, limit: f32) -> Self {
        Self { name, limit, measure: Measure::Absolute }
    }

    /// A limit on the scaled difference.
    pub const fn scaled(name: &'static str, limit: f32) -> Self {
        Self { name, limit, measure: Measure::Scaled }
    }

    /// The same tolerance with another limit.
    pub const fn with_limit(self, limit: f32) -> Self {
        Self { limit, ..self }
    }
}

impl fmt::Display for Tolerance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:e})", self.name, self.limit)
    }
}

/// The difference between `found` and `expected`. It is infinite if a value is not finite or if the numbers of values
/// differ.
pub fn difference<'a>(
    found: impl IntoIterator<Item = &'a f32>,
    expected: impl IntoIterator<Item = &'a f32>,
    measure: Measure,
) -> f32 {
    let (mut found, mut expected) = (found.into_iter(), expected.into_iter());
    let (mut largest, mut squares, mut norm) = (0.0f32, 0.0f64, 0.0f64);
    loop {
        let (found, expected) = match (found.next(), expected.next()) {
            (None, None) => break,
            (Some(&found), Some(&expected)) if found.is_finite() && expected.is_finite() => (found, expected),
            _ => return f32::INFINITY,
        };
        let apart = (found - expected).abs();
        match measure {
            Measure::Absolute => largest = largest.max(apart),
            Measure::Scaled => largest = largest.max(apart / expected.abs().max(1.0)),
            Measure::Norm => {
                squares += f64::from(apart).powi(2);
                norm += f64::from(expected).powi(2);
            }
        }
    }
    match measure {
        Measure::Absolute | Measure::Scaled => largest,
        Measure::Norm => (squares.sqrt() / norm.sqrt().max(f64::MIN_POSITIVE)) as f32,
    }
}

/// Largest `|found - expected|`. Infinite under the conditions of [`difference`].
pub fn largest_difference<'a>(
    found: impl IntoIterator<Item = &'a f32>,
    expected: impl IntoIterator<Item = &'a f32>,
) -> f32 {
    difference(found, expected, Measure::Absolute)
}

/// `‖found - expected‖ / ‖expected‖`. Infinite under the conditions of [`difference`].
pub fn relative_error<'a>(
    found: impl IntoIterator<Item = &'a f32>,
    expected: impl IntoIterator<Item = &'a f32>,
) -> f32 {
    difference(found, expected, Measure::Norm)
}

/// Checks that `found` is within the tolerance of `expected`. Returns the difference.
///
/// # Errors
/// [`NotClose`] with the difference and the tolerance.
pub fn close<'a>(
    found: impl IntoIterator<Item = &'a f32>,
    expected: impl IntoIterator<Item = &'a f32>,
    tolerance: Tolerance,
) -> Result<f32, NotClose> {
    let difference = difference(found, expected, tolerance.measure);
    if difference <= tolerance.limit { Ok(difference) } else { Err(NotClose { difference, tolerance }) }
}

/// The values of a tensor as `f32` in row-major order, for a comparison.
///
/// # Errors
/// If Candle fails.
pub fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
}

/// Error for values that differ by more than the tolerance.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("the difference is {difference:e}, the tolerance is {tolerance}")]
pub struct NotClose {
    /// Difference of the values.
    pub difference: f32,
    /// Tolerance that the difference exceeds.
    pub tolerance: Tolerance,
}

/// Largest absolute value. Infinite if a value is not finite.
pub fn largest<'a>(values: impl IntoIterator<Item = &'a f32>) -> f32 {
    let wider = |most: f32, value: &f32| if value.is_finite() { most.max(value.abs()) } else { f32::INFINITY };
    values.into_iter().fold(0.0, wider)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEASURES: [Measure; 3] = [Measure::Absolute, Measure::Scaled, Measure::Norm];

    #[test]
    fn values_that_are_not_finite_are_never_close() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for measure in MEASURES {
                let tolerance = Tolerance { name: "any", limit: f32::MAX, measure };
                for place in 0..3 {
                    let mut values = [1.0, 2.0, 3.0];
                    values[place] = bad;
                    assert!(close(&values, &[1.0, 2.0, 3.0], tolerance).is_err(), "{bad} found, {measure:?}");
                    assert!(close(&[1.0, 2.0, 3.0], &values, tolerance).is_err(), "{bad} expected, {measure:?}");
                    assert!(close(&values, &values, tolerance).is_err(), "{bad} in both, {measure:?}");
                    assert_eq!(largest(&values), f32::INFINITY);
                }
            }
        }
    }

    #[test]
    fn lengths_have_to_be_equal() {
        for measure in MEASURES {
            assert_eq!(difference(&[1.0], &[1.0, 1.0], measure), f32::INFINITY);
            assert_eq!(difference(&[1.0, 1.0], &[1.0], measure), f32::INFINITY);
            assert_eq!(difference(&[], &[], measure), 0.0);
        }
    }

    #[test]
    fn differences_are_measured() {
        let (found, expected) = ([1.0, 4.5], [1.5, 4.0]);
        assert_eq!(difference(&found, &expected, Measure::Absolute), 0.5);
        assert_eq!(difference(&found, &[0.5, 4.0], Measure::Scaled), 0.5);
        assert_eq!(difference(&[1.0, 5.0], &[1.0, 4.0], Measure::Scaled), 0.25);
        assert_eq!(difference(&[3.0, 0.0], &[0.0, 4.0], Measure::Norm), 1.25);
        assert_eq!(close(&found, &expected, Tolerance::absolute("half", 0.5)), Ok(0.5));
        let error = close(&found, &expected, Tolerance::ACTIVATION).unwrap_err();
        assert_eq!(error.to_string(), "the difference is 5e-1, the tolerance is activation (1e-5)");
    }
}
