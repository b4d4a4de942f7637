//! A batch of images to generate, and the result of the measurement.

use std::time::Duration;

use eqim::request::Request;
use eqim::request::timing::{CallTimes, StageTimes};
use ndarray::{Array3, s};

/// A batch of images to generate.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Request of the images.
    pub request: Request,
    /// Seed of the noise of `request`.
    pub seed: u64,
    /// Whether the tokens are decoded.
    pub decode: bool,
}

/// A generated batch and its times.
pub struct TimedBatch {
    /// Tokens `[B, N, E]`.
    pub tokens: Array3<f32>,
    /// Times of prefill, transformer steps and flow sampler.
    pub times: StageTimes,
    /// Times of the decoder.
    pub decode: CallTimes,
    /// Total time, from the classes to the last pixel.
    pub total: Duration,
}

impl TimedBatch {
    /// Keeps only the last `tail` tokens and their times.
    pub fn last(mut self, tail: usize) -> Self {
        let steps = &mut self.times.step.0;
        steps.drain(..steps.len() - tail.min(steps.len()));
        self.tokens = self.tokens.slice(s![.., -(tail as isize).., ..]).to_owned();
        self.times.prefill = CallTimes::default();
        self.total = self.times.step.total() + self.times.flow.total();
        self
    }
}
