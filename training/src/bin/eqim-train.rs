//! Trains the tokenizer and the generator on folders of photographs.

use std::process::ExitCode;

use clap::Parser;
use eqim_engines::cli;
use eqim_training::command::{self, Arguments};
use mimalloc::MiMalloc;

// Every step makes and drops gigabytes of tensors: the system's allocator hands their pages back each time.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    cli::main(|| {
        command::one_thread_a_tensor()?;
        command::run(&arguments)
    })
}
