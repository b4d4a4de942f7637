//! Strips of an image, as they are decoded.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use eqim::Config;
use eqim::generate::scheduler::Event;
use eqim::generate::worker::{Command, Worker};
use eqim::request::condition::ClassSchedule;
use eqim::request::settings::Settings;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::{OrRaise, bad_input, exception};
use crate::image::{Image, Strip};
use crate::making::{Change, Making};
use crate::process::Process;
use crate::settings;

/// Longest time for which signals such as Ctrl-C wait.
const SIGNALS: Duration = Duration::from_millis(20);

/// The events of an image.
pub type Received = Mutex<Receiver<Event>>;

/// What the thread of the engine sends next. Other threads run Python while this one waits.
///
/// # Errors
/// `KeyboardInterrupt` after Ctrl-C; `ClosedError` if the engine was closed.
pub fn next<T: Send>(py: Python<'_>, received: &Mutex<Receiver<T>>) -> PyResult<T> {
    loop {
        // In every turn, because events can come faster than the timeout.
        py.check_signals()?;
        match py.detach(|| received.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(SIGNALS)) {
            Ok(event) => return Ok(event),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(closed(py)),
        }
    }
}

/// The exception of an engine that was closed.
pub fn closed(py: Python<'_>) -> PyErr {
    exception(py, "ClosedError", "the engine is closed: open the bundle again".into())
}

/// An image that is being generated, as an iterator of its strips. It is cancelled when the stream is dropped.
#[pyclass(frozen, module = "eqim")]
pub struct Stream {
    worker: Arc<Worker>,
    config: Config,
    process: Process,
    number: usize,
    /// Length of the image in tokens.
    #[pyo3(get)]
    total: usize,
    /// The events and the image, until it is complete, has failed or is cancelled.
    state: Mutex<Option<(Received, Making)>>,
    image: Mutex<Option<Py<Image>>>,
}

impl Stream {
    /// The strips of image `number`.
    pub fn new(worker: Arc<Worker>, config: Config, number: usize, received: Receiver<Event>, making: Making) -> Self {
        let (total, state) = (making.total(), Mutex::new(Some((received.into(), making))));
        Self { worker, config, process: Process::this(), number, total, state, image: Mutex::default() }
    }

    /// The events and the image. They are taken out while an event is awaited, so that no other thread waits for a lock.
    fn take(&self) -> Option<(Received, Making)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[pymethods]
impl Stream {
    fn __iter__(this: Py<Self>) -> Py<Self> {
        this
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Strip>> {
        self.process.check(py)?;
        let Some((received, mut making)) = self.take() else { return Ok(None) };
        loop {
            // After an error the image is dropped, and with it cancelled.
            let event = next(py, &received)?;
            match making.take(event).or_raise(py)? {
                Change::Token => {}
                Change::Columns(x, columns) => {
                    let strip = Strip::new(py, x, &columns)?;
                    *self.state.lock().unwrap_or_else(PoisonError::into_inner) = Some((received, making));
                    return Ok(Some(strip));
                }
                Change::Done => {
                    let image = Py::new(py, Image::generated(py, making)?)?;
                    *self.image.lock().unwrap_or_else(PoisonError::into_inner) = Some(image);
                    return Ok(None);
                }
            }
        }
    }

    /// The whole image, after the last strip.
    #[getter]
    fn image(&self, py: Python<'_>) -> Option<Py<Image>> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|image| image.clone_ref(py))
    }

    /// Change the classes of the image as soon as possible.
    ///
    /// Parameters
    /// ----------
    /// class_, classes
    ///     The new classes, as in `Engine.generate`.
    ///
    /// Returns
    /// -------
    /// int or None
    ///     The first token with the new classes. ``None`` if the image ends before.
    #[pyo3(signature = (*, class_=None, classes=None))]
    fn amend(
        &self,
        py: Python<'_>,
        class_: Option<Bound<'_, PyAny>>,
        classes: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Option<usize>> {
        self.process.check(py)?;
        let keywords = PyDict::new(py);
        keywords.set_item("class_", class_)?;
        keywords.set_item("classes", classes)?;
        let settings = Settings { tokens: Some(self.total), ..settings::read(Some(&keywords))? };
        let mut classes = settings.request(&self.config).or_raise(py)?.classes;
        let (Some(classes), true) = (classes.pop(), classes.is_empty()) else {
            return Err(bad_input(py, "class_ is several classes, expected one"));
        };
        let (reply, amended) = channel();
        let reply = move |found: Option<(usize, ClassSchedule)>| {
            let _ = reply.send(found.map(|(first, _)| first));
        };
        self.worker.send(Command::Amend(self.number, classes, Box::new(reply))).or_raise(py)?;
        let amended = Mutex::new(amended);
        next(py, &amended)
    }

    /// Cancel the image.
    fn close(&self) {
        drop(self.take());
    }
}
