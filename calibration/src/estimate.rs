//! From a histogram of activations to the range that INT8 covers; what lies beyond is cut.

use std::fmt;
use std::str::FromStr;

use eqim::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::histogram::Histogram;

/// Positive levels of a symmetric 8-bit integer.
pub const LEVELS: usize = 127;

/// How the largest absolute value that is covered is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Estimator {
    /// The largest that occurred.
    Max,
    /// The one that this percentage of the values does not exceed.
    Percentile(f64),
    /// The one after which the distribution differs least from before, by the Kullback-Leibler divergence (Migacz, 8-bit
    /// Inference with TensorRT, 2017).
    Entropy,
    /// The one with the least mean squared error.
    Mse,
}

/// Percentage of a percentile unless told otherwise.
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
    /// Largest absolute value to cover: positive and at most the largest that occurred, or 0 when all values are 0.
    pub fn threshold(self, histogram: &Histogram) -> f32 {
        let (counts, width, largest) = (histogram.counts(), histogram.width(), histogram.largest());
        let bins = match self {
            _ if counts.is_empty() => return largest,
            Self::Max => counts.len(),
            Self::Percentile(percentage) => percentile(counts, percentage),
            Self::Entropy => entropy(counts),
            Self::Mse => mse(counts),
        };
        // The last bin ends beyond the largest value.
        largest.min((bins as f64 * width) as f32)
    }
}

/// Bins that hold the percentage of the values.
fn percentile(counts: &[u64], percentage: f64) -> usize {
    let wanted = counts.iter().sum::<u64>() as f64 * percentage / 100.0;
    let mut so_far = 0;
    let enough = |&count: &u64| {
        so_far += count;
        so_far as f64 >= wanted
    };
    counts.iter().position(enough).map_or(counts.len(), |last| last + 1)
}

/// Candidates of the searches: their number of bins grows by this.
const STRIDE: usize = 4;

fn candidates(counts: &[u64]) -> impl Iterator<Item = usize> {
    let all = counts.len();
    (LEVELS + 1..all).step_by(STRIDE).chain([all])
}

fn least(counts: &[u64], cost: impl Fn(usize) -> f64) -> usize {
    let costs = candidates(counts).map(|bins| (bins, cost(bins)));
    costs.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(counts.len(), |(bins, _)| bins)
}

/// Bins with the least squared error of values that are rounded to a level, or cut to the last.
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

/// Bins whose distribution, with what lies beyond counted into the last, diverges least from itself at 128 levels.
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
                // An empty bin that everything beyond was counted into: as unlikely as a single value.
                let q = if counts[bin] > 0 { shared / kept } else { 1.0 / total };
                if p > 0.0 {
                    divergence += p * (p / q).ln();
                }
            }
        }
        divergence
    })
}
