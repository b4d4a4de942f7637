//! A bundle that is served: its thread, its queue and its metrics.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::StatusCode;
use eqim::bundle::{Bundle, Manifest};
use eqim::engine::Engine;
use eqim::generate::batch::Sequence;
use eqim::generate::generate;
use eqim::generate::scheduler::{Capacity, Event, Metrics, Order};
use eqim::generate::tiles::Tiling;
use eqim::generate::worker::{self, Command, Events};
use eqim::request::{PreparedRequest, Request};
use eqim::{Error, Result, limits};
use eqim_engines::Options;
use tokio::sync::{mpsc, oneshot};

use crate::failure::Failure;

/// A bundle that is served.
pub struct Model {
    /// Name of the model in requests.
    pub name: String,
    /// Contents of the bundle's `config.json`.
    pub manifest: Manifest,
    commands: Sender<Command>,
    state: Arc<Mutex<State>>,
    /// Number of images that were accepted and have not ended.
    pending: Arc<AtomicUsize>,
    /// Largest number of images that are accepted at a time.
    most: usize,
}

/// What the thread of a model tells.
#[derive(Default)]
pub struct State {
    /// Whether the first image is done, and the engine has not failed since the last image that it made.
    pub is_ready: bool,
    /// What the scheduler did and does.
    pub metrics: Metrics,
}

/// The place of an image in the queue, until it is dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The next number of an image. Numbers are unique in the process.
static NUMBER: AtomicUsize = AtomicUsize::new(0);

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
        let (commands, receiver) = channel();
        let (state, pending) = (Arc::<Mutex<State>>::default(), Arc::default());
        let manifest = bundle.manifest.clone();
        let shared = Arc::clone(&state);
        let serve = move || {
            let engine = match eqim_engines::open(&bundle, &options)
                .and_then(|engine| first_image(engine.as_ref()).map(|()| engine))
            {
                Ok(engine) => engine,
                Err(error) => {
                    let _ = opened.send(Err(error));
                    return;
                }
            };
            lock(&shared).is_ready = true;
            let _ = opened.send(Ok(()));
            let capacity = Capacity { images: batch, bytes: limits::memory() / 2 };
            worker::run(engine.as_ref(), capacity, &receiver, |metrics, failure| {
                let mut state = lock(&shared);
                if let Some(error) = failure {
                    tracing::error!("{}: {error}", bundle.folder.display());
                    state.is_ready = false;
                } else if metrics.done > state.metrics.done {
                    state.is_ready = true;
                }
                state.metrics = metrics;
            });
        };
        let thread = std::thread::Builder::new().name(format!("model {name}"));
        thread.spawn(serve).map_err(|error| Error::run_caused(name, error))?;
        Ok(Self { name: name.into(), manifest, commands, state, pending, most: batch + queue })
    }

    /// What the thread of the model tells.
    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
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
            let prepared = PreparedRequest::new(&self.manifest.model, request)?;
            let sequence =
                Sequence::of_batch(&prepared).pop().ok_or_else(|| Error::run(&self.name, "made no image"))?;
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let (send, received) = mpsc::unbounded_channel();
            let events = move |event| {
                let _place = &place;
                match send.send(event) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            };
            let sampling = prepared.sampling;
            let tiling = Some(tiling.unwrap_or(Tiling::whole(request.tokens)));
            let events: Events = Box::new(events);
            let order = Order { number, priority: 0, sequence, sampling, tiling, previewed, events };
            Ok((number, order, received))
        });
        let images = images.collect::<Result<Vec<_>>>()?;
        let submit = |(number, order, received)| {
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
        Ok(result.await.map_err(|_| self.stopped())??)
    }

    /// The error of a model whose thread has ended.
    fn stopped(&self) -> Failure {
        let message = format!("the model {} has stopped", self.name);
        Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "engine_failed", message)
    }

    /// Sends a command to the thread of the model.
    ///
    /// # Errors
    /// If the thread has ended.
    pub fn send(&self, command: Command) -> std::result::Result<(), Failure> {
        self.commands.send(command).map_err(|_| self.stopped())
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

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
