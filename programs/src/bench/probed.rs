//! An engine that times its calls, and measures the limits of the machine before and after each of them. Memory and
//! other programs change these limits from second to second.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use eqim::engine::{Engine, Row, Session};
use eqim::model::Stage;
use eqim::request::PreparedRequest;
use eqim::request::solver::Tableau;
use eqim::request::timing::StageTimes;
use eqim::{Config, Result};
use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView3, ArrayView4};

use super::probe::{Limits, Probe};
use super::workload::{Call, Calls};

/// An engine and its calls.
pub struct Probed<'a> {
    engine: &'a dyn Engine,
    /// Measures the limits. `None` if they are not measured.
    probe: Option<&'a RefCell<Probe>>,
    /// Bytes of the weights of every stage.
    stored: BTreeMap<Stage, u64>,
    calls: RefCell<Calls>,
    /// Time spent on measuring the limits.
    probing: Cell<Duration>,
}

impl<'a> Probed<'a> {
    /// Wraps an engine.
    pub fn new(engine: &'a dyn Engine, probe: Option<&'a RefCell<Probe>>, stored: BTreeMap<Stage, u64>) -> Self {
        Self { engine, probe, stored, calls: RefCell::default(), probing: Cell::default() }
    }

    /// Number of calls of a stage so far.
    pub fn count(&self, stage: Stage) -> usize {
        self.calls.borrow().of(stage).len()
    }

    /// Takes all calls so far.
    pub fn take(&self) -> Calls {
        self.calls.take()
    }

    /// Time spent on measuring the limits.
    pub fn probing(&self) -> Duration {
        self.probing.get()
    }

    fn limits(&self, stage: Stage) -> Result<Option<Limits>> {
        let start = Instant::now();
        let limits = self
            .probe
            .map(|probe| probe.borrow_mut().measure(self.stored.get(&stage).copied().unwrap_or(0)))
            .transpose();
        self.probing.set(self.probing.get() + start.elapsed());
        limits
    }

    fn call<T>(&self, stage: Stage, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = self.limits(stage)?;
        let start = Instant::now();
        let result = work()?;
        let time = start.elapsed();
        let limits = before.zip(self.limits(stage)?).map(<[Limits; 2]>::from);
        self.calls.borrow_mut().0.entry(stage).or_default().push(Call { time, limits });
        Ok(result)
    }
}

impl Engine for Probed<'_> {
    fn config(&self) -> &Config {
        self.engine.config()
    }

    fn name(&self) -> &str {
        self.engine.name()
    }

    fn session(&self) -> Result<Box<dyn Session + '_>> {
        Ok(Box::new(ProbedSession { session: self.engine.session()?, of: self }))
    }

    fn sample(
        &self,
        z: ArrayView2<f32>,
        noise: ArrayView2<f32>,
        guidance: &[f32],
        tableau: &Tableau,
    ) -> Result<Array2<f32>> {
        self.call(Stage::Flow, || self.engine.sample(z, noise, guidance, tableau))
    }

    fn decode(&self, latents: ArrayView3<f32>) -> Result<Array4<f32>> {
        self.call(Stage::Decoder, || self.engine.decode(latents))
    }

    fn encode(&self, images: ArrayView4<f32>) -> Result<Array3<f32>> {
        self.call(Stage::Encoder, || self.engine.encode(images))
    }

    fn fused_rollout(
        &self,
        prepared: &PreparedRequest,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Option<(Array3<f32>, StageTimes)>> {
        self.engine.fused_rollout(prepared, progress)
    }
}

struct ProbedSession<'a> {
    session: Box<dyn Session + 'a>,
    of: &'a Probed<'a>,
}

impl Session for ProbedSession<'_> {
    fn arrange(&mut self, rows: &[Row]) -> Result<Array2<f32>> {
        self.of.call(Stage::Prefill, || self.session.arrange(rows))
    }

    fn step(&mut self, tokens: ArrayView2<f32>, positions: &[i64]) -> Result<Array2<f32>> {
        self.of.call(Stage::Step, || self.session.step(tokens, positions))
    }
}
