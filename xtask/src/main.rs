//! Development tasks of the workspace: `cargo xtask setup`, `cargo xtask demo` and `cargo xtask test`.

mod command;
mod demo;
mod setup;

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

/// Development tasks of the eqim workspace.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

/// The development tasks.
#[derive(Subcommand)]
enum Task {
    /// Install ONNX Runtime, the Python package onnx and, on Linux x86_64, OpenVINO, TensorRT for RTX and libclang in
    /// .native/.
    Setup,
    /// Export the demo model assets/demo/model.safetensors to demo/bundle and generate four images with it in demo/.
    Demo,
    /// Run the tests of the whole workspace.
    Test {
        /// Arguments for `cargo test`; arguments after a second `--` are passed to the test binaries.
        #[arg(last = true)]
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    let Err(error) = perform(Cli::parse().task) else {
        return ExitCode::SUCCESS;
    };
    eprintln!("error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("because: {cause}");
    }
    ExitCode::FAILURE
}

/// Performs one task. Every task first installs the native libraries that are missing.
fn perform(task: Task) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("xtask has no parent folder: expected it inside the workspace")?;

    setup::setup(root)?;
    match task {
        Task::Setup => Ok(()),
        Task::Demo => demo::demo(root),
        Task::Test { args } => test(root, &args),
    }
}

/// Runs the tests of the whole workspace.
fn test(root: &Path, args: &[String]) -> Result<()> {
    println!("testing the workspace");
    command::run(
        Command::new("cargo")
            .args(["test", "--release", "--workspace"])
            .args(setup::features())
            .args(args)
            .current_dir(root),
    )
}
