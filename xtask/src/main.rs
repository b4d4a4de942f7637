//! The workspace's chores: `cargo xtask setup`, `cargo xtask demo` and `cargo xtask test`.

mod command;
mod demo;
mod setup;

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

/// Chores of the eqim workspace.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

/// One chore.
#[derive(Subcommand)]
enum Chore {
    /// Install ONNX Runtime, TensorRT for RTX, libclang and the Python package onnx under .native/.
    Setup,
    /// Export the test fixture to ONNX and draw one picture with it.
    Demo,
    /// Run the tests of the whole workspace.
    Test {
        /// Arguments for `cargo test`; a second `--` starts those of the test binaries.
        #[arg(last = true)]
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    let Err(error) = perform(Cli::parse().chore) else {
        return ExitCode::SUCCESS;
    };
    eprintln!("error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("because: {cause}");
    }
    ExitCode::FAILURE
}

/// Performs one chore; each needs the native libraries.
fn perform(chore: Chore) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("xtask has no parent folder: expected it inside the workspace")?;

    setup::setup(root)?;
    match chore {
        Chore::Setup => Ok(()),
        Chore::Demo => demo::demo(root),
        Chore::Test { args } => test(root, &args),
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
