//! The candidates of the benchmark, and the runs of each.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

use eqim::close::{Tolerance, close, largest_difference, relative_error};
use eqim::engine::{Engine, Row};
use eqim::generate::generate;
use eqim::model::Stage;
use eqim::request::condition::{ClassMix, ClassSchedule};
use eqim::request::solver::Tableau;
use eqim::request::{Generated, Request};
use eqim::{Config, Error, Result};
use ndarray::{Array2, Array3, s};
use serde::Serialize;

use super::probe::Probe;
use super::probed::Probed;
use super::pytorch::{PyTorch, Variant};
use super::roofline::Work;
use super::workload::{Calls, TimedBatch, Workload, rows};
use eqim::bundle::Bundle;

/// A candidate of the benchmark.
pub enum Candidate {
    /// A bundle, its engine, and the number of threads if it was set.
    Bundle(Box<Bundle>, Box<dyn Engine>, Option<usize>),
    /// The algorithm of the reference on Candle.
    Reference(Box<dyn Engine>),
    /// The PyTorch reference, or a variant of it. All of them run in one process.
    PyTorch(Rc<PyTorch>, Variant),
}

/// Difference between the tokens of a candidate and the expected tokens.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Agreement {
    /// Largest absolute difference.
    pub largest: f32,
    /// Root mean square of the differences, divided by the root mean square of the expected tokens.
    pub relative: f32,
    /// Whether the tokens agree within the tolerance.
    pub agrees: bool,
}

impl Candidate {
    /// Name of the candidate, as text.
    pub fn name(&self) -> String {
        match self {
            Self::Bundle(bundle, engine, threads) => {
                let threads = threads.map_or(String::new(), |threads| format!(", {threads} threads"));
                format!("{} on {}{threads}", bundle.folder.display(), engine.name())
            }
            Self::Reference(engine) => engine.name().to_string(),
            Self::PyTorch(pytorch, Variant::Reference) => pytorch.name.clone(),
            Self::PyTorch(pytorch, variant) => format!("{}, {}", pytorch.name, variant.name()),
        }
    }

    /// The engine of a bundle; `None` for a reference.
    pub fn bundle_engine(&self) -> Option<&dyn Engine> {
        match self {
            Self::Bundle(_, engine, _) => Some(engine.as_ref()),
            Self::Reference(_) | Self::PyTorch(..) => None,
        }
    }

    /// Whether the candidate is a reference that bundles are compared with.
    pub fn is_reference(&self) -> bool {
        !matches!(self, Self::Bundle(..))
    }

    /// Whether the tokens can agree only approximately, because the bundle is not in FP32.
    fn is_lossy(&self) -> bool {
        match self {
            Self::Bundle(bundle, ..) => !bundle.manifest.is_fp32(),
            Self::Reference(_) => false,
            Self::PyTorch(_, variant) => variant.is_lossy(),
        }
    }

    /// Generates the images. The limits of the machine are measured for bundles on the CPU, if there is a probe.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn run(&self, work: &Workload, probe: Option<&RefCell<Probe>>) -> Result<TimedBatch> {
        let (engine, probe) = match self {
            Self::Bundle(_, engine, _) => (engine, probe),
            Self::Reference(engine) => (engine, None),
            Self::PyTorch(pytorch, variant) => return pytorch.run(work, *variant),
        };
        let engine = Probed::new(engine.as_ref(), probe, self.stored(&work.request)?);
        let start = Instant::now();
        let Generated { tokens, times, .. } = generate(&engine, &work.request, |_| {})?;
        let mut calls = engine.take();
        if calls.of(Stage::Flow).is_empty() {
            calls.add_all(times);
        }
        for row in 0..if work.decode { tokens.dim().0 } else { 0 } {
            engine.decode_tokens(tokens.slice(s![row..=row, .., ..]))?;
        }
        calls.extend(engine.take());
        Ok(TimedBatch { tokens, calls, total: start.elapsed() - engine.probing() })
    }

    /// Work of one call of a stage. `None` for a reference, whose algorithm has no stages.
    ///
    /// # Errors
    /// If the configuration is not consistent.
    pub fn work(&self, stage: Stage, request: &Request) -> Result<Option<Work>> {
        let Self::Bundle(bundle, ..) = self else { return Ok(None) };
        let rows = rows(&bundle.manifest.model, stage, request);
        Work::new(bundle, stage, rows, request.tokens, request.solver.evaluations(request.steps)).map(Some)
    }

    /// Bytes of the weights of every stage.
    fn stored(&self, request: &Request) -> Result<BTreeMap<Stage, u64>> {
        let stored = |stage| Ok((stage, self.work(stage, request)?.map_or(0, |work| work.stored)));
        Stage::ALL.into_iter().map(stored).collect()
    }

    /// Runs one stage repeatedly, on arbitrary inputs, while `more` returns true for the number of calls so far. Returns
    /// the calls.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn run_stage(
        &self,
        stage: Stage,
        request: &Request,
        probe: Option<&RefCell<Probe>>,
        mut more: impl FnMut(usize) -> bool,
    ) -> Result<Calls> {
        let Self::Bundle(_, engine, _) = self else { return Ok(Calls::default()) };
        let engine = Probed::new(engine.as_ref(), probe, self.stored(request)?);
        run_stage(&engine, stage, request, || more(engine.count(stage)))?;
        let mut calls = engine.take();
        // A step needs a prefill, which is not measured.
        calls.0.retain(|of, _| *of == stage);
        Ok(calls)
    }

    /// Compares tokens with expected tokens. `exactly` is set if both candidates solve the ODE in the same way.
    pub fn agreement(&self, found: &Array3<f32>, expected: &Array3<f32>, exactly: bool) -> Agreement {
        let (largest, relative) = (largest_difference(found, expected), relative_error(found, expected));
        let tolerance = if exactly && !self.is_lossy() { Tolerance::SAMPLING } else { Tolerance::ALIKE };
        let agrees = close(found, expected, tolerance).is_ok();
        Agreement { largest, relative, agrees }
    }
}

/// Runs one stage of an engine repeatedly, on arbitrary inputs, while `more` returns true.
fn run_stage(engine: &dyn Engine, stage: Stage, request: &Request, mut more: impl FnMut() -> bool) -> Result<()> {
    let config: &Config = engine.config();
    let g = &config.generator;
    let (batch, guided) = (request.classes.len(), request.cfg != 1.0);
    let mut labels: Vec<i64> =
        request.classes.iter().flat_map(ClassSchedule::classes).map(|class| class as i64).collect();
    labels.extend(vec![g.unconditional() as i64; if guided { batch } else { 0 }]);
    let rows: Vec<Row> = labels.iter().map(|&label| Row::new(ClassMix::of(label))).collect();
    let wave =
        |rows: usize, width: usize| Array2::from_shape_fn((rows, width), |(row, i)| ((row * width + i) as f32).sin());
    match stage {
        Stage::Prefill => {
            while more() {
                engine.session()?.arrange(&rows)?;
            }
        }
        Stage::Step => {
            let (mut session, _) = engine.start(&labels)?;
            let tokens = wave(rows.len(), g.embed);
            let mut position = 0;
            while more() {
                session.step(tokens.view(), &vec![position; rows.len()])?;
                position += 1;
            }
        }
        Stage::Flow => {
            let (z, noise) = (wave(rows.len(), g.dim), wave(batch, g.embed));
            let (guidance, tableau) = (vec![request.cfg; batch], Tableau::new(request.solver, request.steps));
            while more() {
                engine.sample(z.view(), noise.view(), &guidance, &tableau)?;
            }
        }
        Stage::Decoder => {
            let latents =
                Array3::from_shape_fn((1, request.tokens, g.embed), |(_, n, e)| ((n * g.embed + e) as f32).sin());
            let latents = latents / g.vae_norm as f32;
            while more() {
                engine.decode(latents.view())?;
            }
        }
        Stage::Encoder => return Err(Error::run("encoder", "is not measured")),
    }
    Ok(())
}
