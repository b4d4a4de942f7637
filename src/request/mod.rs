//! A request for images: one batch of images, how their tokens are sampled, and the result.

pub mod condition;
pub mod jobs;
pub mod random;
pub mod record;
pub mod settings;
pub mod solver;
pub mod timing;

use ndarray::{Array2, Array3, ArrayView, Axis, Dimension};
use serde::{Deserialize, Serialize};

use crate::{Config, Error, Result, ResultExt};
use condition::{ClassMix, ClassSchedule};
use random::TorchRng;
use solver::{Solver, Tableau};
use timing::StageTimes;

/// How guidance grows along the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum GuidanceSchedule {
    /// From `1 + (cfg-1)/N` at the first token to `cfg` at the last of N.
    #[default]
    Linear,
    /// `cfg` at every token.
    Constant,
}

/// Source of the noise of a run.
#[derive(Clone, Debug)]
pub enum Noise {
    /// Noise of a seed: `torch.randn(B, E)` on the CPU for every generated token in order, after
    /// `torch.manual_seed(seed)`.
    Seed(u64),
    /// Given noise, `[B, generated tokens, E]`.
    Given(Array3<f32>),
}

/// One batch of images to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// Class of each image, or its classes along the tokens, `[B]`.
    pub classes: Vec<ClassSchedule>,
    /// Length of each image in tokens, the prefix included.
    pub tokens: usize,
    /// Scale of classifier-free guidance; 1 is no guidance.
    pub cfg: f32,
    /// How guidance grows along the image.
    pub cfg_schedule: GuidanceSchedule,
    /// Solver of the ODE of a token.
    pub solver: Solver,
    /// Number of steps of the solver per token.
    pub steps: usize,
    /// Given tokens, `[B, n, E]`. Generation continues after them.
    pub prefix: Option<Array3<f32>>,
    /// Noise from which the tokens are sampled.
    pub noise: Noise,
}

/// Result of a run.
#[derive(Clone, Debug)]
pub struct Generated {
    /// All tokens, `[B, N, E]`, the prefix included.
    pub tokens: Array3<f32>,
    /// Noise of the generated tokens, `[B, N - prefix, E]`.
    pub noise: Array3<f32>,
    /// Time spent in each stage.
    pub times: StageTimes,
}

/// How all images of a batch are sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// With guidance, the label of the unconditional row that is added for each image.
    pub unconditional: Option<i64>,
    /// Times and updates of the solver.
    pub tableau: Tableau,
}

impl Sampling {
    /// Sampling of the images of a request.
    pub fn new(config: &Config, request: &Request) -> Self {
        let unconditional = (request.cfg != 1.0).then(|| config.generator.unconditional() as i64);
        Self { unconditional, tableau: Tableau::new(request.solver, request.steps) }
    }
}

/// Largest number of tokens of a run, over all of its images. One million tokens of 256 values and their noise take
/// 2 GB, and their images would together be 16 million pixels wide. A larger number is a mistake.
pub const MOST_TOKENS: usize = 1_000_000;

/// Largest number of steps per token.
pub const MOST_STEPS: usize = 100_000;

impl Request {
    /// A request for images of these classes, `tokens` tokens long, with the default sampling: no guidance, Euler's
    /// method with the model's number of steps, and the noise of seed 0.
    pub fn new<C: Into<ClassSchedule>>(config: &Config, classes: impl IntoIterator<Item = C>, tokens: usize) -> Self {
        Self {
            classes: classes.into_iter().map(Into::into).collect(),
            tokens,
            cfg: 1.0,
            cfg_schedule: GuidanceSchedule::default(),
            solver: Solver::default(),
            steps: config.generator.steps,
            prefix: None,
            noise: Noise::Seed(0),
        }
    }

    fn prefix_tokens(&self) -> usize {
        self.prefix.as_ref().map_or(0, |prefix| prefix.dim().1)
    }

    /// Checks the request against the model before anything runs.
    ///
    /// # Errors
    /// [`Error::setting`] naming the setting that does not fit.
    pub fn check(&self, config: &Config) -> Result<()> {
        let generator = &config.generator;
        let (rows, embed) = (self.classes.len(), generator.embed);
        if rows == 0 {
            return Err(Error::setting("class", "names no class, expected at least one"));
        }
        if let Some(class) =
            self.classes.iter().flat_map(ClassSchedule::classes).find(|&class| class >= generator.class_num)
        {
            let last = generator.class_num - 1;
            return Err(Error::setting("class", format!("is {class}, expected 0 to {last} or none")));
        }
        if self.tokens < 2 {
            let problem = format!("is {}, expected at least 2: the decoder pads by mirroring the edges", self.tokens);
            return Err(Error::setting("tokens", problem));
        }
        if !self.cfg.is_finite() || self.cfg < 0.0 {
            return Err(Error::setting("cfg", format!("is {}, expected a number of at least 0", self.cfg)));
        }
        if !(1..=MOST_STEPS).contains(&self.steps) {
            return Err(Error::setting("steps", format!("is {}, expected 1 to {MOST_STEPS}", self.steps)));
        }
        self.classes.iter().try_for_each(|label| label.check(self.tokens))?;
        let given = self.prefix_tokens();
        if given >= self.tokens {
            let problem = format!("has {given} tokens and the image {}: no token is left to generate", self.tokens);
            return Err(Error::setting("prefix", problem));
        }
        let fits = |field, array: &Array3<f32>, tokens| {
            if array.dim() != (rows, tokens, embed) {
                let (found, expected) = (array.dim(), (rows, tokens, embed));
                let problem = format!("has shape {found:?}, expected {expected:?} (batch, tokens, E)");
                return Err(Error::setting(field, problem));
            }
            if array.iter().any(|value| !value.is_finite()) {
                return Err(Error::setting(field, "has a value that is not finite"));
            }
            Ok(())
        };
        if let Some(prefix) = &self.prefix {
            fits("prefix", prefix, given)?;
        }
        match &self.noise {
            Noise::Given(noise) => fits("noise", noise, self.tokens - given),
            Noise::Seed(_) => Ok(()),
        }
    }

    /// Guidance of token `index`, counted from 0.
    pub fn guidance(&self, index: usize) -> f32 {
        match self.cfg_schedule {
            GuidanceSchedule::Linear => {
                (1.0 + (f64::from(self.cfg) - 1.0) * (index + 1) as f64 / self.tokens as f64) as f32
            }
            GuidanceSchedule::Constant => self.cfg,
        }
    }
}

/// A checked request whose noise has been drawn.
#[derive(Clone, Debug)]
pub struct PreparedRequest {
    /// Class of each image, or its classes along the tokens, `[B]`.
    pub classes: Vec<ClassSchedule>,
    /// Length of each image in tokens, the prefix included.
    pub tokens: usize,
    /// Given tokens, `[B, n, E]`; n may be 0.
    pub prefix: Array3<f32>,
    /// Noise of the other tokens, `[B, N - n, E]`.
    pub noise: Array3<f32>,
    /// Guidance of each token, `[N]`.
    pub guidance: Vec<f32>,
    /// How the tokens are sampled.
    pub sampling: Sampling,
}

impl PreparedRequest {
    /// Checks a request and draws its noise.
    ///
    /// # Errors
    /// [`Error::input`] for a request that does not fit the model.
    pub fn new(config: &Config, request: &Request) -> Result<Self> {
        request.check(config)?;
        let (batch, embed) = (request.classes.len(), config.generator.embed);
        let noise = match &request.noise {
            Noise::Given(noise) => noise.clone(),
            Noise::Seed(seed) => {
                let mut random = TorchRng::new(*seed);
                let mut noise = Array3::zeros((batch, request.tokens - request.prefix_tokens(), embed));
                for mut draw in noise.axis_iter_mut(Axis(1)) {
                    let values = Array2::from_shape_vec((batch, embed), random.randn(batch * embed));
                    draw.assign(&values.or_run("noise")?);
                }
                noise
            }
        };
        Ok(Self {
            classes: request.classes.clone(),
            tokens: request.tokens,
            prefix: request.prefix.clone().unwrap_or_else(|| Array3::zeros((batch, 0, embed))),
            noise,
            guidance: (0..request.tokens).map(|index| request.guidance(index)).collect(),
            sampling: Sampling::new(config, request),
        })
    }

    /// Conditions of all rows at token `index`: one per image and, with guidance, the same number of unconditional ones
    /// after them.
    pub fn conditions(&self, config: &Config, index: usize) -> Vec<ClassMix> {
        let none = config.generator.unconditional();
        let unconditional = self.sampling.unconditional.map(|label| vec![ClassMix::of(label); self.classes.len()]);
        let images = self.classes.iter().map(|label| label.condition(index, none));
        images.chain(unconditional.into_iter().flatten()).collect()
    }

    /// Number of images in the batch.
    pub fn batch(&self) -> usize {
        self.noise.dim().0
    }

    /// Number of given tokens.
    pub fn given(&self) -> usize {
        self.prefix.dim().1
    }
}

/// Checks that token `index` is finite in all rows.
///
/// # Errors
/// [`Error::run`] if a value is not finite.
pub fn check_finite<D: Dimension>(engine: &str, index: usize, token: ArrayView<f32, D>) -> Result<()> {
    if token.iter().all(|value| value.is_finite()) {
        return Ok(());
    }
    let problem = format!("token {index} is not finite: weights or precision do not fit this cfg and step count");
    Err(Error::run(engine, problem))
}
