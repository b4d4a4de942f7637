//! The one error type of the workspace's libraries.

/// What went wrong, in a sentence that names the file, the tensor or the flag.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The user's input cannot be used: a flag, a file, a tensor in it. Exit code 2.
    #[error("{0}")]
    Input(String),
    /// The input was fine and the run failed: a full disk, a native library. Exit code 1.
    #[error("{0}")]
    Run(String),
    /// Candle refused an operation. Exit code 1.
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
}

/// A result of this workspace.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Input`] about `subject`, a file, a tensor or a flag.
    pub fn input(subject: impl std::fmt::Display, problem: impl std::fmt::Display) -> Self {
        Self::Input(format!("{subject}: {problem}"))
    }

    /// An [`Error::Run`] about `subject`.
    pub fn run(subject: impl std::fmt::Display, problem: impl std::fmt::Display) -> Self {
        Self::Run(format!("{subject}: {problem}"))
    }

    /// The process's exit code for this error: 2 for bad input, 1 for a failed run.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Input(_) => 2,
            Self::Run(_) | Self::Candle(_) => 1,
        }
    }
}
