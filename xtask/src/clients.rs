//! `cargo xtask clients`: tests `eqim-serve` with the programs that people use.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::run;
use crate::{demo, setup};

/// The programs that the tests start, and their Debian packages.
const PROGRAMS: [(&str, &str); 5] = [
    ("chromium", "chromium"),
    ("curl", "curl"),
    ("nginx", "nginx-light"),
    ("openssl", "openssl"),
    ("systemd-analyze", "systemd"),
];
/// Pinned versions of the Python packages.
const PACKAGES: [&str; 3] = ["openai==3.57.0", "playwright==1.65.2", "pytest==9.2.0"];

/// Exports the demo model, installs the clients, and runs `tests/clients`.
pub fn clients(root: &Path, args: &[String]) -> Result<()> {
    if !root.join("demo/bundle").exists() {
        demo::demo(root)?;
    }
    install_programs()?;
    let packages = root.join(".native/clients");
    setup::install("clients", &PACKAGES.join(" "), &packages, |partial| setup::pip_install(&PACKAGES, partial, &[]))?;
    println!("testing eqim-serve with its clients");
    run(Command::new("python3")
        .args(["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/clients"])
        .args(args)
        .env("PYTHONPATH", packages)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("EQIM_PROGRAMS", demo::programs()?)
        .current_dir(root))
}

/// Installs the Debian packages of programs that are missing.
fn install_programs() -> Result<()> {
    let is_missing = |program: &str| Command::new(program).arg("--version").output().is_err();
    let missing: Vec<&str> =
        PROGRAMS.iter().filter(|(program, _)| is_missing(program)).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("installing {}", missing.join(" "));
    let by_hand = || format!("the Debian packages {} are missing: install them as root", missing.join(" "));
    let apt = |args: &[&str]| {
        run(Command::new("apt-get")
            .args(["-qq", "-o", "DPkg::Lock::Timeout=300"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive"))
    };
    apt(&["update"])
        .and_then(|()| apt(&[&["install", "--yes", "--no-install-recommends"], &missing[..]].concat()))
        .with_context(by_hand)?;
    match PROGRAMS.iter().find(|(program, _)| is_missing(program)) {
        Some((program, package)) => {
            bail!("{program} cannot be started, though the Debian package {package} is installed")
        }
        None => Ok(()),
    }
}
