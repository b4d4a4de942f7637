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

use std::process::ExitCode;

use arguments::Arguments;
use clap::Parser;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    eqim_cli::main(|| match &arguments.jobs {
        Some(file) => jobs::run(&arguments, file),
        None => single::run(&arguments),
    })
}
