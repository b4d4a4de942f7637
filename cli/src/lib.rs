//! What all command lines share: exit codes, logging, output, progress, tables, charts.
//!
//! ```
//! let rows = [("decoder", 0.125), ("flow_sampler", 1.5)].map(|(stage, seconds)| vec![stage.into(), seconds.to_string()]);
//! let table = eqim_cli::table::text(&["stage", "seconds"], rows);
//! assert_eq!(table.lines().next(), Some("stage         seconds"));
//! ```

pub mod chart;
pub mod flags;
pub mod memory;
pub mod table;

use std::fmt::{self, Display};
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use eqim::{Error, Result, ResultExt};
use indicatif::{ProgressBar, ProgressStyle};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

/// Names the variable that sets what is logged, in the syntax of `tracing_subscriber::EnvFilter`.
pub const LOG_VARIABLE: &str = "EQIM_LOG";

/// Ours from warnings on; ONNX Runtime and other libraries only when something failed.
const LOGGED: &str = "error,eqim=warn";

/// Runs a program and turns its result into the process's exit code: 0, or 2 for bad input, 1 for a failed run.
pub fn main(run: impl FnOnce() -> Result<()>) -> ExitCode {
    match start_logging().and_then(|()| run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            note(format_args!("error: {}", with_flag(&error)));
            ExitCode::from(error.exit_code())
        }
    }
}

/// The sentence of an error with the flag of the setting that it is about: settings are flags of the same name.
fn with_flag(error: &Error) -> String {
    let text = error.to_string();
    let Some(field) = error.field() else { return text };
    let flag = format!("--{}", field.replace('_', "-"));
    match text.strip_prefix(field) {
        Some(rest) => format!("{flag}{rest}"),
        None => format!("{text} ({flag})"),
    }
}

fn start_logging() -> Result<()> {
    let directives = std::env::var(LOG_VARIABLE).unwrap_or_else(|_| LOGGED.into());
    let filter = EnvFilter::try_new(directives).or_input(LOG_VARIABLE)?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).event_format(Plain);
    subscriber.try_init().map_err(|error| Error::run("logging", error))
}

/// Log lines that read like the rest of what a command line says: `warning: …`.
struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        write!(writer, "{level}: ")?;
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// Writes lines to standard output. A reader that has gone away, as `head` does, is no error.
///
/// # Errors
/// [`Error::run`] when they cannot be written.
pub fn print(text: impl Display) -> Result<()> {
    let mut output = io::stdout().lock();
    match writeln!(output, "{text}").and_then(|()| output.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Error::run("standard output", error)),
        _ => Ok(()),
    }
}

/// Reports progress on standard output. The work goes on when nobody reads it.
pub fn say(text: impl Display) {
    let _ = print(text);
}

/// Says something beside a program's output, on standard error.
pub fn note(text: impl Display) {
    // Nobody is left to be told when this fails.
    let _ = writeln!(io::stderr(), "{text}");
}

/// How far long work has come, on standard error: a bar on a terminal, elsewhere a line for every tenth.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    verb: &'static str,
    things: &'static str,
    total: usize,
    tenth: usize,
}

impl Progress {
    /// Progress that reads `generated 8/64 tokens`.
    pub fn new(verb: &'static str, total: usize, things: &'static str) -> Self {
        let bar = ProgressBar::new(total as u64).with_message(verb);
        let style =
            ProgressStyle::with_template(&format!("{{msg}} {{wide_bar}} {{pos}}/{{len}} {things}, {{eta}} left"));
        let bar = bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        // Shown before the first thing is done.
        bar.tick();
        Self { bar, verb, things, total, tenth: 0 }
    }

    /// Shows that `done` of the things are done.
    pub fn at(&mut self, done: usize) {
        self.bar.set_position(done as u64);
        let tenth = done * 10 / self.total.max(1);
        if self.bar.is_hidden() && tenth > self.tenth {
            self.tenth = tenth;
            note(format_args!("{} {done}/{} {}", self.verb, self.total, self.things));
        }
    }
}

/// What long work of unknown length is doing, on a terminal's standard error; elsewhere nothing.
#[derive(Debug)]
pub struct Spinner(ProgressBar);

impl Spinner {
    /// One that shows nothing yet.
    pub fn new() -> Self {
        Self(ProgressBar::new_spinner())
    }

    /// Shows what goes on.
    pub fn show(&self, text: String) {
        self.0.set_message(text);
        self.0.tick();
    }

    /// Clears the line.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }

    /// Lets others write where the line stands.
    pub fn aside<T>(&self, write: impl FnOnce() -> T) -> T {
        self.0.suspend(write)
    }
}

impl Default for Spinner {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_about_settings_name_their_flag() {
        let error = Error::setting("cfg_schedule", "is cosine, expected linear or constant");
        assert_eq!(with_flag(&error), "--cfg-schedule is cosine, expected linear or constant");
        assert_eq!(
            with_flag(&error.about("a.json")),
            "a.json: cfg_schedule is cosine, expected linear or constant (--cfg-schedule)"
        );
        assert_eq!(with_flag(&Error::input("a.json", "is not a file")), "a.json: is not a file");
    }
}
