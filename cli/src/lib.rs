//! Code that all command-line programs share: exit codes, logging, output, progress, tables, charts.
//!
//! ```
//! let rows = [("decoder", 0.125), ("flow_sampler", 1.5)].map(|(stage, seconds)| vec![stage.into(), seconds.to_string()]);
//! let table = eqim_cli::table::text(&["stage", "seconds"], rows);
//! assert_eq!(table.lines().next(), Some("stage         seconds"));
//! ```

pub mod chart;
pub mod flags;
mod interrupt;
pub mod memory;
pub mod table;

use std::fmt::{self, Display};
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use eqim::{Error, Result, ResultExt};
use indicatif::{ProgressBar, ProgressStyle};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

/// Name of the environment variable with the log filter, in the syntax of `tracing_subscriber::EnvFilter`.
pub const LOG_VARIABLE: &str = "EQIM_LOG";

/// Default log filter: warnings and errors of eqim, and only errors of ONNX Runtime and other libraries.
const LOGGED: &str = "error,eqim=warn";

/// Default log filter of services, which also log their requests.
const LOGGED_BY_SERVICES: &str = "error,eqim=warn,eqim_serve=info";

/// Runs a program and converts its result to the exit code of the process: 0 on success, 2 for bad input, 1 for a
/// failed run, 130 and 143 after the signals SIGINT and SIGTERM. Its temporary files are removed in all of these cases.
pub fn main(run: impl FnOnce() -> Result<()>) -> u8 {
    let result = start_logging(&Logs::Messages).and_then(|()| interrupt::start()).and_then(|()| run());
    interrupt::wait_if_interrupted();
    exit_code(result)
}

/// Runs a program as [`main`] does, but leaves the signals to the program, and logs with times: as text, or as one JSON object
/// per line.
pub fn service(in_json: bool, run: impl FnOnce() -> Result<()>) -> u8 {
    let logs = if in_json { Logs::Json } else { Logs::Text };
    exit_code(start_logging(&logs).and_then(|()| run()))
}

/// Writes an error to standard error, and converts a result to the exit code of the process.
fn exit_code(result: Result<()>) -> u8 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            note_error(format_args!("error: {}", with_flag(&error)));
            error.exit_code()
        }
    }
}

/// The error message, with the name of its setting written as a flag. Each setting has a flag of the same name.
fn with_flag(error: &Error) -> String {
    let text = error.to_string();
    let Some(field) = error.field() else { return text };
    let flag = format!("--{}", field.replace('_', "-"));
    match text.strip_prefix(field) {
        Some(rest) => format!("{flag}{rest}"),
        None => format!("{text} ({flag})"),
    }
}

/// Formats of log lines.
enum Logs {
    /// Messages to the user of a program.
    Messages,
    /// Lines with times, for a service.
    Text,
    /// JSON objects, for a service.
    Json,
}

fn start_logging(logs: &Logs) -> Result<()> {
    let usual = if matches!(logs, Logs::Messages) { LOGGED } else { LOGGED_BY_SERVICES };
    let directives = std::env::var(LOG_VARIABLE).unwrap_or_else(|_| usual.into());
    let filter = EnvFilter::try_new(directives).or_input(LOG_VARIABLE)?;
    // A log line that cannot be written would end the process.
    let subscriber =
        tracing_subscriber::fmt().log_internal_errors(false).with_env_filter(filter).with_writer(io::stderr);
    let started = match logs {
        Logs::Messages => subscriber.event_format(Plain).try_init(),
        Logs::Text => subscriber.with_ansi(false).try_init(),
        Logs::Json => subscriber.json().try_init(),
    };
    started.map_err(|error| Error::run("logging", error))
}

/// Format of log lines. It is the same as in other messages of the programs: `warning: …`.
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

/// Whether the process writes errors only.
static IS_SILENT: AtomicBool = AtomicBool::new(false);

/// From now on, the process writes no output and no messages, only errors.
pub fn silence() {
    IS_SILENT.store(true, Ordering::Relaxed);
}

fn is_silent() -> bool {
    IS_SILENT.load(Ordering::Relaxed)
}

/// Writes lines to standard output. A closed pipe, for example to `head`, is not an error.
///
/// # Errors
/// [`Error::run`] if the lines cannot be written.
pub fn print(text: impl Display) -> Result<()> {
    if is_silent() {
        return Ok(());
    }
    let mut output = io::stdout().lock();
    match writeln!(output, "{text}").and_then(|()| output.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Error::run("standard output", error)),
        _ => Ok(()),
    }
}

/// Writes progress to standard output. Errors are ignored, so that the work continues if the output cannot be written.
pub fn say(text: impl Display) {
    let _ = print(text);
}

/// Writes a message to standard error, separate from the output of the program.
pub fn note(text: impl Display) {
    if !is_silent() {
        note_error(text);
    }
}

/// Writes an error to standard error, also if the process is [silent](silence).
pub fn note_error(text: impl Display) {
    // Errors are ignored, because there is no other place to report them.
    let _ = writeln!(io::stderr(), "{text}");
}

/// Progress of long work on standard error: a bar on a terminal, otherwise one line per tenth of the work.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    verb: &'static str,
    things: &'static str,
    total: usize,
    tenth: usize,
}

impl Progress {
    /// A progress display of the form `generated 8/64 tokens`.
    pub fn new(verb: &'static str, total: usize, things: &'static str) -> Self {
        let bar = ProgressBar::new(total as u64).with_message(verb);
        let style =
            ProgressStyle::with_template(&format!("{{msg}} {{wide_bar}} {{pos}}/{{len}} {things}, {{eta}} left"));
        let bar = bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        // Draws the bar before the first item is done.
        bar.tick();
        Self { bar, verb, things, total, tenth: 0 }
    }

    /// Shows that `done` items are done.
    pub fn at(&mut self, done: usize) {
        self.bar.set_position(done as u64);
        let tenth = done * 10 / self.total.max(1);
        if self.bar.is_hidden() && tenth > self.tenth {
            self.tenth = tenth;
            note(format_args!("{} {done}/{} {}", self.verb, self.total, self.things));
        }
    }
}

/// Status line for work of unknown length, on standard error. It is shown only on a terminal.
#[derive(Debug)]
pub struct Spinner(ProgressBar);

impl Spinner {
    /// A status line that shows nothing yet.
    pub fn new() -> Self {
        Self(ProgressBar::new_spinner())
    }

    /// Shows a description of the current work.
    pub fn show(&self, text: String) {
        self.0.set_message(text);
        self.0.tick();
    }

    /// Clears the status line.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }

    /// Hides the status line while `write` writes to the terminal.
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
