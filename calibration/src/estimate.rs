//! Chooses the range that INT8 covers from a histogram of activations. Values outside this range are clipped.

use std::fmt;
use std::str::FromStr;

use eqim::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::histogram::Histogram;

/// Number of positive levels of a symmetric 8-bit quantization.
pub const LEVELS: usize = 127;

/// Method that chooses the threshold: the largest absolute value that INT8 covers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Estimator {
    /// The largest value that occurred.
    Max,
    /// The threshold that this percentage of the values does not exceed.
    Percentile(f64),
    /// The threshold with the least Kullback-Leibler divergence between the distributions before and after quantization
    /// (Migacz, 8-bit Inference with TensorRT, 2017).
    Entropy,
    /// The threshold with the least mean squared error.
    Mse,
}

/// Default percentage of `percentile`.
const PERCENTILE: f64 = 99.99;

impl fmt::Display for Estimator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Max => f.write_str("max"),
            Self::Percentile(percentage) => write!(f, "percentile:{percentage}"),
            Self::Entropy => f.write_str("entropy"),
            Self::Mse => f.write_str("mse"),
        }
    }
}

impl From<Estimator> for String {
    fn from(estimator: Estimator) -> Self {
        estimator.to_string()
    }
}

impl TryFrom<String> for Estimator {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl FromStr for Estimator {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let expected = || {
            Error::setting("estimator", format!("is {text}, expected max, percentile, percentile:99.9, entropy or mse"))
        };
        match text.split_once(':') {
            None => match text {
                "max" => Ok(Self::Max),
                "percentile" => Ok(Self::Percentile(PERCENTILE)),
                "entropy" => Ok(Self::Entropy),
                "mse" => Ok(Self::Mse),
                _ => Err(expected()),
            },
            Some(("percentile", percentage)) => match percentage.parse::<f64>() {
                Ok(value) if value > 50.0 && value <= 100.0 => Ok(Self::Percentile(value)),
                _ => {
                    let problem = format!("is percentile:{percentage}, expected a percentage above 50 and at most 100");
                    Err(Error::setting("estimator", problem))
                }
            },
            _ => Err(expected()),
        }
    }
}

impl Estimator {
    /// The largest absolute value to cover. It is positive and at most the largest value that occurred, or 0 if all
    /// values are 0.
    pub fn threshold(self, histogram: &Histogram) -> f32 {
        let (counts, width, largest) = (histogram.counts(), histogram.width(), histogram.largest());
        let bins = match self {
            _ if counts.is_empty() => return largest,
            Self::Max => counts.len(),
            Self::Percentile(percentage) => percentile(counts, percentage),
            Self::Entropy => entropy(counts),
            Self::Mse => mse(counts),
        };
        // The last bin can end beyond the largest value.
        largest.min((bins as f64 * width) as f32)
    }
}

/// Number of bins, counted from zero, that hold this percentage of the values.
fn percentile(counts: &[u64], percentage: f64) -> usize {
    let wanted = counts.iter().sum::<u64>() as f64 * percentage / 100.0;
    let mut so_far = 0;
    let enough = |&count: &u64| {
        so_far += count;
        so_far as f64 >= wanted
    };
    counts.iter().position(enough).map_or(counts.len(), |last| last + 1)
}

/// Step between the numbers of bins that a search tries.
const STRIDE: usize = 4;

fn candidates(counts: &[u64]) -> impl Iterator<Item = usize> {
    let all = counts.len();
    (LEVELS + 1..all).step_by(STRIDE).chain([all])
}

fn least(counts: &[u64], cost: impl Fn(usize) -> f64) -> usize {
    let costs = candidates(counts).map(|bins| (bins, cost(bins)));
    costs.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(counts.len(), |(bins, _)| bins)
}

/// Number of bins with the least squared error if values are rounded to the nearest level, and larger values are
/// clipped to the last level.
fn mse(counts: &[u64]) -> usize {
    least(counts, |bins| {
        let step = bins as f64 / LEVELS as f64;
        let squared = |(bin, &count): (usize, &u64)| {
            let value = bin as f64 + 0.5;
            let level = (value / step).round().min(LEVELS as f64);
            count as f64 * (value - level * step).powi(2)
        };
        counts.iter().enumerate().map(squared).sum()
    })
}

/// Number of bins with the least divergence between two distributions: the values in these bins, with all larger values
/// counted in the last bin, and the values in these bins quantized to 128 levels.
fn entropy(counts: &[u64]) -> usize {
    least(counts, |bins| {
        let beyond: u64 = counts[bins..].iter().sum();
        let reference = |bin: usize| counts[bin] + if bin + 1 == bins { beyond } else { 0 };
        let (total, kept) = (counts.iter().sum::<u64>() as f64, (counts[..bins].iter().sum::<u64>() as f64).max(1.0));
        let mut divergence = 0.0;
        for level in 0..=LEVELS {
            let members = level * bins / (LEVELS + 1)..(level + 1) * bins / (LEVELS + 1);
            let occupied = members.clone().filter(|&bin| counts[bin] > 0).count();
            let shared = counts[members.clone()].iter().sum::<u64>() as f64 / occupied.max(1) as f64;
            for bin in members {
                let p = reference(bin) as f64 / total;
                // Only the last bin, in which the larger values were counted, can have p > 0 here. It gets the
                // probability of one value.
                let q = if counts[bin] > 0 { shared / kept } else { 1.0 / total };
                if p > 0.0 {
                    divergence += p * (p / q).ln();
                }
            }
        }
        divergence
    })
}
