//! Ends a process that waits too long for others.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use eqim::{Result, ResultExt};

/// A thread that ends the process at a deadline: a blocking call of MPI cannot be interrupted.
#[derive(Debug)]
pub struct Watchdog(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    deadline: Mutex<Option<Instant>>,
    changed: Condvar,
}

impl Watchdog {
    /// Starts the thread. `name` is that of the process in its message.
    ///
    /// # Errors
    /// [`eqim::Error::run`] if the thread cannot be started.
    pub fn start(name: String) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let watched = shared.clone();
        let watch = move || watched.watch(&name);
        std::thread::Builder::new().name("watchdog".into()).spawn(watch).or_run("watchdog")?;
        Ok(Self(shared))
    }

    /// Sets the deadline.
    pub fn set(&self, time: Duration) {
        self.0.change(Some(Instant::now() + time));
    }

    /// Removes the deadline.
    pub fn unset(&self) {
        self.0.change(None);
    }
}

impl Shared {
    fn change(&self, deadline: Option<Instant>) {
        let mut changed = self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        // The thread wakes up at an earlier deadline by itself.
        let was_idle = std::mem::replace(&mut *changed, deadline).is_none();
        if was_idle {
            self.changed.notify_one();
        }
    }

    fn watch(&self, name: &str) {
        let mut deadline = self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            deadline = match *deadline {
                None => self.changed.wait(deadline).unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        eqim_cli::note_error(format_args!(
                            "error: {name}: an exchange with the other ranks did not end in time: one of them hangs"
                        ));
                        std::process::abort();
                    }
                    self.changed.wait_timeout(deadline, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}
