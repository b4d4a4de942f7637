//! `cargo xtask gpu`: packs what a machine with an NVIDIA GPU needs to check eqim and to measure it. `cargo xtask cuda-check`:
//! checks the code with Candle's CUDA kernels, without a GPU.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::env::consts::{ARCH, OS};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::command::{capture, run};
use crate::mpi;
use crate::setup::{install, pip_install, remove, rename};

/// Pinned version of the CUDA compiler. cudarc 0.19 refuses newer toolkits than 13.4.
const CUDA: &str = "13.0.88";
/// The Python packages of the toolkit: the compiler, and the headers and libraries that Candle is linked with.
const PACKAGES: [&str; 8] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-nvrtc==13.0.88",
    "nvidia-cublas==13.0.2.14",
    "nvidia-curand==10.4.0.35",
];
/// The libraries that the linker looks for without a version.
const LINKED: [&str; 5] = ["cublas", "cublasLt", "cudart", "curand", "nvrtc"];
/// The oldest GPUs that the kernels are for: A100. The driver compiles them for newer ones.
const COMPUTE_CAPABILITY: &str = "80";
/// The programs and the tests that the folder has.
const PROGRAMS: [&str; 5] = ["eqim-bench", "eqim-export", "eqim-run", "parity", "suite"];
/// The version of timm that the reference needs. Its other packages are common ones, in any version.
const TIMM: &str = "timm==0.9.12";
/// The files of the repository that the folder has.
const FILES: [&str; 3] = ["assets/demo/model.safetensors", "tests/fixtures", "LICENSE"];

/// Makes the folder `output`, with the Python files of the checkout `reference`.
pub fn gpu(root: &Path, reference: Option<&Path>, output: &Path) -> Result<()> {
    if let Some(checkout) = reference.filter(|checkout| !checkout.join("generator/equ_modeling.py").is_file()) {
        bail!(
            "{} has no generator/equ_modeling.py: expected a checkout of drx-code/EquivariantModeling",
            checkout.display()
        );
    }
    let programs = build(root)?;

    println!("packing {}", output.display());
    let partial = output.with_extension("partial");
    remove(&partial)?;
    let any = |_: &Path| true;
    for file in FILES {
        copy(&root.join(file), &partial.join(file), &any)?;
    }
    copy(&root.join("xtask/gpu/run.py"), &partial.join("run.py"), &any)?;
    if let Some(checkout) = reference {
        let source = |file: &Path| file.extension().is_some_and(|extension| extension == "py");
        copy(checkout, &partial.join("reference"), &source)?;
        pip_install(&[TIMM], &partial.join("packages"), &["--no-deps", "--no-compile"])?;
    }
    pack(&programs, &partial)?;
    remove(output)?;
    rename(&partial, output)?;
    println!("copy {} to the machine with the GPU, and run there: python3 run.py", output.display());
    Ok(())
}

/// Compiles the library, the programs and their tests with Candle's CUDA kernels and with NCCL, and checks them with Clippy.
/// Nothing is linked.
pub fn check(root: &Path) -> Result<()> {
    // NCCL joins the GPUs of the processes of MPI.
    let mpi = mpi::folder(root)?;
    let mut clippy = cargo(root, "clippy", &[mpi.join("bin")])?;
    run(clippy.args(["--features", "eqim-programs/nccl", "--all-targets", "--", "-D", "warnings"]))
}

/// The folder of the CUDA toolkit, which is installed if it is missing.
fn toolkit(root: &Path) -> Result<PathBuf> {
    if (OS, ARCH) != ("linux", "x86_64") {
        bail!("this is {OS} on {ARCH}, expected linux on x86_64: the CUDA compiler is installed only there");
    }
    let folder = root.join(".native/cuda");
    install("the CUDA compiler", CUDA, &folder, unpack_toolkit)?;
    Ok(folder.join("toolkit"))
}

/// A command of Cargo for the packages with CUDA kernels, in target/cuda. Programs are also looked up in `folders`.
fn cargo(root: &Path, command: &str, folders: &[PathBuf]) -> Result<Command> {
    let toolkit = toolkit(root)?;
    let old = env::var_os("PATH").unwrap_or_default();
    let folders = folders.iter().cloned().chain([toolkit.join("bin")]).chain(env::split_paths(&old));
    let path = env::join_paths(folders).context("a folder of the variable PATH cannot be used")?;
    let mut cargo = Command::new("cargo");
    cargo
        .arg(command)
        .args("--release --target-dir target/cuda --features cuda".split(' '))
        .args("--package eqim --package eqim-programs --package eqim-training".split(' '))
        .env("PATH", path)
        .env("CUDA_HOME", &toolkit)
        .env("CUDA_COMPUTE_CAP", COMPUTE_CAPABILITY)
        .env("LIBRARY_PATH", toolkit.join("lib"))
        .current_dir(root);
    Ok(cargo)
}

/// Fills `folder` with the CUDA compiler and the libraries to link with.
fn unpack_toolkit(folder: &Path) -> Result<()> {
    let wheels = folder.join("wheels");
    pip_install(&PACKAGES, &wheels, &["--no-deps"])?;
    let toolkit = folder.join("toolkit");
    rename(&wheels.join("nvidia/cu13"), &toolkit)?;
    remove(&wheels)?;
    let libraries = toolkit.join("lib");
    for name in LINKED {
        let prefix = format!("lib{name}.so.");
        let files = fs::read_dir(&libraries).with_context(|| format!("{} cannot be read", libraries.display()))?;
        let names = files.filter_map(|file| Some(file.ok()?.file_name()));
        let library = names.into_iter().find(|file| file.to_string_lossy().starts_with(&prefix));
        let library = library.with_context(|| format!("{} has no {prefix}*", libraries.display()))?;
        symlink(&library, libraries.join(format!("lib{name}.so"))).with_context(|| format!("lib{name}.so"))?;
    }
    stub_driver(&toolkit)
}

/// Makes a library with the functions of the driver, which belongs to machines with a GPU. Each function returns
/// `CUDA_ERROR_STUB_LIBRARY`, as in the stubs of the CUDA toolkit.
fn stub_driver(toolkit: &Path) -> Result<()> {
    let header = toolkit.join("include/cuda.h");
    let header = fs::read_to_string(&header).with_context(|| format!("{} cannot be read", header.display()))?;
    let words = header.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    let is_function = |word: &&str| {
        word.strip_prefix("cu").is_some_and(|rest| rest.starts_with(|letter: char| letter.is_ascii_uppercase()))
    };
    let functions: BTreeSet<&str> = words.filter(is_function).collect();
    let source: String = functions.iter().map(|name| format!("int {name}(void) {{ return 34; }}\n")).collect();
    let stubs = toolkit.join("lib/stubs");
    fs::create_dir_all(&stubs).with_context(|| format!("{} cannot be made", stubs.display()))?;
    let file = stubs.join("cuda.c");
    fs::write(&file, source).with_context(|| format!("{} cannot be written", file.display()))?;
    run(Command::new("cc")
        .args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "cuda.c", "-o", "libcuda.so"])
        .current_dir(&stubs))?;
    symlink("libcuda.so", stubs.join("libcuda.so.1")).context("libcuda.so.1 cannot be linked")
}

/// Builds the programs and the tests with Candle's CUDA kernels. Returns their paths by name.
fn build(root: &Path) -> Result<BTreeMap<String, PathBuf>> {
    println!("building with CUDA in target/cuda; the first time takes 15 minutes on two cores");
    let output = capture(
        cargo(root, "build", &[])?
            .args("--bins --test suite --test parity --message-format json-render-diagnostics".split(' '))
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols"),
    )?;
    let messages = output.lines().map(|line| serde_json::from_str::<Value>(line).context("the output of Cargo"));
    let messages = messages.collect::<Result<Vec<_>>>()?;
    let executable = |message: &Value| {
        let path = PathBuf::from(message["executable"].as_str()?);
        Some((message["target"]["name"].as_str()?.to_string(), path))
    };
    Ok(messages.iter().filter_map(executable).collect())
}

/// Packs the [`PROGRAMS`] in `folder`.
fn pack(programs: &BTreeMap<String, PathBuf>, folder: &Path) -> Result<()> {
    let unpacked = folder.join("programs");
    for name in PROGRAMS {
        let program = programs.get(name).with_context(|| format!("Cargo built no {name}"))?;
        copy(program, &unpacked.join(name), &|_| true)?;
    }
    // The programs have most bytes in common: a window over several of them makes the archive three times smaller.
    run(Command::new("tar")
        .args([
            "--use-compress-program",
            "xz --lzma2=preset=6,dict=256MiB",
            "-cf",
            "programs.tar.xz",
            "-C",
            "programs",
            ".",
        ])
        .current_dir(folder))?;
    remove(&unpacked)
}

/// Copies a file, or the files of a folder that `wanted` selects.
fn copy(from: &Path, to: &Path, wanted: &dyn Fn(&Path) -> bool) -> Result<()> {
    if !from.is_dir() {
        if wanted(from) {
            let parent = to.parent().unwrap_or(to);
            fs::create_dir_all(parent).with_context(|| format!("{} cannot be made", parent.display()))?;
            fs::copy(from, to).with_context(|| format!("{} cannot be copied to {}", from.display(), to.display()))?;
        }
        return Ok(());
    }
    for entry in fs::read_dir(from).with_context(|| format!("{} cannot be read", from.display()))? {
        let entry = entry.with_context(|| format!("{} cannot be read", from.display()))?;
        copy(&entry.path(), &to.join(entry.file_name()), wanted)?;
    }
    Ok(())
}
