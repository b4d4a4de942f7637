//! A batch of different images: each row has its own class, length, start and guidance. When an image is finished, the
//! next image takes its place.

use std::collections::VecDeque;

use ndarray::{Array1, Array2, Array3, Axis, concatenate};

use crate::engine::{Engine, Row, Session};
use crate::request::condition::{ClassMix, ClassSchedule};
use crate::request::random::TorchRng;
use crate::request::timing::StageTimes;
use crate::request::{Noise, PreparedRequest, Request, Sampling, check_finite};
use crate::{Config, Error, Result};

/// One image to generate.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// Class of the image, or its classes along the tokens.
    pub label: ClassSchedule,
    /// Position of the first token. It is not 0 if an earlier run is continued; the prefix then holds the last tokens
    /// of that run.
    pub begin: usize,
    /// Given tokens, `[n, E]`; n may be 0.
    pub prefix: Array2<f32>,
    /// Noise from which the other tokens are sampled.
    pub noise: NoiseSource,
    /// Guidance of each token from position 0 on, `[N]`.
    pub guidance: Vec<f32>,
}

impl Sequence {
    /// The images of a prepared request.
    pub fn of_batch(prepared: &PreparedRequest) -> Vec<Self> {
        let image = |row: usize| Self {
            label: prepared.classes[row].clone(),
            begin: 0,
            prefix: prepared.prefix.index_axis(Axis(0), row).to_owned(),
            noise: NoiseSource::Given(
                prepared.noise.index_axis(Axis(0), row).rows().into_iter().map(|row| row.to_owned()).collect(),
            ),
            guidance: prepared.guidance.clone(),
        };
        (0..prepared.batch()).map(image).collect()
    }

    /// Image `row` of a [checked](Request::check) request. The noise of a seed is drawn when it is needed.
    pub fn streamed(config: &Config, request: &Request, row: usize) -> Self {
        let (rows, embed) = (request.classes.len(), config.generator.embed);
        let given = |tokens: &Array3<f32>| tokens.index_axis(Axis(0), row).to_owned();
        let noise = match &request.noise {
            Noise::Given(noise) => {
                NoiseSource::Given(given(noise).rows().into_iter().map(|row| row.to_owned()).collect())
            }
            Noise::Seed(seed) => NoiseSource::Seed { random: Box::new(TorchRng::new(*seed)), rows, row },
        };
        Self {
            label: request.classes[row].clone(),
            begin: 0,
            prefix: request.prefix.as_ref().map_or_else(|| Array2::zeros((0, embed)), given),
            noise,
            guidance: (0..request.tokens).map(|index| request.guidance(index)).collect(),
        }
    }
}

/// Noise of one image, token by token.
#[derive(Clone, Debug)]
pub enum NoiseSource {
    /// Noise that is known in advance: one `[E]` per token.
    Given(VecDeque<Array1<f32>>),
    /// Noise that is drawn when it is needed: row `row` of `torch.randn(rows, E)` for every token.
    Seed {
        /// Random number generator.
        random: Box<TorchRng>,
        /// Number of images whose noise is drawn together.
        rows: usize,
        /// Index of this image among them.
        row: usize,
    },
}

impl NoiseSource {
    /// Noise `[embed]` of the next token.
    ///
    /// # Errors
    /// [`Error::run`] if no given noise is left.
    pub fn next(&mut self, embed: usize) -> Result<Array1<f32>> {
        match self {
            Self::Given(noise) => {
                noise.pop_front().ok_or_else(|| Error::run("noise", "noise for too few tokens was given"))
            }
            Self::Seed { random, rows, row } => {
                Ok(Array1::from(random.randn(*rows * embed)[*row * embed..][..embed].to_vec()))
            }
        }
    }
}

/// A batch of images that an engine generates.
pub struct Batch<'a, E: Engine + ?Sized> {
    engine: &'a E,
    sampling: Sampling,
    session: Box<dyn Session + 'a>,
    images: Vec<Active>,
    /// Conditions of the images' next tokens, `[B, D]` or with guidance `[2B, D]`, unconditional rows last.
    z: Array2<f32>,
    /// Time spent so far.
    pub times: StageTimes,
}

/// An image in progress.
struct Active {
    number: usize,
    image: Sequence,
    /// Position of the next token.
    next: usize,
    /// The last token, `[E]`.
    last: Array1<f32>,
}

impl Active {
    /// Condition of the token at `position`; `none` is the unconditional label.
    fn condition(&self, position: usize, none: usize) -> ClassMix {
        self.image.label.condition(position, none)
    }
}

/// Number of an image, and its next token `[E]` or its error.
pub type Next = (usize, Result<Array1<f32>>);

impl<'a, E: Engine + ?Sized> Batch<'a, E> {
    /// Creates a batch without images.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn new(engine: &'a E, sampling: Sampling) -> Result<Self> {
        let (session, z) = (engine.session()?, Array2::zeros((0, engine.config().generator.dim)));
        Ok(Self { engine, sampling, session, images: vec![], z, times: StageTimes::default() })
    }

    /// Number of images in the batch.
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Numbers of the images.
    pub fn numbers(&self) -> Vec<usize> {
        self.images.iter().map(|active| active.number).collect()
    }

    /// Whether the batch has no images.
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// Number of rows per image.
    fn streams(&self) -> usize {
        if self.sampling.unconditional.is_some() { 2 } else { 1 }
    }

    /// Adds numbered images to the batch.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn admit(&mut self, new: Vec<(usize, Sequence)>) -> Result<()> {
        let kept: Vec<usize> = (0..self.images.len()).collect();
        self.arrange(&kept, new)
    }

    /// Keeps the images at the places `kept` and adds new ones after them.
    fn arrange(&mut self, kept: &[usize], new: Vec<(usize, Sequence)>) -> Result<()> {
        let before = self.images.len();
        let generator = &self.engine.config().generator;
        let (embed, none) = (generator.embed, generator.unconditional());
        let begin = |(number, image): (usize, Sequence)| {
            let next = image.begin;
            Active { number, image, next, last: Array1::zeros(embed) }
        };
        let new: Vec<Active> = new.into_iter().map(begin).collect();
        let mut rows = vec![];
        for stream in 0..self.streams() {
            let unconditional = self.sampling.unconditional.filter(|_| stream > 0).map(ClassMix::of);
            let condition = |active: &Active| unconditional.unwrap_or_else(|| active.condition(active.next, none));
            let was =
                |&place: &usize| Row { kept: Some(stream * before + place), condition: condition(&self.images[place]) };
            rows.extend(kept.iter().map(was));
            rows.extend(new.iter().map(|active| Row::new(condition(active))));
        }
        let begun = self.times.prefill.time(|| self.session.arrange(&rows))?;
        let mut begun = begun.rows().into_iter();
        let mut z = Array2::zeros((rows.len(), self.z.dim().1));
        for (mut z, row) in z.rows_mut().into_iter().zip(&rows) {
            match row.kept {
                Some(row) => z.assign(&self.z.row(row)),
                None => z.assign(
                    &begun.next().ok_or_else(|| Error::run("batch", "the session returned too few conditions"))?,
                ),
            }
        }
        self.z = z;
        let mut images: Vec<Option<Active>> = self.images.drain(..).map(Some).collect();
        self.images.extend(kept.iter().filter_map(|&place| images[place].take()));
        self.images.extend(new);
        Ok(())
    }

    /// Removes an image. Returns whether the batch had it.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn cancel(&mut self, number: usize) -> Result<bool> {
        let kept: Vec<usize> = (0..self.images.len()).filter(|&place| self.images[place].number != number).collect();
        if kept.len() == self.images.len() {
            return Ok(false);
        }
        if kept.is_empty() {
            self.images.clear();
        } else {
            self.arrange(&kept, vec![])?;
        }
        Ok(true)
    }

    /// Changes the classes of an image as soon as possible: see [`ClassSchedule::followed_by`]. The condition of the next
    /// token is known already, so the first token with the new classes is the one after it, or a later one. Returns the
    /// index of this token and all classes of the image, or `None` if the batch does not have the image, or the image
    /// ends before it.
    pub fn amend(&mut self, number: usize, classes: &ClassSchedule) -> Option<(usize, ClassSchedule)> {
        let active = self.images.iter_mut().find(|active| active.number == number)?;
        let tokens = active.image.guidance.len();
        let (amended, first) = active.image.label.followed_by(classes, active.next + 1, tokens)?;
        active.image.label = amended.clone();
        Some((first, amended))
    }

    /// Generates one token per image and runs it through the transformer. Images leave the batch if they are complete
    /// or if their token is not finite. The others keep their order.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn advance(&mut self) -> Result<Vec<Next>> {
        self.sample()?;
        let none = self.engine.config().generator.unconditional();
        let (mut tokens, mut kept, mut changed) = (vec![], vec![], false);
        for (place, active) in self.images.iter_mut().enumerate() {
            let finite = check_finite(self.engine.name(), active.next, active.last.view());
            active.next += 1;
            if finite.is_ok() && active.next < active.image.guidance.len() {
                kept.push(place);
                changed |= active.condition(active.next, none) != active.condition(active.next - 1, none);
            }
            tokens.push((active.number, finite.map(|()| active.last.clone())));
        }
        if kept.is_empty() {
            self.images.clear();
            return Ok(tokens);
        }
        if changed || kept.len() < self.images.len() {
            self.arrange(&kept, vec![])?;
        }
        self.step()?;
        Ok(tokens)
    }

    /// Sets the next token of every image, given or sampled.
    fn sample(&mut self) -> Result<()> {
        let mut sampled = vec![];
        for (place, active) in self.images.iter_mut().enumerate() {
            match active.image.prefix.rows().into_iter().nth(active.next - active.image.begin) {
                Some(token) => active.last.assign(&token),
                None => sampled.push(place),
            }
        }
        if sampled.is_empty() {
            return Ok(());
        }
        let rows: Vec<usize> = (0..self.streams())
            .flat_map(|stream| sampled.iter().map(move |place| (stream, place)))
            .map(|(stream, place)| stream * self.images.len() + place)
            .collect();
        let z = self.z.select(Axis(0), &rows);
        let embed = self.engine.config().generator.embed;
        let mut noise = Array2::zeros((sampled.len(), embed));
        let mut guidance = Vec::with_capacity(sampled.len());
        for (mut noise, &place) in noise.rows_mut().into_iter().zip(&sampled) {
            let active = &mut self.images[place];
            noise.assign(&active.image.noise.next(embed)?);
            guidance.push(active.image.guidance[active.next]);
        }
        let sample = || self.engine.sample(z.view(), noise.view(), &guidance, &self.sampling.tableau);
        let tokens = self.times.flow.time(sample)?;
        for (token, &place) in tokens.rows().into_iter().zip(&sampled) {
            self.images[place].last.assign(&token);
        }
        Ok(())
    }

    /// Runs the last token of every image through the transformer.
    fn step(&mut self) -> Result<()> {
        let mut last = Array2::zeros((self.images.len(), self.engine.config().generator.embed));
        for (mut token, active) in last.rows_mut().into_iter().zip(&self.images) {
            token.assign(&active.last);
        }
        let positions: Vec<i64> = self.images.iter().map(|active| active.next as i64 - 1).collect();
        let (tokens, positions) = match self.streams() {
            1 => (last, positions),
            _ => (concatenate![Axis(0), last, last], positions.repeat(2)),
        };
        self.z = self.times.step.time(|| self.session.step(tokens.view(), &positions))?;
        Ok(())
    }
}
