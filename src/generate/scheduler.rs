//! Generates many images with one engine. Images join at any token, in the order of their priorities, and can be cancelled
//! or get other classes at any token. Images that are sampled in different ways are in batches of their own, which take
//! turns.

use std::collections::{HashMap, VecDeque};
use std::ops::ControlFlow;
use std::time::Duration;

use ndarray::Array1;

use super::batch::{Batch, Sequence};
use super::memory;
use super::preview::Preview;
use super::tiles::{Strip, TileDecoder, Tiling};
use crate::engine::Engine;
use crate::request::Sampling;
use crate::request::condition::ClassSchedule;
use crate::request::timing::{CallTimes, timed};
use crate::{Error, Result, limits};

/// What happens to an image.
#[derive(Debug)]
pub enum Event {
    /// Token `[E]` of an index is known.
    Token(usize, Array1<f32>),
    /// Columns of the image are decoded.
    Strip(Strip),
    /// Columns of the image that a strip will replace.
    Preview(Strip),
    /// The image is done: all of its tokens and strips were sent.
    Done,
    /// The image failed, and has left the scheduler.
    Failed(Error),
}

/// An image to generate.
pub struct Order<S> {
    /// Number of the image, which no other image of the scheduler has.
    pub number: usize,
    /// Images of a higher priority begin first.
    pub priority: i32,
    /// The image.
    pub sequence: Sequence,
    /// How its tokens are sampled.
    pub sampling: Sampling,
    /// How it is decoded; `None` if only its tokens are wanted.
    pub tiling: Option<Tiling>,
    /// Whether columns are also decoded before their tile is complete.
    pub previewed: bool,
    /// Receives all events of the image. If it breaks, the image is cancelled.
    pub events: S,
}

/// Limits of a scheduler.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Largest number of images in all batches. As many others can wait for their decoding.
    pub images: usize,
    /// Memory in bytes for the caches and the sampling of the images in all batches.
    pub bytes: u64,
}

impl Capacity {
    /// Half of the memory of the machine, for at most `images` images in all batches.
    pub fn of_machine(images: usize) -> Self {
        Self { images, bytes: limits::memory() / 2 }
    }
}

/// What a scheduler did and does.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Number of images that wait.
    pub waiting: usize,
    /// Number of images in each batch.
    pub batches: Vec<usize>,
    /// Number of generated tokens.
    pub tokens: u64,
    /// Number of images that were done.
    pub done: u64,
    /// Number of images that failed.
    pub failed: u64,
    /// Number of images that were cancelled.
    pub cancelled: u64,
    /// Calls of the prefill.
    pub prefill: Calls,
    /// Calls of the transformer step.
    pub step: Calls,
    /// Calls of the flow sampler.
    pub flow: Calls,
    /// Calls of the decoder.
    pub decoder: Calls,
}

/// Number and time of the calls of a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Number of calls.
    pub count: u64,
    /// Time of all calls.
    pub time: Duration,
}

impl Calls {
    fn add(&mut self, times: &CallTimes) {
        self.count += times.0.len() as u64;
        self.time += times.total();
    }
}

/// Generates images with an engine. `S` receives the events of an image.
pub struct Scheduler<'a, S> {
    engine: &'a dyn Engine,
    capacity: Capacity,
    /// Images that have not begun, in the order in which they begin.
    queue: VecDeque<Order<S>>,
    /// Batches with images. The first one is the next to advance.
    batches: VecDeque<(Sampling, Batch<'a, dyn Engine + 'a>)>,
    /// Images in progress, by their numbers.
    active: HashMap<usize, Active<'a, S>>,
    /// Images with a tile to decode, in the order in which their tokens were known.
    ready: VecDeque<usize>,
    /// Images with a preview to decode. Those of which nothing was shown come first.
    due: VecDeque<usize>,
    metrics: Metrics,
}

/// An image in progress.
struct Active<'a, S> {
    events: S,
    /// Index of the next token.
    next: usize,
    /// Number of tokens of the image.
    tokens: usize,
    /// What its caches and its sampling take.
    bytes: u64,
    decoder: Option<TileDecoder<'a>>,
    preview: Option<Preview<'a>>,
}

impl<S> Active<'_, S> {
    /// Whether nothing is left to generate or to decode.
    fn is_done(&self) -> bool {
        self.next == self.tokens && self.decoder.as_ref().is_none_or(TileDecoder::is_done)
    }
}

impl<'a, S: FnMut(Event) -> ControlFlow<()>> Scheduler<'a, S> {
    /// A scheduler without images.
    pub fn new(engine: &'a dyn Engine, capacity: Capacity) -> Self {
        let (queue, batches, active, ready, due) = Default::default();
        Self { engine, capacity, queue, batches, active, ready, due, metrics: Metrics::default() }
    }

    /// Number of images that can be submitted and begin at the next token, if there is memory for them.
    pub fn room(&self) -> usize {
        let Capacity { images, .. } = self.capacity;
        let free = images.saturating_sub(self.generating());
        free.min((2 * images).saturating_sub(self.active.len())).saturating_sub(self.queue.len())
    }

    /// Number of images in all batches.
    fn generating(&self) -> usize {
        self.batches.iter().map(|(_, batch)| batch.len()).sum()
    }

    /// What the scheduler did and does.
    pub fn metrics(&self) -> Metrics {
        let batches = self.batches.iter().map(|(_, batch)| batch.len()).collect();
        Metrics { waiting: self.queue.len(), batches, ..self.metrics.clone() }
    }

    /// Adds an image. It begins when there is room for it. It fails at once, with an [`Error::setting`], if it alone needs
    /// more memory than the scheduler has.
    pub fn submit(&mut self, mut order: Order<S>) {
        let bytes = self.bytes(&order);
        if bytes > self.capacity.bytes {
            let (needed, most) = (bytes / 1_000_000, self.capacity.bytes / 1_000_000);
            let error = Error::setting("steps", format!("is too large: the image needs {needed} MB of {most} MB"));
            self.metrics.failed += 1;
            let _ = (order.events)(Event::Failed(error));
            return;
        }
        let place = self.queue.partition_point(|other| other.priority >= order.priority);
        self.queue.insert(place, order);
    }

    /// Removes an image, which gets no more events. Returns whether the scheduler had it.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn cancel(&mut self, number: usize) -> Result<bool> {
        let waiting = self.queue.iter().position(|order| order.number == number);
        let removed = waiting.and_then(|place| self.queue.remove(place)).is_some();
        if !removed && self.active.remove(&number).is_none() {
            return Ok(false);
        }
        self.metrics.cancelled += 1;
        self.free(number)?;
        Ok(true)
    }

    /// Frees the row of an image that is no longer active, and its places among those that are decoded.
    fn free(&mut self, number: usize) -> Result<()> {
        self.ready.retain(|&other| other != number);
        self.due.retain(|&other| other != number);
        for (_, batch) in &mut self.batches {
            batch.cancel(number)?;
        }
        self.batches.retain(|(_, batch)| !batch.is_empty());
        Ok(())
    }

    /// Changes the classes of an image as soon as possible, as [`Batch::amend`] does. Returns the first token with the new
    /// classes and all classes of the image, or `None` if the scheduler does not have the image, or it ends before.
    pub fn amend(&mut self, number: usize, classes: &ClassSchedule) -> Option<(usize, ClassSchedule)> {
        if let Some(order) = self.queue.iter_mut().find(|order| order.number == number) {
            order.sequence.label = classes.clone();
            return Some((0, classes.clone()));
        }
        self.batches.iter_mut().find_map(|(_, batch)| batch.amend(number, classes))
    }

    /// Decodes at most one tile, begins images if there is room, and generates one token of every image of one batch.
    /// Returns whether there was anything to do.
    ///
    /// # Errors
    /// If the engine fails. The images that it was working on have then failed, and have left the scheduler.
    pub fn turn(&mut self) -> Result<bool> {
        let decoded = self.decode()?;
        self.admit()?;
        let advanced = self.advance()?;
        Ok(decoded || advanced)
    }

    /// Takes turns until all images are done.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn finish(&mut self) -> Result<()> {
        while self.turn()? {}
        Ok(())
    }

    /// Memory of the caches and the sampling of an image.
    fn bytes(&self, order: &Order<S>) -> u64 {
        let guided = order.sampling.unconditional.is_some();
        memory::of_image(self.engine.config(), order.sampling.tableau.evaluations(), guided)
    }

    /// Moves images from the queue to their batches.
    fn admit(&mut self) -> Result<()> {
        let mut new: Vec<(Sampling, Vec<(usize, Sequence)>)> = vec![];
        let Capacity { images, bytes } = self.capacity;
        let mut generating = self.generating();
        let mut used: u64 = self.active.values().filter(|active| active.next < active.tokens).map(|it| it.bytes).sum();
        while let Some(order) = self.queue.front() {
            let needed = self.bytes(order);
            if generating >= images || self.active.len() >= 2 * images || used + needed > bytes {
                break;
            }
            generating += 1;
            used += needed;
            let Some(order) = self.queue.pop_front() else { break };
            let Order { number, sequence, sampling, tiling, previewed, events, .. } = order;
            let tokens = sequence.guidance.len();
            let decoder = tiling.map(|tiling| TileDecoder::new(self.engine, tiling, tokens));
            let preview = previewed.then(|| Preview::new(self.engine, tokens));
            let active = Active { events, next: sequence.begin, tokens, bytes: needed, decoder, preview };
            self.active.insert(number, active);
            match new.iter_mut().find(|(other, _)| *other == sampling) {
                Some((_, images)) => images.push((number, sequence)),
                None => new.push((sampling, vec![(number, sequence)])),
            }
        }
        // Every image joins a batch or fails, also after an error.
        let mut result = Ok(());
        for (sampling, images) in new {
            let numbers: Vec<usize> = images.iter().map(|(number, _)| *number).collect();
            if let Err(error) = self.join(sampling, images) {
                result = Err(self.fail_all(numbers, error));
            }
        }
        result
    }

    /// Adds images to the batch of their sampling.
    fn join(&mut self, sampling: Sampling, images: Vec<(usize, Sequence)>) -> Result<()> {
        if let Some((_, batch)) = self.batches.iter_mut().find(|(other, _)| *other == sampling) {
            return batch.admit(images);
        }
        let mut batch = Batch::new(self.engine, sampling.clone())?;
        batch.admit(images)?;
        self.batches.push_back((sampling, batch));
        Ok(())
    }

    /// Whether nothing of an image was shown to somebody who watches it.
    fn is_first(&self, number: usize) -> bool {
        self.active.get(&number).and_then(|active| active.preview.as_ref()).is_some_and(Preview::is_first)
    }

    /// Decodes the first preview of an image, or the tile that waits longest, or another preview. Returns whether there was
    /// one. First previews are small: they hold up a tile only a little.
    fn decode(&mut self) -> Result<bool> {
        if self.due.front().is_some_and(|&number| self.is_first(number)) {
            return self.decode_preview();
        }
        let Some(number) = self.ready.pop_front() else { return self.decode_preview() };
        let Some(active) = self.active.get_mut(&number) else { return Ok(true) };
        let Some(decoder) = &mut active.decoder else { return Ok(true) };
        let strip = timed(&mut self.metrics.decoder.time, || decoder.decode());
        if decoder.is_ready() {
            self.ready.push_back(number);
        }
        if let Some(preview) = &mut active.preview {
            preview.skip(decoder.done());
        }
        self.show(number, strip, Event::Strip)
    }

    /// Decodes the preview that waits longest. Returns whether there was one.
    fn decode_preview(&mut self) -> Result<bool> {
        let Some(number) = self.due.pop_front() else { return Ok(false) };
        let Some(preview) = self.active.get_mut(&number).and_then(|active| active.preview.as_mut()) else {
            return Ok(true);
        };
        // A tile may have shown the tokens.
        if !preview.is_due() {
            return Ok(true);
        }
        let strip = timed(&mut self.metrics.decoder.time, || preview.decode());
        self.show(number, strip, Event::Preview)
    }

    /// Sends a decoded strip. An image whose pixels are not finite fails alone: the engine is not the cause.
    fn show(&mut self, number: usize, strip: Result<Strip>, event: fn(Strip) -> Event) -> Result<bool> {
        self.metrics.decoder.count += 1;
        match strip.map_err(|error| self.fail_all(vec![number], error))?.checked(self.engine) {
            Ok(strip) => self.send(number, event(strip)),
            Err(error) => self.fail(number, error),
        }
        Ok(true)
    }

    /// Generates one token of every image of the next batch. Returns whether there was a batch.
    fn advance(&mut self) -> Result<bool> {
        let Some((sampling, mut batch)) = self.batches.pop_front() else { return Ok(false) };
        let numbers = batch.numbers();
        let tokens = match batch.advance() {
            Ok(tokens) => tokens,
            Err(error) => return Err(self.fail_all(numbers, error)),
        };
        let times = std::mem::take(&mut batch.times);
        self.metrics.prefill.add(&times.prefill);
        self.metrics.step.add(&times.step);
        self.metrics.flow.add(&times.flow);
        if !batch.is_empty() {
            self.batches.push_back((sampling, batch));
        }
        for (number, token) in tokens {
            match token {
                Ok(token) => self.receive(number, token),
                Err(error) => self.fail(number, error),
            }
        }
        Ok(true)
    }

    /// Takes the next token of an image.
    fn receive(&mut self, number: usize, token: Array1<f32>) {
        let Some(active) = self.active.get_mut(&number) else { return };
        self.metrics.tokens += 1;
        let index = active.next;
        active.next += 1;
        if let Some(decoder) = &mut active.decoder {
            decoder.keep(token.view());
            if decoder.is_ready() && !self.ready.contains(&number) {
                self.ready.push_back(number);
            }
        }
        if let Some(preview) = &mut active.preview {
            preview.keep(token.view());
            if preview.is_due() && !self.due.contains(&number) {
                let is_first = preview.is_first();
                let place =
                    if is_first { self.due.partition_point(|&other| self.is_first(other)) } else { self.due.len() };
                self.due.insert(place, number);
            }
        }
        self.send(number, Event::Token(index, token));
    }

    /// Sends an event of an image, and then that it is done if it is.
    fn send(&mut self, number: usize, event: Event) {
        let Some(active) = self.active.get_mut(&number) else { return };
        if (active.events)(event).is_break() {
            self.cancelled(number);
        } else if active.is_done() {
            let _ = (active.events)(Event::Done);
            self.active.remove(&number);
            self.metrics.done += 1;
        }
    }

    /// Removes an image whose events are no longer wanted. If the engine fails, the next turn reports it.
    fn cancelled(&mut self, number: usize) {
        if let Err(error) = self.cancel(number) {
            tracing::error!("an image could not be cancelled: {error}");
        }
    }

    /// Removes an image that failed. If the engine fails again, the next turn reports it.
    fn fail(&mut self, number: usize, error: Error) {
        if let Some(mut active) = self.active.remove(&number) {
            self.metrics.failed += 1;
            let _ = (active.events)(Event::Failed(error));
        }
        if let Err(error) = self.free(number) {
            tracing::error!("an image could not be removed: {error}");
        }
    }

    /// Removes images whose engine failed. Returns the error.
    fn fail_all(&mut self, numbers: Vec<usize>, error: Error) -> Error {
        numbers.into_iter().for_each(|number| self.fail(number, Error::run(self.engine.name(), &error)));
        error
    }
}
