//! The error type of all libraries of the workspace.

use std::fmt::Display;

/// An error. Its message names the file, the tensor or the field, and the expected and the found value.
///
/// [`Display`] writes the message with its causes. [`source`](std::error::Error::source) returns the cause itself.
#[derive(Debug, thiserror::Error)]
#[error("{}{}", Scope(scope), Shortened(message))]
pub struct Error {
    kind: Kind,
    field: Option<&'static str>,
    /// Scope of the model in which the error occurred.
    scope: String,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Whether the input or the run is the cause of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The input cannot be used, for example a setting, a file or a tensor in it.
    Input,
    /// The input is valid, but the run failed, for example because of a full disk or a native library.
    Run,
}

/// The scope before a message. Displays nothing if the scope is empty.
struct Scope<'a>(&'a str);

impl Display for Scope<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "{}: ", self.0) }
    }
}

/// Longest message that is displayed whole, in characters. A message quotes its input, which can be of any length.
const LONGEST: usize = 3000;

/// A message without its middle, if it is too long.
struct Shortened<'a>(&'a str);

impl Display for Shortened<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self.0;
        let count = if text.len() > LONGEST { text.chars().count() } else { 0 };
        if count <= LONGEST {
            return f.write_str(text);
        }
        let place = |index: usize| text.char_indices().nth(index).map_or(text.len(), |(at, _)| at);
        let (begin, end) = (&text[..place(LONGEST / 2)], &text[place(count - LONGEST / 4)..]);
        write!(f, "{begin} […] {end}")
    }
}

/// Result type of the workspace.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    fn new(kind: Kind, message: String) -> Self {
        Self { kind, field: None, scope: String::new(), message, source: None }
    }

    /// An error for input that cannot be used: a file, a tensor, a configuration. The process exits with code 2.
    pub fn input(subject: impl Display, problem: impl Display) -> Self {
        Self::new(Kind::Input, format!("{subject}: {problem}"))
    }

    /// An error for a run that failed with valid input. The process exits with code 1.
    pub fn run(subject: impl Display, problem: impl Display) -> Self {
        Self::new(Kind::Run, format!("{subject}: {problem}"))
    }

    /// An [input](Error::input) error whose cause is an error of another library.
    pub fn input_caused(subject: impl Display, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::new(Kind::Input, subject.to_string()).because(cause)
    }

    /// A [run](Error::run) error whose cause is an error of another library.
    pub fn run_caused(subject: impl Display, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::new(Kind::Run, subject.to_string()).because(cause)
    }

    /// An error for an invalid setting. The message begins with its name: `class is 99, expected 0 to 4 or none`.
    pub fn setting(field: &'static str, problem: impl Display) -> Self {
        Self { field: Some(field), ..Self::new(Kind::Input, format!("{field} {problem}")) }
    }

    /// Appends the cause to the message and stores it as the source.
    pub fn because(self, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self { message: format!("{}: {cause}", self.message), source: Some(Box::new(cause)), ..self }
    }

    /// Puts a subject before the message, such as a file or a line of it.
    pub fn about(self, subject: impl Display) -> Self {
        Self { message: format!("{subject}: {self}"), scope: String::new(), ..self }
    }

    /// Appends advice for the user to the message.
    pub fn advise(self, advice: impl Display) -> Self {
        Self { message: format!("{}{advice}", self.message), ..self }
    }

    /// Sets the name of the setting that can correct the error.
    pub fn with_field(self, field: &'static str) -> Self {
        Self { field: Some(field), ..self }
    }

    /// Adds the name of the model scope in which the error occurred. Names of nested scopes are joined by dots, as
    /// PyTorch joins module names.
    pub fn in_scope(self, name: &str) -> Self {
        let scope = if self.scope.is_empty() { name.to_string() } else { format!("{name}.{}", self.scope) };
        Self { scope, ..self }
    }

    /// The setting that caused the error or can correct it.
    pub fn field(&self) -> Option<&'static str> {
        self.field
    }

    /// Whether the input caused the error, not the run.
    pub fn is_input(&self) -> bool {
        self.kind == Kind::Input
    }

    /// Exit code of the process for this error: 2 for invalid input, 1 for a failed run.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Input => 2,
            Kind::Run => 1,
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::new(Kind::Run, "Candle".into()).because(error)
    }
}

/// Converts errors of other libraries to [`Error`]s, which store them as their source.
pub trait ResultExt<T> {
    /// Converts an error that `subject`, an input, caused.
    ///
    /// # Errors
    /// `{subject}: {error}`, with exit code 2.
    fn or_input(self, subject: impl Display) -> Result<T>;

    /// Converts an error of a run that failed at `subject`.
    ///
    /// # Errors
    /// `{subject}: {error}`, with exit code 1.
    fn or_run(self, subject: impl Display) -> Result<T>;
}

impl<T, E: std::error::Error + Send + Sync + 'static> ResultExt<T> for Result<T, E> {
    fn or_input(self, subject: impl Display) -> Result<T> {
        self.map_err(|error| Error::input_caused(subject, error))
    }

    fn or_run(self, subject: impl Display) -> Result<T> {
        self.map_err(|error| Error::run_caused(subject, error))
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;
    use std::io;

    use super::*;

    fn missing() -> Result<(), io::Error> {
        Err(io::Error::new(io::ErrorKind::NotFound, "no such file"))
    }

    #[test]
    fn the_sentence_holds_the_cause_and_the_source_is_the_cause() {
        let error = missing().or_input("a.json").unwrap_err().about("jobs.jsonl line 3");
        assert_eq!(error.to_string(), "jobs.jsonl line 3: a.json: no such file");
        assert_eq!(error.exit_code(), 2);
        let source = error.source().and_then(|source| source.downcast_ref::<io::Error>()).unwrap();
        assert_eq!(source.kind(), io::ErrorKind::NotFound);
        assert_eq!(missing().or_run("a.json").unwrap_err().exit_code(), 1);
    }

    #[test]
    fn scopes_are_joined_as_pytorch_joins_them() {
        let error = Error::run("softmax", "shapes do not fit").in_scope("attn").in_scope("encoder_blocks.3");
        assert_eq!(error.to_string(), "encoder_blocks.3.attn: softmax: shapes do not fit");
        assert_eq!(error.about("a.onnx").to_string(), "a.onnx: encoder_blocks.3.attn: softmax: shapes do not fit");
    }

    #[test]
    fn a_setting_is_named() {
        let error = Error::setting("class", "is 99, expected 0 to 4 or none");
        assert_eq!(
            (error.field(), error.to_string().as_str()),
            (Some("class"), "class is 99, expected 0 to 4 or none")
        );
    }
}
