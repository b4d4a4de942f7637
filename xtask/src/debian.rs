//! Programs from Debian's packages.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::run;

/// Installs the Debian packages of programs that cannot be started. `programs` has their names and packages.
pub fn install(programs: &[(&str, &str)]) -> Result<()> {
    let is_missing = |program: &str| Command::new(program).arg("--version").output().is_err();
    let missing: Vec<&str> =
        programs.iter().filter(|(program, _)| is_missing(program)).map(|(_, package)| *package).collect();
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
    match programs.iter().find(|(program, _)| is_missing(program)) {
        Some((program, package)) => {
            bail!("{program} cannot be started, though the Debian package {package} is installed")
        }
        None => Ok(()),
    }
}
