//! Statistics of measured times, and warnings if the times are not reliable.

use std::time::Duration;

use eqim::request::timing::{self, percentile};
use serde::Serialize;

/// Limit of the modified z-score (Iglewicz and Hoaglin, 1993) above which a time is an outlier, in standard deviations. The
/// limit is high, because it is meant to detect background work, not the ordinary spread.
const OUTLIER: f64 = 10.0;

/// Statistics of times in seconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Number of times.
    pub count: usize,
    /// Shortest time.
    pub min: f64,
    /// Longest time.
    pub max: f64,
    /// Mean time.
    pub mean: f64,
    /// Median time.
    pub median: f64,
    /// Pairs of a percentage and the percentile for it.
    pub percentiles: Vec<(f64, f64)>,
    /// Number of outliers.
    pub outliers: usize,
    /// Standard deviation divided by the mean.
    pub spread: f64,
    /// Whether the first time is an outlier.
    pub slow_start: bool,
}

impl Summary {
    /// Summarizes times; `None` if there are none.
    pub fn new(times: &[Duration], percentiles: &[f64]) -> Option<Self> {
        let seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
        let mut sorted = seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let count = sorted.len();
        let mean = sorted.iter().sum::<f64>() / count as f64;
        let variance = sorted.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / count as f64;
        let median = percentile(&sorted, 50.0);
        let mut distances: Vec<f64> = sorted.iter().map(|time| (time - median).abs()).collect();
        let usual = timing::median(&mut distances);
        let is_outlier = |time: f64| usual > 0.0 && 0.6745 * (time - median).abs() / usual > OUTLIER;
        Some(Self {
            count,
            min,
            max,
            mean,
            median,
            percentiles: percentiles.iter().map(|&percent| (percent, percentile(&sorted, percent))).collect(),
            outliers: sorted.iter().filter(|&&time| is_outlier(time)).count(),
            spread: variance.sqrt() / mean,
            slow_start: is_outlier(seconds[0]),
        })
    }

    /// The statistics as one line, in the format of trtexec.
    pub fn line(&self) -> String {
        let mut line = String::new();
        for (name, time) in [("min", self.min), ("max", self.max), ("mean", self.mean), ("median", self.median)] {
            line += &format!("{name} = {} ms, ", milliseconds(time));
        }
        let percentiles = self.percentiles.iter();
        let percentiles: Vec<_> =
            percentiles.map(|(p, time)| format!("percentile({p}%) = {} ms", milliseconds(*time))).collect();
        line + &percentiles.join(", ")
    }

    /// Warnings about the times of `what`, with advice.
    pub fn warnings(&self, what: &str) -> Vec<String> {
        let mut warnings = vec![];
        if self.slow_start {
            warnings.push(format!("the first time of {what} is far above the others: give a longer --warmUp"));
        } else if self.outliers > 0 {
            let (outliers, count) = (self.outliers, self.count);
            let text = format!("{outliers} of {count} times of {what} lie far from the others");
            warnings.push(text + ": stop other programs, or give a longer --duration");
        }
        if self.spread > 0.1 && self.count > 1 {
            let percent = 100.0 * self.spread;
            let text = format!("times of {what} spread by {percent:.0} % of their mean");
            warnings.push(text + ": stop other programs, and compare medians, not means");
        }
        warnings
    }
}

/// Seconds as text in milliseconds, with about four digits.
pub fn milliseconds(seconds: f64) -> String {
    let value = 1e3 * seconds;
    if value < 10.0 { format!("{value:.3}") } else { format!("{value:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(milliseconds: &[u64]) -> Summary {
        let times: Vec<Duration> = milliseconds.iter().map(|&time| Duration::from_millis(time)).collect();
        Summary::new(&times, &[0.0, 90.0, 100.0]).unwrap()
    }

    #[test]
    fn of_known_times() {
        let summary = summary(&[4, 1, 3, 2, 5]);
        assert_eq!((summary.min, summary.max, summary.count), (0.001, 0.005, 5));
        assert!((summary.mean - 0.003).abs() < 1e-12 && (summary.median - 0.003).abs() < 1e-12);
        let expected = [0.001, 0.0046, 0.005];
        assert!(
            summary.percentiles.iter().zip(expected).all(|((_, found), expected)| (found - expected).abs() < 1e-12)
        );
        assert!(Summary::new(&[], &[]).is_none());
    }

    #[test]
    fn noise_is_told() {
        assert!(summary(&[10, 10, 11, 10, 9, 10]).warnings("step").is_empty());
        let start = summary(&[900, 10, 11, 10, 9, 12, 10, 11]).warnings("step");
        assert!(start[0].contains("--warmUp") && start[1].contains("spread"), "{start:?}");
        let late = summary(&[10, 11, 10, 900, 9, 12, 10, 11]).warnings("step");
        assert!(late[0].starts_with("1 of 8 times of step") && late[0].contains("--duration"), "{late:?}");
    }
}
