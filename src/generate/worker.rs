//! A thread that owns an engine, and generates the images that other threads ask for.

use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, TryRecvError};

use super::scheduler::{Capacity, Event, Metrics, Order, Scheduler};
use crate::engine::Engine;
use crate::request::condition::ClassSchedule;
use crate::{Error, Result};

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

/// Runs commands until all of their senders are gone and all images are done. `observe` receives the metrics after every
/// turn, and the error if the engine failed in it.
pub fn run(
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
