//! Development tasks of the workspace: `cargo xtask setup`, `demo`, `test`, `clients`, `wheel`, `fleet`, `mpi`,
//! `cuda-check` and `gpu`.

mod clients;
mod command;
mod debian;
mod demo;
mod gpu;
mod mpi;
mod setup;
mod wheel;

use std::path::{Path, PathBuf};
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
    Setup {
        /// Install EfficientNet-Lite0 too, a network for the perceptual loss and for evaluation.
        #[arg(long)]
        training: bool,
    },
    /// Export the demo model assets/demo/model.safetensors to demo/bundle and generate four images with it in demo/.
    Demo,
    /// Run the tests of the whole workspace.
    Test {
        /// Arguments for `cargo test`; arguments after a second `--` are passed to the test binaries.
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Test eqim-serve with OpenAI's Python package, curl, Chromium and nginx. What is missing is installed: Debian packages,
    /// which needs root, and Python packages in .native/.
    Clients {
        /// Arguments for pytest.
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Build the Python package in target/wheels, and test it in fresh virtual environments with the oldest and the newest
    /// Python at hand.
    Wheel {
        /// Arguments for pytest.
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Test the Python package on Ray and the programs on Slurm. What is missing is installed: Debian packages, which needs
    /// root, and Python packages in .native/.
    Fleet {
        /// Arguments for pytest.
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Build eqim-train with MPI, and test trainings that several processes share, also on Slurm. What is missing is
    /// installed: Debian packages, which needs root, and Open MPI in .native/.
    Mpi {
        /// Arguments for the test binary.
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Compile the library, the programs and their tests with Candle's CUDA kernels and with NCCL, and check them with Clippy. No
    /// GPU is needed: the CUDA compiler is installed in .native/cuda, and Open MPI in .native/mpi.
    CudaCheck,
    /// Make a folder with programs, fixtures and one command that check eqim on a machine with an NVIDIA GPU, and measure
    /// it there. No GPU is needed to make it: the CUDA compiler is installed in .native/cuda.
    Gpu {
        /// Checkout of drx-code/EquivariantModeling, to measure PyTorch on the same GPU.
        #[arg(long, value_name = "CHECKOUT")]
        reference: Option<PathBuf>,
        /// The folder to make.
        #[arg(short, long, value_name = "FOLDER", default_value = "gpu")]
        output: PathBuf,
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
        Task::Setup { training: false } => Ok(()),
        Task::Setup { training: true } => setup::efficientnet(root),
        Task::Demo => demo::demo(root),
        Task::Test { args } => {
            setup::efficientnet(root)?;
            test(root, &args)
        }
        Task::Clients { args } => clients::clients(root, &args),
        Task::Wheel { args } => wheel::wheel(root, &args),
        Task::Fleet { args } => wheel::fleet(root, &args),
        Task::Mpi { args } => mpi::mpi(root, &args),
        Task::CudaCheck => gpu::check(root),
        Task::Gpu { reference, output } => gpu::gpu(root, reference.as_deref(), &output),
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
