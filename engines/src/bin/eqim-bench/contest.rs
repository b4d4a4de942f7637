//! Those that are measured, and one image after another from each.

use std::time::Instant;

use eqim::close::{Tolerance, close, largest_difference, relative_error};
use eqim::engine::{Engine, Row};
use eqim::generate::generate;
use eqim::model::Stage;
use eqim::request::condition::{ClassMix, ClassSchedule};
use eqim::request::solver::Tableau;
use eqim::request::timing::CallTimes;
use eqim::request::{Generated, Request};
use eqim::{Config, Error, Result};
use ndarray::{Array2, Array3, s};
use serde::Serialize;

use super::pytorch::PyTorch;
use super::workload::{TimedBatch, Workload};
use eqim::bundle::Bundle;

/// One that is measured.
pub enum Candidate {
    /// A bundle on its engine, and the engine's threads where they were asked for.
    Bundle(Box<Bundle>, Box<dyn Engine>, Option<usize>),
    /// The reference's algorithm.
    Reference(Box<dyn Engine>),
    /// The reference itself.
    PyTorch(PyTorch),
}

/// How far tokens lie from others.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Agreement {
    /// The largest difference.
    pub largest: f32,
    /// Root mean square of the differences over that of the others.
    pub relative: f32,
    /// Whether they count as the same.
    pub agrees: bool,
}

impl Candidate {
    /// What it is, for people.
    pub fn name(&self) -> String {
        match self {
            Self::Bundle(bundle, engine, threads) => {
                let threads = threads.map_or(String::new(), |threads| format!(", {threads} threads"));
                format!("{} on {}{threads}", bundle.folder.display(), engine.name())
            }
            Self::Reference(engine) => engine.name().to_string(),
            Self::PyTorch(pytorch) => pytorch.name.clone(),
        }
    }

    /// Whether it is something to be measured against.
    pub fn is_reference(&self) -> bool {
        !matches!(self, Self::Bundle(..))
    }

    /// Whether its tokens can only be alike.
    fn is_lossy(&self) -> bool {
        let Self::Bundle(bundle, ..) = self else { return false };
        !bundle.manifest.is_fp32()
    }

    /// Makes the images.
    ///
    /// # Errors
    /// When its engine fails.
    pub fn run(&self, work: &Workload) -> Result<TimedBatch> {
        let engine = match self {
            Self::Bundle(_, engine, _) | Self::Reference(engine) => engine,
            Self::PyTorch(pytorch) => return pytorch.run(work),
        };
        let start = Instant::now();
        let Generated { tokens, times, .. } = generate(engine.as_ref(), &work.request, |_| {})?;
        let mut decode = CallTimes::default();
        for row in 0..if work.decode { tokens.dim().0 } else { 0 } {
            decode.time(|| engine.decode_tokens(tokens.slice(s![row..=row, .., ..])))?;
        }
        Ok(TimedBatch { tokens, times, decode, total: start.elapsed() })
    }

    /// How its tokens agree with another's, `exactly` where both solve the ODE in the same way.
    pub fn agreement(&self, found: &Array3<f32>, expected: &Array3<f32>, exactly: bool) -> Agreement {
        let (largest, relative) = (largest_difference(found, expected), relative_error(found, expected));
        let tolerance = if exactly && !self.is_lossy() { Tolerance::SAMPLING } else { Tolerance::ALIKE };
        let agrees = close(found, expected, tolerance).is_ok();
        Agreement { largest, relative, agrees }
    }
}

/// One stage of an engine, on inputs that do not matter, to be run again and again.
///
/// # Errors
/// When the engine fails.
pub fn stage_times(
    engine: &dyn Engine,
    stage: Stage,
    request: &Request,
    mut more: impl FnMut(&CallTimes) -> bool,
) -> Result<CallTimes> {
    let config: &Config = engine.config();
    let g = &config.generator;
    let (batch, guided) = (request.classes.len(), request.cfg != 1.0);
    let mut labels: Vec<i64> =
        request.classes.iter().flat_map(ClassSchedule::classes).map(|class| class as i64).collect();
    labels.extend(vec![g.unconditional() as i64; if guided { batch } else { 0 }]);
    let rows: Vec<Row> = labels.iter().map(|&label| Row::new(ClassMix::of(label))).collect();
    let wave =
        |rows: usize, width: usize| Array2::from_shape_fn((rows, width), |(row, i)| ((row * width + i) as f32).sin());
    let mut calls = CallTimes::default();
    match stage {
        Stage::Prefill => {
            while more(&calls) {
                let mut session = engine.session()?;
                calls.time(|| session.arrange(&rows))?;
            }
        }
        Stage::Step => {
            let (mut session, _) = engine.start(&labels)?;
            let tokens = wave(rows.len(), g.embed);
            let mut position = 0;
            while more(&calls) {
                calls.time(|| session.step(tokens.view(), &vec![position; rows.len()]))?;
                position += 1;
            }
        }
        Stage::Flow => {
            let (z, noise) = (wave(rows.len(), g.dim), wave(batch, g.embed));
            let (guidance, tableau) = (vec![request.cfg; batch], Tableau::new(request.solver, request.steps));
            while more(&calls) {
                calls.time(|| engine.sample(z.view(), noise.view(), &guidance, &tableau))?;
            }
        }
        Stage::Decoder => {
            let latents =
                Array3::from_shape_fn((1, request.tokens, g.embed), |(_, n, e)| ((n * g.embed + e) as f32).sin());
            let latents = latents / g.vae_norm as f32;
            while more(&calls) {
                calls.time(|| engine.decode(latents.view()))?;
            }
        }
        Stage::Encoder => return Err(Error::run("encoder", "is not measured")),
    }
    Ok(calls)
}
