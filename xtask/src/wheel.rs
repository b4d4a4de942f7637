//! `cargo xtask wheel` and `cargo xtask fleet`: the Python package, and its tests.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::run;
use crate::{debian, demo, setup};

/// Builds the wheel.
const MATURIN: &str = "maturin==1.16.0";
/// Where the wheel is put.
const WHEELS: &str = "target/wheels";
/// Largest size of the wheel in bytes.
const MOST_BYTES: u64 = 40_000_000;
/// The oldest version of Python 3 that the package is for.
const OLDEST_PYTHON: u32 = 10;
/// The packages of the tests.
const TESTS: [&str; 3] = ["pillow>=12", "pytest>=9", "tqdm==4.70.1"];
/// The packages of the tests that run on the newest Python only.
const NEWEST: [&str; 4] = ["ipykernel==7.4.0", "mypy==2.4.1", "nbclient==0.11.0", "pyarrow==26.0.1"];
/// The oldest and the newest NumPy.
const NUMPY: [&str; 2] = ["numpy==1.26.4", "numpy>=2"];
/// The programs of Slurm and their Debian packages.
pub const SLURM: [(&str, &str); 4] =
    [("munged", "munge"), ("sbatch", "slurm-client"), ("slurmctld", "slurmctld"), ("slurmd", "slurmd")];
/// Runs the tests of fleets.
pub const PYTEST: &str = "pytest==9.2.0";
/// The packages of the tests of fleets.
const FLEET: [&str; 4] = ["pandas==3.1.1", "pyarrow==26.0.1", PYTEST, "ray[data,serve]==2.60.0"];

/// Builds the wheel, and tests it with the oldest and the newest Python at hand.
pub fn wheel(root: &Path, args: &[String]) -> Result<()> {
    let wheel = build(root)?;
    let pythons = pythons()?;
    let (Some(oldest), Some(newest)) = (pythons.first(), pythons.last()) else {
        bail!("no Python from 3.{OLDEST_PYTHON} on was found: install one");
    };
    for ((minor, python), numpy) in [oldest, newest].into_iter().zip(NUMPY) {
        println!("testing {} with Python 3.{minor} and {numpy}", wheel.display());
        let folder = root.join(format!("target/python-3.{minor}"));
        setup::remove(&folder)?;
        let is_newest = numpy == NUMPY[1];
        let packages = if is_newest { [&TESTS[..], &NEWEST].concat() } else { TESTS.to_vec() };
        environment(python, &folder, &[&packages[..], &[numpy, &wheel.display().to_string()]].concat())?;
        let mut tests = test(root, &folder, "tests/python")?;
        if !is_newest {
            tests.args(["-m", "not newest"]);
        }
        // No ONNX Runtime that eqim can use is in a package for the oldest Python.
        if *minor == OLDEST_PYTHON {
            tests.env("ORT_DYLIB_PATH", setup::onnxruntime(root)?);
        }
        run(tests.args(args))?;
        if is_newest {
            run(&mut test(root, &folder, "tests/photos")?)?;
        }
    }
    Ok(())
}

/// Builds the wheel, and runs the tests of fleets: Ray and Slurm.
pub fn fleet(root: &Path, args: &[String]) -> Result<()> {
    let wheel = build(root)?;
    debian::install(&SLURM)?;
    let pythons = pythons()?;
    let (minor, python) = pythons.last().context("no Python was found")?;
    let folder = root.join(".native/fleet");
    setup::install("fleet", &format!("3.{minor} {}", FLEET.join(" ")), &folder, |partial| {
        environment(python, partial, &FLEET)
    })?;
    let name = wheel.display().to_string();
    run(pip(&folder).args(["install", "--quiet", "--no-deps", "--force-reinstall", &name]))?;
    run(test(root, &folder, "tests/fleet")?.args(args))
}

/// Builds the wheel. Returns its path.
fn build(root: &Path) -> Result<PathBuf> {
    if !root.join("demo/bundle").exists() {
        demo::demo(root)?;
    }
    let maturin = root.join(".native/maturin");
    setup::install("maturin", MATURIN, &maturin, |partial| setup::pip_install(&[MATURIN], partial, &[]))?;
    println!("building the wheel in {WHEELS}");
    let wheels = root.join(WHEELS);
    setup::remove(&wheels)?;
    run(Command::new(maturin.join("bin/maturin"))
        .args("build --release --locked --features unified".split(' '))
        .args(setup::features())
        .args(["--compatibility", "pypi", "--manifest-path", "python/Cargo.toml", "--out", WHEELS])
        .current_dir(root))?;
    let files = fs::read_dir(&wheels).with_context(|| format!("{} cannot be read", wheels.display()))?;
    let mut files = files.filter_map(|file| Some(file.ok()?.path()));
    let wheel = files.find(|file| file.extension().is_some_and(|it| it == "whl")).context("maturin built no wheel")?;
    let bytes = wheel.metadata().with_context(|| format!("{} cannot be read", wheel.display()))?.len();
    if bytes > MOST_BYTES {
        bail!("{} has {bytes} bytes, expected at most {MOST_BYTES}", wheel.display());
    }
    Ok(wheel)
}

/// The versions of Python 3 at hand that the package is for, the oldest first: their minor numbers and programs.
fn pythons() -> Result<Vec<(u32, PathBuf)>> {
    let mut candidates: Vec<PathBuf> =
        (OLDEST_PYTHON..OLDEST_PYTHON + 20).map(|it| format!("python3.{it}").into()).collect();
    candidates.push("python3".into());
    if let Some(home) = env::home_dir() {
        let versions = fs::read_dir(home.join(".pyenv/versions")).into_iter().flatten().flatten();
        candidates.extend(versions.map(|version| version.path().join("bin/python3")));
    }
    let minor = |python: &PathBuf| {
        let output =
            Command::new(python).args(["-c", "import sys, venv; print(sys.version_info.minor)"]).output().ok()?;
        String::from_utf8(output.stdout).ok()?.trim().parse::<u32>().ok().filter(|_| output.status.success())
    };
    let mut found: Vec<(u32, PathBuf)> = candidates.into_iter().filter_map(|it| Some((minor(&it)?, it))).collect();
    found.retain(|(minor, _)| *minor >= OLDEST_PYTHON);
    found.sort();
    found.dedup_by_key(|(minor, _)| *minor);
    Ok(found)
}

/// Makes a virtual environment with packages.
pub fn environment(python: &Path, folder: &Path, packages: &[&str]) -> Result<()> {
    run(Command::new(python).args(["-m", "venv"]).arg(folder))?;
    run(pip(folder).args(["install", "--quiet", "--only-binary=:all:"]).args(packages))
}

/// The program pip of a virtual environment.
fn pip(folder: &Path) -> Command {
    let mut command = Command::new(folder.join("bin/python"));
    command.args(["-m", "pip"]).env("PIP_DISABLE_PIP_VERSION_CHECK", "1");
    command
}

/// The command that runs tests in a virtual environment.
pub fn test(root: &Path, folder: &Path, tests: &str) -> Result<Command> {
    let mut command = Command::new(folder.join("bin/python"));
    command
        .args(["-m", "pytest", "-q", "-p", "no:cacheprovider", tests])
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("EQIM_PROGRAMS", demo::programs()?)
        .current_dir(root);
    Ok(command)
}
