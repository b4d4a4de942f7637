//! Value parsers for the flags of several programs.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// Parses a number in a range, for clap.
///
/// # Errors
/// A message that names the range.
pub fn within<T: FromStr + PartialOrd + Display>(text: &str, range: RangeInclusive<T>) -> Result<T, String> {
    let value = text.parse().ok().filter(|value| range.contains(value));
    value.ok_or_else(|| format!("expected a number from {} to {}", range.start(), range.end()))
}

/// Parses a tolerance, for clap: a finite number of at least 0.
///
/// # Errors
/// A message that says which values are valid.
pub fn tolerance(text: &str) -> Result<f32, String> {
    let value = text.parse().ok().filter(|value: &f32| value.is_finite() && *value >= 0.0);
    value.ok_or_else(|| "expected a number of at least 0".into())
}
