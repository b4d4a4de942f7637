//! A bundle that is served: its thread, its queue and its metrics.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard};

use eqim::bundle::{Bundle, Manifest};
use eqim::engine::Engine;
use eqim::generate::generate;
use eqim::generate::scheduler::{Capacity, Event, Order};
use eqim::generate::tiles::Tiling;
use eqim::generate::worker::{self, Command, Events, State, Worker};
use eqim::request::Request;
use eqim::{Error, Result};
use eqim_engines::Options;
use tokio::sync::{mpsc, oneshot};

use crate::failure::Failure;

/// A bundle that is served.
pub struct Model {
    /// Name of the model in requests.
    pub name: String,
    /// Contents of the bundle's `config.json`.
    pub manifest: Manifest,
    worker: Worker,
    /// Number of images that were accepted and have not ended.
    pending: Arc<AtomicUsize>,
    /// Largest number of images that are accepted at a time.
    most: usize,
}

/// The place of an image in the queue, until it is dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The events of an image.
pub type Received = mpsc::UnboundedReceiver<Event>;

impl Model {
    /// Opens a bundle in a thread of its own, which generates one image before the model is ready. `opened` receives
    /// whether that succeeded.
    ///
    /// # Errors
    /// [`Error::run`] if the system has no thread left.
    pub fn open(
        name: &str,
        bundle: Bundle,
        options: Options,
        (batch, queue): (usize, usize),
        opened: oneshot::Sender<Result<()>>,
    ) -> Result<Self> {
        let manifest = bundle.manifest.clone();
        let open = move || {
            let engine = eqim_engines::open(&bundle, &options)?;
            first_image(engine.as_ref())?;
            Ok(engine)
        };
        let opened = |result| {
            let _ = opened.send(result);
        };
        let worker = Worker::start(name, Capacity::of_machine(batch), open, opened)?;
        Ok(Self { name: name.into(), manifest, worker, pending: Arc::default(), most: batch + queue })
    }

    /// What the thread of the model tells.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.worker.state()
    }

    /// Number of images that were accepted and have not ended.
    pub fn pending(&self) -> usize {
        self.pending.load(Ordering::SeqCst)
    }

    /// Generates images, each of a request with one class, and decodes them with a tiling or, without one, as a whole.
    /// Returns the number and the events of each. An image is cancelled as soon as its events are dropped.
    ///
    /// # Errors
    /// If the queue has no room for all of them, or a request does not fit the model.
    pub fn generate(
        &self,
        requests: &[Request],
        tiling: Option<Tiling>,
        previewed: bool,
    ) -> std::result::Result<Vec<(usize, Received)>, Failure> {
        let places = self.places(requests.len())?;
        let images = requests.iter().zip(places).map(|(request, place)| {
            let (send, received) = mpsc::unbounded_channel();
            let events = move |event| {
                let _place = &place;
                match send.send(event) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            };
            let order = worker::order(&self.manifest.model, request, tiling, previewed, Box::new(events))?;
            Ok((order, received))
        });
        let images = images.collect::<Result<Vec<_>>>()?;
        let submit = |(order, received): (Order<Events>, Received)| {
            let number = order.number;
            self.send(Command::Generate(Box::new(order)))?;
            Ok((number, received))
        };
        images.into_iter().map(submit).collect()
    }

    /// Calls a function with the engine, between two tokens.
    ///
    /// # Errors
    /// Those of the function; if the thread has ended.
    pub async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Engine) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, Failure> {
        let (send, result) = oneshot::channel();
        let call = move |engine: &dyn Engine| {
            let _ = send.send(work(engine));
        };
        self.send(Command::Call(Box::new(call)))?;
        Ok(result.await.map_err(|_| Error::run(&self.name, "its thread has ended"))??)
    }

    /// Sends a command to the thread of the model.
    ///
    /// # Errors
    /// If the thread has ended.
    pub fn send(&self, command: Command) -> std::result::Result<(), Failure> {
        Ok(self.worker.send(command)?)
    }

    /// Takes places in the queue.
    fn places(&self, count: usize) -> std::result::Result<Vec<Place>, Failure> {
        let places: Vec<Place> = (0..count)
            .map(|_| {
                self.pending.fetch_add(1, Ordering::SeqCst);
                Place(Arc::clone(&self.pending))
            })
            .collect();
        let pending = self.pending();
        if pending > self.most {
            let most = self.most;
            return Err(Failure::busy(format!(
                "{} images wait, at most {most} are accepted: try again",
                pending - count
            )));
        }
        Ok(places)
    }
}

/// Generates and decodes the shortest image, so that the first request does not wait for what happens only once.
fn first_image(engine: &dyn Engine) -> Result<()> {
    let request = Request::new(engine.config(), [None], 2);
    let generated = generate(engine, &request, |_| {})?;
    engine.decode_tokens(generated.tokens.view()).map(drop)
}
