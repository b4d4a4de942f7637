//! Programs from Debian's packages.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::run;

/// Installs the Debian packages of programs that are missing. `programs` has their names and packages.
pub fn install(programs: &[(&str, &str)]) -> Result<()> {
    // Daemons are in a folder that is not in the path of every user.
    let paths = env::var_os("PATH").unwrap_or_default();
    let has = |folder: &Path, program: &str| folder.join(program).is_file();
    let is_missing = |program: &str| {
        !has(Path::new("/usr/sbin"), program) && !env::split_paths(&paths).any(|folder| has(&folder, program))
    };
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
            bail!("{program} is not found, though the Debian package {package} is installed")
        }
        None => Ok(()),
    }
}
