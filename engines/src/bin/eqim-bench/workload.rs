//! What is measured: a batch of images to make, and what came of it.

use std::time::Duration;

use eqim::request::Request;
use eqim::request::timing::{CallTimes, StageTimes};
use ndarray::{Array3, s};

/// A batch of images to make.
#[derive(Clone, Debug)]
pub struct Workload {
    /// What they are.
    pub request: Request,
    /// What `request`'s noise is drawn from.
    pub seed: u64,
    /// Whether their tokens are decoded.
    pub decode: bool,
}

/// A batch of images, and how long it took.
pub struct TimedBatch {
    /// `[B, N, E]`.
    pub tokens: Array3<f32>,
    /// Times of the stages.
    pub times: StageTimes,
    /// Those of decoding.
    pub decode: CallTimes,
    /// From the classes to the last pixel.
    pub total: Duration,
}

impl TimedBatch {
    /// No more than the last `tail` tokens, and the time that they took.
    pub fn last(mut self, tail: usize) -> Self {
        let steps = &mut self.times.step.0;
        steps.drain(..steps.len() - tail.min(steps.len()));
        self.tokens = self.tokens.slice(s![.., -(tail as isize).., ..]).to_owned();
        self.times.prefill = CallTimes::default();
        self.total = self.times.step.total() + self.times.flow.total();
        self
    }
}
