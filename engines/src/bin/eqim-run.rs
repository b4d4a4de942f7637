//! Generates images from a bundle.

use std::process::ExitCode;

use clap::Parser;
use eqim_engines::run::{self, Arguments};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    eqim_engines::cli::main(|| run::run(&arguments))
}
