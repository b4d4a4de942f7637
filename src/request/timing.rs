//! Measures the time of the stages of a run.

use std::time::{Duration, Instant};

/// Duration of each call of a stage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallTimes(pub Vec<Duration>);

impl CallTimes {
    /// Runs `work` and records its duration.
    pub fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let mut time = Duration::ZERO;
        let result = timed(&mut time, work);
        self.0.push(time);
        result
    }

    /// Total duration of all calls.
    pub fn total(&self) -> Duration {
        self.0.iter().sum()
    }
}

/// Time spent in each stage.
#[derive(Clone, Debug, Default)]
pub struct StageTimes {
    /// Computations that depend only on the class.
    pub prefill: CallTimes,
    /// The transformer, token by token.
    pub step: CallTimes,
    /// The flow head, token by token.
    pub flow: CallTimes,
    /// Additional times of a GPU. If they are present, the times of the stages were also measured on the GPU.
    pub device: Option<DeviceTimes>,
}

/// Times of a GPU other than its computations, with trtexec's names.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceTimes {
    /// Time in which the host enqueues work.
    pub enqueue: Duration,
    /// Time in which the GPU copies data from the host.
    pub host_to_device: Duration,
    /// Time in which the GPU copies data to the host.
    pub device_to_host: Duration,
}

/// Percentile of sorted values, with linear interpolation between two values.
///
/// # Panics
/// If there are no values.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let place = percent / 100.0 * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

/// Sorts the values and gives their median.
///
/// # Panics
/// If there are no values.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    percentile(values, 50.0)
}

/// Runs `work` and adds its duration to `total`.
pub fn timed<T>(total: &mut Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    *total += start.elapsed();
    result
}
