//! Value parsers that several command lines share.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// A number of a range, for clap.
///
/// # Errors
/// A sentence that names the range.
pub fn within<T: FromStr + PartialOrd + Display>(text: &str, range: RangeInclusive<T>) -> Result<T, String> {
    let value = text.parse().ok().filter(|value| range.contains(value));
    value.ok_or_else(|| format!("expected a number from {} to {}", range.start(), range.end()))
}

/// A tolerance, for clap: a finite number of at least 0.
///
/// # Errors
/// A sentence that says what is expected.
pub fn tolerance(text: &str) -> Result<f32, String> {
    let value = text.parse().ok().filter(|value: &f32| value.is_finite() && *value >= 0.0);
    value.ok_or_else(|| "expected a number of at least 0".into())
}
