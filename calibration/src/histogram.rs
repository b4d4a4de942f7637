//! Histograms of absolute activation values.

use eqim::{Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Number of bins of a histogram.
pub const BINS: usize = 2048;

/// Counts of absolute values in bins of equal width. The bins cover zero to a power of two that is at least the largest
/// value.
///
/// Because the range is a power of two, a larger value merges whole bins. The counts therefore do not depend on the
/// order of the values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Stored")]
pub struct Histogram {
    low: f32,
    high: f32,
    /// Upper end of the last bin; 0 until a value other than zero is added.
    end: f32,
    counts: Vec<u64>,
}

/// A histogram in a file, which has not been checked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    low: f32,
    high: f32,
    end: f32,
    counts: Vec<u64>,
}

/// Largest number of values of a histogram. It leaves room for those that are added later.
const MOST_VALUES: u64 = 1 << 62;

impl TryFrom<Stored> for Histogram {
    type Error = String;

    fn try_from(stored: Stored) -> Result<Self, String> {
        let Stored { low, high, end, counts } = stored;
        let histogram = Self { low, high, end, counts };
        let largest = histogram.largest();
        let is_power = end == f32::MAX || end.to_bits().trailing_zeros() >= f32::MANTISSA_DIGITS - 1;
        let fits = if largest > 0.0 { end.is_finite() && end >= largest && is_power } else { end == 0.0 };
        if !(low.is_finite() && high.is_finite() && low <= 0.0 && high >= 0.0 && fits) {
            return Err(format!("a histogram of values from {low} to {high} has bins up to {end}"));
        }
        if ![0, BINS].contains(&histogram.counts.len()) {
            return Err(format!("a histogram has {} bins, expected {BINS}", histogram.counts.len()));
        }
        let sum = histogram.counts.iter().try_fold(0u64, |sum, &count| sum.checked_add(count));
        if sum.is_none_or(|sum| sum > MOST_VALUES || (sum == 0 && largest > 0.0)) {
            return Err(format!("a histogram of values from {low} to {high} has counts that do not add up"));
        }
        Ok(histogram)
    }
}

/// Minimum and maximum of the values and 0; NaN if a value is not finite.
fn extremes(values: &[f32]) -> (f32, f32) {
    let wider = |(low, high): (f32, f32), &value: &f32| {
        // `f32::min` and `f32::max` ignore NaN, so a value that is not finite sets both extremes to NaN instead.
        if value.is_finite() { (low.min(value), high.max(value)) } else { (f32::NAN, f32::NAN) }
    };
    values.iter().fold((0.0, 0.0), |so_far, value| if so_far.0.is_nan() { so_far } else { wider(so_far, value) })
}

impl Histogram {
    /// Adds values to the counts.
    ///
    /// # Errors
    /// [`Error::run`] if a value is not finite. The histogram is then unchanged.
    pub fn add(&mut self, values: &[f32]) -> Result<()> {
        let parts: Vec<(f32, f32)> = values.par_chunks(1 << 16).map(extremes).collect();
        if parts.iter().any(|(low, _)| low.is_nan()) {
            return Err(Error::run("calibration", "a value is not finite"));
        }
        for (low, high) in parts {
            (self.low, self.high) = (self.low.min(low), self.high.max(high));
        }
        self.widen();
        // If all values so far are zero, they belong in the first bin.
        let per_bin = if self.end > 0.0 { BINS as f64 / f64::from(self.end) } else { 0.0 };
        let count = |mut counts: Vec<u64>, chunk: &[f32]| {
            for value in chunk {
                counts[((f64::from(value.abs()) * per_bin) as usize).min(BINS - 1)] += 1;
            }
            counts
        };
        let sum = |mut a: Vec<u64>, b: Vec<u64>| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            a
        };
        let counts = values.par_chunks(1 << 16).fold(|| vec![0; BINS], count).reduce(|| vec![0; BINS], sum);
        self.counts.resize(BINS, 0);
        self.counts.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        Ok(())
    }

    /// Extends the bins to the largest value by merging pairs of bins.
    fn widen(&mut self) {
        let largest = self.largest();
        if largest == 0.0 {
            return;
        }
        if self.end == 0.0 {
            // At least the smallest normal number, which can be doubled without loss.
            self.end = f32::MIN_POSITIVE.max(f64::from(largest).log2().ceil().exp2() as f32);
        }
        while self.end < largest {
            // 2^128 is beyond f32, so the end is `f32::MAX` instead. The last bin includes it.
            self.end = if self.end >= f32::MAX / 2.0 { f32::MAX } else { self.end * 2.0 };
            if !self.counts.is_empty() {
                self.counts = self.counts.chunks(2).map(|pair| pair.iter().sum()).collect();
                self.counts.resize(BINS, 0);
            }
        }
    }

    /// Smallest value, at most 0.
    pub fn low(&self) -> f32 {
        self.low
    }

    /// Largest value, at least 0.
    pub fn high(&self) -> f32 {
        self.high
    }

    /// Largest absolute value.
    pub fn largest(&self) -> f32 {
        self.high.max(-self.low)
    }

    /// Number of counted values.
    pub fn samples(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Counts of the bins up to the last one that is not empty; no bins if all values are zero.
    pub fn counts(&self) -> &[u64] {
        let used = self.counts.iter().rposition(|&count| count > 0).map_or(0, |last| last + 1);
        if self.end > 0.0 { &self.counts[..used] } else { &[] }
    }

    /// Width of a bin.
    pub fn width(&self) -> f64 {
        f64::from(self.end) / BINS as f64
    }
}
