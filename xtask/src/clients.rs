//! `cargo xtask clients`: tests `eqim-serve` with the programs that people use.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::command::run;
use crate::{debian, demo, setup};

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
    debian::install(&PROGRAMS)?;
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
