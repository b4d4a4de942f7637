//! `eqim-export`: exports checkpoints to bundles of ONNX graphs and TensorRT engines, and inspects bundles.

mod calibrate;
mod inspect;
mod int8;
mod onnx;
mod report;
mod trt;

use std::ffi::OsString;

use clap::{Parser, Subcommand};
use eqim::{Error, Result};

/// Export Equivariant Image Modeling checkpoints to ONNX and TensorRT, and inspect exported bundles.
#[derive(Parser)]
#[command(name = "eqim-export", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Onnx(onnx::Onnx),
    Calibrate(calibrate::Calibrate),
    Trt(trt::Trt),
    Inspect(inspect::Inspect),
}

/// Exports checkpoints to a bundle, with the arguments of `eqim-export onnx`.
///
/// # Errors
/// [`Error::input`] if an argument, a file or the model does not fit; [`Error::run`] if the export fails.
pub fn export(arguments: impl IntoIterator<Item = OsString>) -> Result<()> {
    /// The arguments of one command.
    #[derive(Parser)]
    #[command(no_binary_name = true)]
    struct Alone {
        #[command(flatten)]
        onnx: onnx::Onnx,
    }
    let parsed = Alone::try_parse_from(arguments);
    onnx::run(&parsed.map_err(|error| Error::input("export", error.to_string().trim_end()))?.onnx)
}

/// Runs the program with its arguments, the first of which is its name. Returns the exit code of the process.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let arguments = Arguments::parse_from(arguments);
    eqim_cli::main(|| match &arguments.command {
        Command::Onnx(arguments) => onnx::run(arguments),
        Command::Calibrate(arguments) => calibrate::run(arguments),
        Command::Trt(arguments) => trt::run(arguments),
        Command::Inspect(arguments) => inspect::run(arguments),
    })
}
