//! The one error type of the workspace's libraries.

use std::fmt::Display;

/// What went wrong, in a sentence that names the file, the tensor or the field, what was expected and what was found.
///
/// [`Display`] writes the whole sentence, the causes included. [`source`](std::error::Error::source) gives the cause itself.
#[derive(Debug, thiserror::Error)]
#[error("{}{message}", Scope(scope))]
pub struct Error {
    kind: Kind,
    field: Option<&'static str>,
    /// The model's scope that the error occurred in.
    scope: String,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Whose fault an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The input cannot be used: a setting, a file, a tensor in it.
    Input,
    /// The input is fine and the run failed: a full disk, a native library.
    Run,
}

/// A scope in front of a sentence, where there is one.
struct Scope<'a>(&'a str);

impl Display for Scope<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "{}: ", self.0) }
    }
}

/// A result of this workspace.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    fn new(kind: Kind, message: String) -> Self {
        Self { kind, field: None, scope: String::new(), message, source: None }
    }

    /// Input that cannot be used: a file, a tensor, a configuration. The process exits with code 2.
    pub fn input(subject: impl Display, problem: impl Display) -> Self {
        Self::new(Kind::Input, format!("{subject}: {problem}"))
    }

    /// A run that failed although its input was fine. The process exits with code 1.
    pub fn run(subject: impl Display, problem: impl Display) -> Self {
        Self::new(Kind::Run, format!("{subject}: {problem}"))
    }

    /// An [input](Error::input) that cannot be used, with what another library says of it.
    pub fn input_caused(subject: impl Display, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::new(Kind::Input, subject.to_string()).because(cause)
    }

    /// A [run](Error::run) that failed, with what another library says of it.
    pub fn run_caused(subject: impl Display, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::new(Kind::Run, subject.to_string()).because(cause)
    }

    /// A setting that does not fit; the sentence begins with its name: `class is 99, expected 0 to 4 or none`.
    pub fn setting(field: &'static str, problem: impl Display) -> Self {
        Self { field: Some(field), ..Self::new(Kind::Input, format!("{field} {problem}")) }
    }

    /// Adds the cause to the sentence, and keeps it as the source.
    pub fn because(self, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self { message: format!("{}: {cause}", self.message), source: Some(Box::new(cause)), ..self }
    }

    /// Puts the subject in front of the sentence: a file, a line of it.
    pub fn about(self, subject: impl Display) -> Self {
        Self { message: format!("{subject}: {self}"), scope: String::new(), ..self }
    }

    /// Adds what is to be done to the end of the sentence.
    pub fn advise(self, advice: impl Display) -> Self {
        Self { message: format!("{}{advice}", self.message), ..self }
    }

    /// Names the setting that mends the error.
    pub fn with_field(self, field: &'static str) -> Self {
        Self { field: Some(field), ..self }
    }

    /// Adds the name of a scope of the model, inside which the error occurred. Names of nested scopes are joined by dots, as
    /// PyTorch joins the names of modules.
    pub fn in_scope(self, name: &str) -> Self {
        let scope = if self.scope.is_empty() { name.to_string() } else { format!("{name}.{}", self.scope) };
        Self { scope, ..self }
    }

    /// The setting that the error is about, or that mends it.
    pub fn field(&self) -> Option<&'static str> {
        self.field
    }

    /// Whether the input is at fault, not the run.
    pub fn is_input(&self) -> bool {
        self.kind == Kind::Input
    }

    /// The process's exit code for this error: 2 for bad input, 1 for a failed run.
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

/// Turns errors of other libraries into [`Error`]s, which keep them as their source.
pub trait ResultExt<T> {
    /// The subject, an input, is at fault.
    ///
    /// # Errors
    /// `{subject}: {error}`, with exit code 2.
    fn or_input(self, subject: impl Display) -> Result<T>;

    /// The run failed at the subject.
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
