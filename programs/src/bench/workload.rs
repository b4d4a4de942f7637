//! A batch of images to generate, and the result of the measurement.

use std::collections::BTreeMap;
use std::time::Duration;

use eqim::Config;
use eqim::model::Stage;
use eqim::request::Request;
use eqim::request::timing::{CallTimes, StageTimes};
use ndarray::{Array3, s};

use super::probe::Limits;

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

/// Rows of one call of a stage. The decoder runs one image per call, and the prefill computes each class once.
pub fn rows(config: &Config, stage: Stage, request: &Request) -> usize {
    let (batch, guided) = (request.classes.len(), request.cfg != 1.0);
    match stage {
        Stage::Prefill => batch.min(config.generator.class_num) + usize::from(guided),
        Stage::Step | Stage::Flow => batch * if guided { 2 } else { 1 },
        Stage::Decoder | Stage::Encoder => 1,
    }
}

/// One call of a stage.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Duration of the call.
    pub time: Duration,
    /// Limits of the machine before and after the call, if they are measured.
    pub limits: Option<[Limits; 2]>,
}

/// Calls of all stages.
#[derive(Clone, Debug, Default)]
pub struct Calls(pub BTreeMap<Stage, Vec<Call>>);

impl Calls {
    /// Calls of a stage.
    pub fn of(&self, stage: Stage) -> &[Call] {
        self.0.get(&stage).map_or(&[], Vec::as_slice)
    }

    /// Adds calls whose limits are not measured.
    pub fn add(&mut self, stage: Stage, times: CallTimes) {
        let calls = times.0.into_iter().map(|time| Call { time, limits: None });
        self.0.entry(stage).or_default().extend(calls);
    }

    /// Adds the calls of a generation loop, whose limits are not measured.
    pub fn add_all(&mut self, times: StageTimes) {
        self.add(Stage::Prefill, times.prefill);
        self.add(Stage::Step, times.step);
        self.add(Stage::Flow, times.flow);
    }

    /// Adds the calls of another batch.
    pub fn extend(&mut self, other: Self) {
        for (stage, calls) in other.0 {
            self.0.entry(stage).or_default().extend(calls);
        }
    }

    fn total(&self, stage: Stage) -> Duration {
        self.of(stage).iter().map(|call| call.time).sum()
    }
}

/// A generated batch and its times.
pub struct TimedBatch {
    /// Tokens `[B, N, E]`.
    pub tokens: Array3<f32>,
    /// Calls of the stages.
    pub calls: Calls,
    /// Total time, from the classes to the last pixel.
    pub total: Duration,
}

impl TimedBatch {
    /// Keeps only the last `tail` tokens and their calls.
    pub fn last(mut self, tail: usize) -> Self {
        let steps = self.calls.0.entry(Stage::Step).or_default();
        steps.drain(..steps.len() - tail.min(steps.len()));
        self.tokens = self.tokens.slice(s![.., -(tail as isize).., ..]).to_owned();
        self.calls.0.remove(&Stage::Prefill);
        self.total = self.calls.total(Stage::Step) + self.calls.total(Stage::Flow);
        self
    }

    /// Time until the first token is generated, if no token was given.
    pub fn first_token(&self) -> Option<Duration> {
        let flow = self.calls.of(Stage::Flow).first()?;
        // The reference has no prefill. Its first step computes the condition of the first token.
        let before = match self.calls.of(Stage::Prefill) {
            [] => self.calls.of(Stage::Step).first()?.time,
            calls => calls.iter().map(|call| call.time).sum(),
        };
        Some(before + flow.time)
    }
}
