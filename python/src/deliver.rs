//! Futures: a thread for each engine gives them their images.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use eqim::generate::scheduler::Event;
use eqim::generate::worker::Events;
use eqim::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::{PyCFunction, PyDict, PyTuple};

use crate::error::{Names, to_python};
use crate::image::Image;
use crate::making::{Change, Making, until};
use crate::stream::closed;

/// A message to the thread. Each is about the future of a number.
enum Message {
    Begin(usize, Box<Making>, Py<PyAny>),
    Event(usize, Event),
    /// No more events come.
    End(usize),
}

/// The way to the thread, which ends with the last of them.
#[derive(Clone)]
pub struct Deliveries(Sender<Message>);

/// Starts a thread that gives futures their images.
///
/// # Errors
/// [`Error::run`] if the system has no thread left.
pub fn deliver() -> Result<Deliveries> {
    let (send, messages) = channel();
    let started = thread::Builder::new().name("eqim futures".into()).spawn(move || run(&messages));
    started.map_err(|error| Error::run_caused("thread", error))?;
    Ok(Deliveries(send))
}

impl Deliveries {
    /// The events of an image that becomes the result of a future. They break if the future is cancelled.
    pub fn begin(&self, making: Making, future: &Bound<'_, PyAny>, is_cancelled: Arc<AtomicBool>) -> Events {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let _ = self.0.send(Message::Begin(number, Box::new(making), future.clone().unbind()));
        let way = Way { number, send: self.0.clone() };
        let send = move |event| match way.send.send(Message::Event(number, event)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        };
        until(is_cancelled, Box::new(send))
    }
}

/// The way of the events of an image, whose end the thread is told.
struct Way {
    number: usize,
    send: Sender<Message>,
}

impl Drop for Way {
    fn drop(&mut self) {
        let _ = self.send.send(Message::End(self.number));
    }
}

/// Whether a future is cancelled, from now on.
///
/// # Errors
/// Those of Python.
pub fn cancellation(future: &Bound<'_, PyAny>) -> PyResult<Arc<AtomicBool>> {
    let is_cancelled = Arc::<AtomicBool>::default();
    let flag = Arc::clone(&is_cancelled);
    let done = move |arguments: &Bound<'_, PyTuple>, _: Option<&Bound<'_, PyDict>>| -> PyResult<()> {
        if arguments.get_item(0)?.call_method0("cancelled")?.is_truthy()? {
            flag.store(true, Ordering::SeqCst);
        }
        Ok(())
    };
    future.call_method1("add_done_callback", (PyCFunction::new_closure(future.py(), None, None, done)?,))?;
    Ok(is_cancelled)
}

/// Gives futures their images until all senders are gone.
fn run(messages: &Receiver<Message>) {
    let mut waiting: HashMap<usize, (Box<Making>, Py<PyAny>)> = HashMap::new();
    for message in messages {
        let (number, result) = match message {
            Message::Begin(number, making, future) => {
                waiting.insert(number, (making, future));
                continue;
            }
            Message::Event(number, event) => match waiting.get_mut(&number).map(|(making, _)| making.take(event)) {
                Some(Ok(Change::Done)) => (number, Ok(())),
                Some(Err(error)) => (number, Err(Some(error))),
                Some(Ok(Change::Token | Change::Columns(..))) | None => continue,
            },
            Message::End(number) => (number, Err(None)),
        };
        let Some((making, future)) = waiting.remove(&number) else { continue };
        // There is no interpreter any more if the process is about to end.
        let _ = Python::try_attach(|py| {
            let result = match result {
                Ok(()) => Image::generated(py, *making).and_then(|image| Py::new(py, image)),
                Err(Some(error)) => Err(to_python(py, error, Names::Keywords)),
                Err(None) => Err(closed(py)),
            };
            if let Err(error) = give(future.bind(py), result) {
                error.write_unraisable(py, Some(future.bind(py)));
            }
        });
    }
}

/// Gives a future its result, unless it is cancelled.
fn give(future: &Bound<'_, PyAny>, result: PyResult<Py<Image>>) -> PyResult<()> {
    if !future.call_method0("set_running_or_notify_cancel")?.is_truthy()? {
        return Ok(());
    }
    match result {
        Ok(image) => future.call_method1("set_result", (image,))?,
        Err(error) => future.call_method1("set_exception", (error,))?,
    };
    Ok(())
}
