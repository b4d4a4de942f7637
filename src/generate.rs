//! The autoregressive loop: one column after another, over any [`Engine`].

use std::time::{Duration, Instant};

use ndarray::{Array2, Array3, Axis, concatenate, s};

use crate::engine::Engine;
use crate::random::TorchRng;
use crate::{Config, Error, Result};

/// How guidance grows along the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    /// One label a row; `None` is unconditional.
    pub labels: Vec<Option<usize>>,
    /// Length in tokens, the prefix included.
    pub tokens: usize,
    /// Classifier-free guidance; 1 is none.
    pub cfg: f32,
    /// How guidance grows.
    pub schedule: Schedule,
    /// Euler steps a token.
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

/// Time spent in each stage.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// Class-only work.
    pub prefill: Duration,
    /// The transformer, all tokens.
    pub step: Duration,
    /// The flow head, all tokens.
    pub flow: Duration,
}

/// Most Euler steps that a run may ask for.
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
        for label in self.labels.iter().flatten() {
            if *label >= generator.class_num {
                let last = generator.class_num - 1;
                return Err(Error::input("--class", format!("is {label}, expected 0 to {last} or none")));
            }
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
    fn guidance(&self, index: usize) -> f32 {
        match self.schedule {
            Schedule::Linear => (1.0 + (f64::from(self.cfg) - 1.0) * (index + 1) as f64 / self.tokens as f64) as f32,
            Schedule::Constant => self.cfg,
        }
    }
}

/// Times of an Euler run of `steps` steps: `steps + 1` values from 1 down to 0.
pub fn timesteps(steps: usize) -> Vec<f32> {
    (0..=steps).rev().map(|i| i as f32 / steps as f32).collect()
}

/// Generates a batch of token rows. `progress` is told the number of tokens known so far, prefix included.
///
/// # Errors
/// [`Error::Input`] for a request that does not fit the model; whatever the engine fails with.
pub fn generate(engine: &dyn Engine, request: &Request, mut progress: impl FnMut(usize)) -> Result<Generated> {
    request.check(engine.config())?;
    let (rows, embed) = (request.labels.len(), engine.config().generator.embed);
    let guided = request.cfg != 1.0;
    let unconditional = engine.config().generator.unconditional();
    let mut labels: Vec<i64> = request.labels.iter().map(|label| label.unwrap_or(unconditional) as i64).collect();
    if guided {
        labels.extend(vec![unconditional as i64; rows]);
    }
    let timesteps = timesteps(request.steps);
    let given = request.prefix_tokens();
    let mut random = match &request.noise {
        Noise::Seed(seed) => Some(TorchRng::new(*seed)),
        Noise::Given(_) => None,
    };
    let mut tokens = Array3::zeros((rows, request.tokens, embed));
    let mut noise = Array3::zeros((rows, request.tokens - given, embed));
    if let Some(prefix) = &request.prefix {
        tokens.slice_mut(s![.., ..given, ..]).assign(prefix);
    }
    if let Noise::Given(given) = &request.noise {
        noise.assign(given);
    }

    let mut times = Times::default();
    let (mut session, mut z) = timed(&mut times.prefill, || engine.start(&labels))?;
    for index in 0..request.tokens {
        if index > 0 {
            let last = tokens.index_axis(Axis(1), index - 1);
            let both = if guided { concatenate![Axis(0), last, last] } else { last.to_owned() };
            let positions = vec![index as i64 - 1; labels.len()];
            z = timed(&mut times.step, || session.step(both.view(), &positions))?;
        }
        if index < given {
            continue;
        }
        let mut draw = noise.index_axis_mut(Axis(1), index - given);
        if let Some(random) = &mut random {
            let values = random.randn(rows * embed);
            draw.assign(&Array2::from_shape_vec((rows, embed), values).map_err(|error| Error::run("noise", error))?);
        }
        let guidance = vec![request.guidance(index); rows];
        let token = timed(&mut times.flow, || engine.sample(z.view(), draw.view(), &guidance, &timesteps))?;
        if token.iter().any(|value| !value.is_finite()) {
            let problem =
                format!("token {index} is not finite: weights or precision do not fit this cfg and step count");
            return Err(Error::run(engine.name(), problem));
        }
        tokens.index_axis_mut(Axis(1), index).assign(&token);
        progress(index + 1);
    }
    Ok(Generated { tokens, noise, times })
}

/// Runs `work` and adds the time it took.
pub fn timed<T>(total: &mut Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    *total += start.elapsed();
    result
}
