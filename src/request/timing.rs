//! Where the time of a run goes.

use std::time::{Duration, Instant};

/// How long each call of a stage took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallTimes(pub Vec<Duration>);

impl CallTimes {
    /// Does `work`, and remembers how long it took.
    pub fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let mut time = Duration::ZERO;
        let result = timed(&mut time, work);
        self.0.push(time);
        result
    }

    /// The sum of all calls.
    pub fn total(&self) -> Duration {
        self.0.iter().sum()
    }
}

/// Time spent in each stage.
#[derive(Clone, Debug, Default)]
pub struct StageTimes {
    /// Class-only work.
    pub prefill: CallTimes,
    /// The transformer, token by token.
    pub step: CallTimes,
    /// The flow head, token by token.
    pub flow: CallTimes,
    /// What a GPU tells beside; the stages' times are then its own.
    pub device: Option<DeviceTimes>,
}

/// Time around the work of a GPU, as trtexec names it.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceTimes {
    /// The host's, handing work to the GPU.
    pub enqueue: Duration,
    /// The GPU's, copying from the host.
    pub host_to_device: Duration,
    /// The GPU's, copying to the host.
    pub device_to_host: Duration,
}

/// The value that `percent` of the sorted values do not exceed, interpolated between two of them.
///
/// # Panics
/// Without values.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let place = percent / 100.0 * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

/// The median of values, which are sorted.
///
/// # Panics
/// Without values.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    percentile(values, 50.0)
}

/// Runs `work` and adds the time it took.
pub fn timed<T>(total: &mut Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    *total += start.elapsed();
    result
}
