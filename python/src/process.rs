//! The process of an engine: threads do not survive `fork`.

use pyo3::prelude::*;

use crate::error::exception;

/// A process.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Process(u32);

impl Process {
    /// This process.
    pub fn this() -> Self {
        Self(std::process::id())
    }

    /// Checks that this is still the process.
    ///
    /// # Errors
    /// `ClosedError` if it is not.
    pub fn check(self, py: Python<'_>) -> PyResult<()> {
        let Self(now) = Self::this();
        if self.0 == now {
            return Ok(());
        }
        let problem = format!(
            "the engine was opened in process {}, and a fork such as process {now} does not have its threads: open the bundle \
             in each process, for example with the start method spawn of multiprocessing",
            self.0
        );
        Err(exception(py, "ClosedError", problem))
    }
}
