//! `eqim-run`: generates images with a bundle.

mod arguments;
mod decode;
mod inputs;
mod job;
mod jobs;
mod outputs;
mod report;
mod single;
mod stream;
mod trace;

use std::ffi::OsString;

use arguments::Arguments;
use clap::Parser;

/// Runs the program with its arguments, the first of which is its name. Returns the exit code of the process.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let arguments = Arguments::parse_from(arguments);
    eqim_cli::main(|| match &arguments.jobs {
        Some(file) => jobs::run(&arguments, file),
        None => single::run(&arguments),
    })
}
