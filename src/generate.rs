//! The autoregressive loop: one column after another, over any [`Engine`].

use std::time::{Duration, Instant};

use ndarray::{Array2, Array3, ArrayView, Axis, Dimension, s};
use serde::{Deserialize, Serialize};

use crate::batch::{Batch, Image, Sampling};
use crate::condition::{Condition, Label};
use crate::engine::Engine;
use crate::random::TorchRng;
use crate::solver::Solver;
use crate::{Config, Error, Result};

/// How guidance grows along the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// From `1 + (cfg-1)/N` at the first token to `cfg` at the last of N.
    #[default]
    Linear,
    /// `cfg` at every token.
    Constant,
}

/// Where a run's noise comes from.
#[derive(Clone, Debug)]
pub enum Noise {
    /// `torch.randn(B, E)` on the CPU for every generated token in turn, after `torch.manual_seed(seed)`.
    Seed(u64),
    /// Given: `[B, generated tokens, E]`.
    Given(Array3<f32>),
}

/// One batch of images to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// One a row.
    pub labels: Vec<Label>,
    /// Length in tokens, the prefix included.
    pub tokens: usize,
    /// Classifier-free guidance; 1 is none.
    pub cfg: f32,
    /// How guidance grows.
    pub schedule: Schedule,
    /// What integrates the ODE of a token.
    pub solver: Solver,
    /// Its steps a token.
    pub steps: usize,
    /// Tokens that are given, `[B, n, E]`; generation goes on after them.
    pub prefix: Option<Array3<f32>>,
    /// The noise that tokens are sampled from.
    pub noise: Noise,
}

/// What a run produced.
#[derive(Clone, Debug)]
pub struct Generated {
    /// All tokens, `[B, N, E]`, the prefix included.
    pub tokens: Array3<f32>,
    /// The noise of the generated ones, `[B, N - prefix, E]`.
    pub noise: Array3<f32>,
    /// Where the time went.
    pub times: Times,
}

/// How long each call of a stage took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Calls(pub Vec<Duration>);

impl Calls {
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
pub struct Times {
    /// Class-only work.
    pub prefill: Calls,
    /// The transformer, token by token.
    pub step: Calls,
    /// The flow head, token by token.
    pub flow: Calls,
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

/// Most steps a token that a run may ask for.
pub const MOST_STEPS: usize = 100_000;

impl Request {
    fn prefix_tokens(&self) -> usize {
        self.prefix.as_ref().map_or(0, |prefix| prefix.dim().1)
    }

    /// Checks the request against the model before anything runs.
    ///
    /// # Errors
    /// [`Error::Input`] naming the flag, or the file's key, that does not fit.
    pub fn check(&self, config: &Config) -> Result<()> {
        let generator = &config.generator;
        let (rows, embed) = (self.labels.len(), generator.embed);
        if rows == 0 {
            return Err(Error::input("--class", "names no class, expected at least one"));
        }
        if let Some(class) = self.labels.iter().flat_map(Label::classes).find(|&class| class >= generator.class_num) {
            let last = generator.class_num - 1;
            return Err(Error::input("--class", format!("is {class}, expected 0 to {last} or none")));
        }
        if self.tokens < 2 {
            let problem = format!("is {}, expected at least 2: the decoder mirrors at the image's edges", self.tokens);
            return Err(Error::input("--tokens", problem));
        }
        if !self.cfg.is_finite() || self.cfg < 0.0 {
            return Err(Error::input("--cfg", format!("is {}, expected a number of at least 0", self.cfg)));
        }
        if !(1..=MOST_STEPS).contains(&self.steps) {
            return Err(Error::input("--steps", format!("is {}, expected 1 to {MOST_STEPS}", self.steps)));
        }
        self.labels.iter().try_for_each(|label| label.check(self.tokens))?;
        let given = self.prefix_tokens();
        if given >= self.tokens {
            let problem =
                format!("holds {given} tokens and the run is {} long: nothing is left to generate", self.tokens);
            return Err(Error::input("--prefix", problem));
        }
        let fits = |flag, array: &Array3<f32>, tokens| {
            if array.dim() != (rows, tokens, embed) {
                let (found, expected) = (array.dim(), (rows, tokens, embed));
                return Err(Error::input(
                    flag,
                    format!("has shape {found:?}, expected {expected:?} (batch, tokens, E)"),
                ));
            }
            if array.iter().any(|value| !value.is_finite()) {
                return Err(Error::input(flag, "has a value that is not finite"));
            }
            Ok(())
        };
        if let Some(prefix) = &self.prefix {
            fits("--prefix", prefix, given)?;
        }
        match &self.noise {
            Noise::Given(noise) => fits("--noise", noise, self.tokens - given),
            Noise::Seed(_) => Ok(()),
        }
    }

    /// Guidance of token `index`, from 0.
    pub fn guidance(&self, index: usize) -> f32 {
        match self.schedule {
            Schedule::Linear => (1.0 + (f64::from(self.cfg) - 1.0) * (index + 1) as f64 / self.tokens as f64) as f32,
            Schedule::Constant => self.cfg,
        }
    }
}

/// A batch on its way into an engine: checked, and everything random drawn.
#[derive(Clone, Debug)]
pub struct Rollout {
    /// One an image.
    pub labels: Vec<Label>,
    /// Length in tokens, the prefix included.
    pub tokens: usize,
    /// Tokens that are given, `[B, n, E]`, n from 0.
    pub prefix: Array3<f32>,
    /// What tokens are sampled from, `[B, N - n, E]`.
    pub noise: Array3<f32>,
    /// Guidance of each token, `[N]`.
    pub guidance: Vec<f32>,
    /// How they are sampled.
    pub sampling: Sampling,
}

impl Rollout {
    /// Checks a request and draws its noise.
    ///
    /// # Errors
    /// [`Error::Input`] for a request that does not fit the model.
    pub fn new(config: &Config, request: &Request) -> Result<Self> {
        request.check(config)?;
        let (batch, embed) = (request.labels.len(), config.generator.embed);
        let noise = match &request.noise {
            Noise::Given(noise) => noise.clone(),
            Noise::Seed(seed) => {
                let mut random = TorchRng::new(*seed);
                let mut noise = Array3::zeros((batch, request.tokens - request.prefix_tokens(), embed));
                for mut draw in noise.axis_iter_mut(Axis(1)) {
                    let values = Array2::from_shape_vec((batch, embed), random.randn(batch * embed));
                    draw.assign(&values.map_err(|error| Error::run("noise", error))?);
                }
                noise
            }
        };
        Ok(Self {
            labels: request.labels.clone(),
            tokens: request.tokens,
            prefix: request.prefix.clone().unwrap_or_else(|| Array3::zeros((batch, 0, embed))),
            noise,
            guidance: (0..request.tokens).map(|index| request.guidance(index)).collect(),
            sampling: Sampling::new(config, request),
        })
    }

    /// What all rows are conditioned on at token `index`: those of the B images, and with guidance as many unconditional ones
    /// after them.
    pub fn conditions(&self, config: &Config, index: usize) -> Vec<Condition> {
        let none = config.generator.unconditional();
        let unconditional = self.sampling.unconditional.map(|label| vec![Condition::of(label); self.labels.len()]);
        let images = self.labels.iter().map(|label| label.condition(index, none));
        images.chain(unconditional.into_iter().flatten()).collect()
    }

    /// Images of the batch.
    pub fn batch(&self) -> usize {
        self.noise.dim().0
    }

    /// Tokens that are given.
    pub fn given(&self) -> usize {
        self.prefix.dim().1
    }
}

/// Generates a batch of token rows. `progress` is told the number of tokens known so far, prefix included.
///
/// # Errors
/// [`Error::Input`] for a request that does not fit the model; whatever the engine fails with.
pub fn generate(engine: &dyn Engine, request: &Request, mut progress: impl FnMut(usize)) -> Result<Generated> {
    let rollout = Rollout::new(engine.config(), request)?;
    let (tokens, times) = engine.rollout(&rollout, &mut progress)?;
    Ok(Generated { tokens, noise: rollout.noise, times })
}

/// A rollout whose images are a [`Batch`] on the engine.
///
/// # Errors
/// Whatever the engine fails with; [`Error::Run`] for a token that is not finite.
pub fn token_by_token<E: Engine + ?Sized>(
    engine: &E,
    rollout: &Rollout,
    progress: &mut dyn FnMut(usize),
) -> Result<(Array3<f32>, Times)> {
    let mut batch = Batch::new(engine, rollout.sampling.clone())?;
    batch.admit(Image::all(rollout).into_iter().enumerate().collect())?;
    let mut tokens = Array3::zeros((rollout.batch(), rollout.tokens, engine.config().generator.embed));
    for known in 1..=rollout.tokens {
        for (row, token) in batch.advance()? {
            tokens.slice_mut(s![row, known - 1, ..]).assign(&token?);
        }
        if known > rollout.given() {
            progress(known);
        }
    }
    Ok((tokens, batch.times))
}

/// Checks token `index` of some rows.
///
/// # Errors
/// [`Error::Run`] when a value is not finite.
pub fn check_finite<D: Dimension>(engine: &str, index: usize, token: ArrayView<f32, D>) -> Result<()> {
    if token.iter().all(|value| value.is_finite()) {
        return Ok(());
    }
    let problem = format!("token {index} is not finite: weights or precision do not fit this cfg and step count");
    Err(Error::run(engine, problem))
}

/// Runs `work` and adds the time it took.
pub fn timed<T>(total: &mut Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    *total += start.elapsed();
    result
}
