//! `eqim-export`: exports checkpoints to bundles of ONNX graphs and TensorRT engines, and inspects bundles.

mod calibrate;
mod inspect;
mod int8;
mod onnx;
mod report;
mod trt;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Export Equivariant Image Modeling checkpoints to ONNX and TensorRT, and inspect exported bundles.
#[derive(Parser)]
#[command(version)]
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

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    eqim_cli::main(|| match &arguments.command {
        Command::Onnx(arguments) => onnx::run(arguments),
        Command::Calibrate(arguments) => calibrate::run(arguments),
        Command::Trt(arguments) => trt::run(arguments),
        Command::Inspect(arguments) => inspect::run(arguments),
    })
}
