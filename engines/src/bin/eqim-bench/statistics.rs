//! What a list of times says, and whether it can be believed.

use std::time::Duration;

use eqim::request::timing::{self, percentile};
use serde::Serialize;

/// A modified z-score beyond this is an outlier: ten times what Iglewicz and Hoaglin (1993) call one by 1.4826, as background
/// work, not the ordinary spread, is looked for.
const OUTLIER: f64 = 14.826;

/// Times of one thing, in seconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// How many.
    pub count: usize,
    /// The shortest.
    pub min: f64,
    /// The longest.
    pub max: f64,
    /// Their mean.
    pub mean: f64,
    /// Their median.
    pub median: f64,
    /// Percent, and the time that so many percent do not exceed.
    pub percentiles: Vec<(f64, f64)>,
    /// Those far from the median.
    pub outliers: usize,
    /// Standard deviation over the mean.
    pub spread: f64,
    /// Whether the first is an outlier.
    pub slow_start: bool,
}

impl Summary {
    /// Of at least one time.
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

    /// As trtexec writes it.
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

    /// What is wrong with the times of `what`, and what to do about it.
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

/// Seconds as milliseconds, to four digits or so.
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
