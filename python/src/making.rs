//! An image on its way: the events of the engine become pixels and tokens.

use std::hint::black_box;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};

use eqim::generate::finish::Finish;
use eqim::generate::scheduler::Event;
use eqim::generate::worker::Events;
use eqim::picture::Pixels;
use eqim::request::Request;
use eqim::request::record::Origin;
use eqim::{Config, Error, Result};
use ndarray::{Array2, Array3};

/// The events of an image. It is cancelled as soon as the receiver is dropped.
pub fn events() -> (Events, Receiver<Event>) {
    let (send, received) = channel();
    let events = move |event| match send.send(event) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    (Box::new(events), received)
}

/// Events that break as soon as a flag is set.
pub fn until(flag: Arc<AtomicBool>, mut events: Events) -> Events {
    Box::new(move |event| if flag.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { events(event) })
}

/// An image that is being generated.
pub struct Making {
    /// What makes the image.
    pub origin: Origin,
    /// Pixels so far.
    pub pixels: Pixels,
    /// Tokens so far, `[N, E]` in the order of generation.
    pub tokens: Array2<f32>,
    /// Number of tokens so far.
    pub known: usize,
    finish: Finish,
}

/// What an event has changed.
pub enum Change {
    /// A token is known.
    Token,
    /// Columns `[3, height, width]` at a pixel are final.
    Columns(usize, Array3<f32>),
    /// The image is complete.
    Done,
}

impl Making {
    /// An image of a request, before its first event.
    ///
    /// # Errors
    /// If it does not fit in memory.
    pub fn new(origin: Origin, request: &Request, finish: Finish, config: &Config) -> Result<Self> {
        let (width, height) = config.image_size(request.tokens);
        // An allocation that fails ends the process. This one only tells that it would fail. The compiler must not leave it
        // out.
        let mut room: Vec<u8> = Vec::new();
        let reserved = room.try_reserve_exact(3 * width * height);
        drop(black_box(room));
        reserved.map_err(|error| Error::run_caused(format!("an image of {width} × {height} pixels"), error))?;
        let pixels = Pixels::new((width, height));
        let tokens = Array2::zeros((request.tokens, config.generator.embed));
        Ok(Self { origin, pixels, tokens, known: 0, finish })
    }

    /// Number of tokens of the whole image.
    pub fn total(&self) -> usize {
        self.tokens.dim().0
    }

    /// Takes an event.
    ///
    /// # Errors
    /// If the image failed.
    pub fn take(&mut self, event: Event) -> Result<Change> {
        match event {
            Event::Token(index, token) => {
                self.tokens.row_mut(index).assign(&token);
                self.known = index + 1;
                Ok(Change::Token)
            }
            Event::Strip(strip) | Event::Preview(strip) => {
                let (x, columns) = self.finish.columns(strip.x, strip.pixels, self.pixels.size.0);
                self.pixels.write(x, columns.view());
                Ok(Change::Columns(x, columns))
            }
            Event::Done => Ok(Change::Done),
            Event::Failed(error) => Err(error),
        }
    }
}
