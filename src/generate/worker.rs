//! A thread that owns an engine, and generates the images that other threads ask for.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::batch::Sequence;
use super::scheduler::{Capacity, Event, Metrics, Order, Scheduler};
use super::tiles::Tiling;
use crate::engine::Engine;
use crate::request::condition::ClassSchedule;
use crate::request::{PreparedRequest, Request};
use crate::{Config, Error, Result};

/// Receives the events of an image, on the thread of the engine: it must not wait.
pub type Events = Box<dyn FnMut(Event) -> ControlFlow<()> + Send>;

/// Receives the first token with new classes and all classes of the image, or `None`: see [`Scheduler::amend`].
pub type Amended = Box<dyn FnOnce(Option<(usize, ClassSchedule)>) + Send>;

/// A function that is called with the engine.
pub type Call = Box<dyn FnOnce(&dyn Engine) + Send>;

/// What a worker is asked to do.
pub enum Command {
    /// Generates an image.
    Generate(Box<Order<Events>>),
    /// Cancels an image. It gets no more events.
    Cancel(usize),
    /// Changes the classes of an image.
    Amend(usize, ClassSchedule, Amended),
    /// Runs a function with the engine, between two tokens.
    Call(Call),
}

/// What the thread of a worker tells.
#[derive(Default)]
pub struct State {
    /// Whether the engine is open, and has not failed since the last image that it made.
    pub is_ready: bool,
    /// What the scheduler did and does.
    pub metrics: Metrics,
}

/// A thread that owns an engine. It ends when the worker is closed or dropped, and all images are done.
pub struct Worker {
    name: String,
    /// `None` after the worker was closed.
    thread: Mutex<Option<(Sender<Command>, JoinHandle<()>)>>,
    state: Arc<Mutex<State>>,
}

impl Worker {
    /// Starts a thread which opens an engine. `opened` receives whether that succeeded; after a failure the thread ends.
    ///
    /// # Errors
    /// [`Error::run`] if the system has no thread left.
    pub fn start(
        name: &str,
        capacity: Capacity,
        open: impl FnOnce() -> Result<Box<dyn Engine>> + Send + 'static,
        opened: impl FnOnce(Result<()>) + Send + 'static,
    ) -> Result<Self> {
        let (commands, receiver) = channel();
        let state = Arc::<Mutex<State>>::default();
        let (label, shared) = (name.to_string(), Arc::clone(&state));
        let serve = move || {
            let engine = match open() {
                Ok(engine) => engine,
                Err(error) => return opened(Err(error)),
            };
            lock(&shared).is_ready = true;
            opened(Ok(()));
            run(engine.as_ref(), capacity, &receiver, |metrics, failure| {
                let mut state = lock(&shared);
                if let Some(error) = failure {
                    tracing::error!("{label}: {error}");
                    state.is_ready = false;
                } else if metrics.done > state.metrics.done {
                    state.is_ready = true;
                }
                state.metrics = metrics;
            });
        };
        let thread = thread::Builder::new().name(format!("engine {name}")).spawn(serve);
        let thread = thread.map_err(|error| Error::run_caused(name, error))?;
        Ok(Self { name: name.into(), thread: Mutex::new(Some((commands, thread))), state })
    }

    /// What the thread tells.
    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Sends a command to the thread.
    ///
    /// # Errors
    /// [`Error::run`] if the thread has ended.
    pub fn send(&self, command: Command) -> Result<()> {
        let thread = lock(&self.thread);
        let sent = thread.as_ref().is_some_and(|(commands, _)| commands.send(command).is_ok());
        if sent { Ok(()) } else { Err(Error::run(&self.name, "its thread has ended")) }
    }

    /// Accepts no more commands, and waits until all images are done and the engine is closed.
    pub fn close(&self) {
        let Some((commands, thread)) = lock(&self.thread).take() else { return };
        drop(commands);
        // A panic of the thread was reported by the thread.
        let _ = thread.join();
    }
}

fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Number of the next image of [`order`].
static NUMBER: AtomicUsize = AtomicUsize::new(0);

/// The image of a request for one image, with a number that no other image of the process has. It is decoded with a tiling or,
/// without one, as a whole; with previews if they are wanted.
///
/// # Errors
/// [`Error::input`] if the request does not fit the model or is for another number of images.
pub fn order(
    config: &Config,
    request: &Request,
    tiling: Option<Tiling>,
    previewed: bool,
    events: Events,
) -> Result<Order<Events>> {
    let prepared = PreparedRequest::new(config, request)?;
    let mut sequences = Sequence::of_batch(&prepared);
    let (Some(sequence), true) = (sequences.pop(), sequences.is_empty()) else {
        return Err(Error::input("classes", format!("are of {} images, expected 1", prepared.batch())));
    };
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let tiling = Some(tiling.unwrap_or(Tiling::whole(request.tokens)));
    Ok(Order { number, priority: 0, sequence, sampling: prepared.sampling, tiling, previewed, events })
}

/// Runs commands until all of their senders are gone and all images are done. `observe` receives the metrics after every
/// turn, and the error if the engine failed in it.
fn run(
    engine: &dyn Engine,
    capacity: Capacity,
    commands: &Receiver<Command>,
    mut observe: impl FnMut(Metrics, Option<Error>),
) {
    let mut scheduler = Scheduler::new(engine, capacity);
    let mut is_idle = true;
    loop {
        let mut failure = None;
        loop {
            let next =
                if is_idle { commands.recv().map_err(|_| TryRecvError::Disconnected) } else { commands.try_recv() };
            match next {
                Ok(command) => failure = obey(&mut scheduler, engine, command).err().or(failure),
                Err(TryRecvError::Disconnected) if is_idle => return,
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
            is_idle = false;
        }
        match scheduler.turn() {
            Ok(busy) => is_idle = !busy,
            Err(error) => failure = Some(error),
        }
        observe(scheduler.metrics(), failure);
    }
}

/// Obeys one command.
///
/// # Errors
/// If the engine fails. A command that cannot be obeyed tells its sender.
fn obey(scheduler: &mut Scheduler<Events>, engine: &dyn Engine, command: Command) -> Result<()> {
    match command {
        Command::Generate(order) => {
            scheduler.submit(*order);
            Ok(())
        }
        Command::Cancel(number) => scheduler.cancel(number).map(drop),
        Command::Amend(number, classes, amended) => {
            amended(scheduler.amend(number, &classes));
            Ok(())
        }
        Command::Call(call) => {
            call(engine);
            Ok(())
        }
    }
}
