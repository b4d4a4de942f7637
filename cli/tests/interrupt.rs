//! SIGINT and SIGTERM remove temporary folders and locks, while other threads go on writing them.
#![cfg(unix)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use eqim::files;
use eqim::lock::Lock;
use eqim::temporary::Temporary;

/// With this variable, the test program is a program that works in this folder until it is interrupted.
const FOLDER: &str = "EQIM_TEST_FOLDER";
const TEST: &str = "interrupts_remove_temporary_files";

/// Keeps a lock and writes files into a temporary folder for ever.
fn work(folder: &Path) {
    let _lock = Lock::beside(&folder.join("state")).unwrap();
    let place = Temporary::new(folder, 0o777).unwrap();
    std::fs::create_dir(place.path().join("deeper")).unwrap();
    println!("ready");
    for number in 0_u64.. {
        // Fails when the folder has been removed.
        let _ = files::write(&place.path().join(format!("deeper/{}", number % 100)), b"contents");
    }
}

#[test]
fn interrupts_remove_temporary_files() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        eqim_cli::main(|| {
            work(folder.as_ref());
            Ok(())
        });
    }
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let folder = tempfile::tempdir().unwrap();
        let mut program = Command::new(std::env::current_exe().unwrap());
        program.args(["--exact", TEST, "--nocapture"]).env(FOLDER, folder.path()).stdout(Stdio::piped());
        let mut program = program.spawn().unwrap();
        let lines = BufReader::new(program.stdout.take().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|line| line.ends_with("ready")), "the program has not started");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        assert!(Command::new("kill").args([signal, &program.id().to_string()]).status().unwrap().success());
        assert_eq!(program.wait().unwrap().code(), Some(code));
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
