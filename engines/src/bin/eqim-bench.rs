//! Measures bundles.

use std::process::ExitCode;

use clap::Parser;
use eqim_engines::bench::{self, Arguments};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    eqim_engines::cli::main(|| bench::run(&arguments))
}
