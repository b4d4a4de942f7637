//! The corpus, and ten thousand mutations. `cargo run --release -p eqim-fuzz` tries a million.

use std::path::Path;
use std::sync::Mutex;

use eqim::Error;
use eqim_fuzz::runner::{Guard, MOST_MEMORY, text};
use eqim_fuzz::target::{Hostile, Target};
use eqim_fuzz::targets;

/// The memory of the process is measured, so one test runs at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Mutations of all readers together.
const CASES: u64 = 10_000;

#[test]
fn hostile_and_mutated_inputs_are_read_or_refused() {
    let _alone = ALONE.lock();
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    let guard = Guard::new(&kept).unwrap();
    let mut all = targets::all().unwrap();
    let each = CASES.div_ceil(all.len() as u64);
    let reports: Vec<_> =
        all.iter_mut().map(|target| guard.run(target.as_mut(), 1, 0..each, &mut |_| {}).unwrap()).collect();
    println!("{}", text(&reports));
    assert!(reports.iter().all(|report| report.faults.is_empty()), "{}", text(&reports));
    // A target whose mutations are all accepted, or all refused, tests nothing.
    for report in &reports {
        assert!(0 < report.accepted && report.accepted < report.cases, "{report:?}");
    }
}

/// A reader with a fault for each first byte of its input.
struct Wrong(std::path::PathBuf);

impl Target for Wrong {
    fn name(&self) -> &'static str {
        "wrong"
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        vec![b"seed".to_vec()]
    }

    fn hostile(&self) -> Vec<Hostile> {
        ["panic", "changed", "run", "unnamed", "memory", "refused"].map(|name| (name, name.as_bytes().to_vec())).into()
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.0)
    }

    fn read(&mut self, input: &[u8]) -> eqim::Result<String> {
        match input {
            b"panic" => panic!("a fault"),
            b"run" => Err(Error::run("file", "failed")),
            b"unnamed" => Err(Error::input("something", "is wrong")),
            b"memory" => {
                let filled = vec![1u8; MOST_MEMORY as usize + (64 << 20)];
                Ok(format!("seed{}", filled[filled.len() / 2] - 1))
            }
            b"refused" => Err(Error::input("file", "is wrong")),
            _ => Ok(format!("{}0", String::from_utf8_lossy(input))),
        }
    }

    fn is_sealed(&self) -> bool {
        true
    }
}

#[test]
fn readers_that_are_wrong_are_found() {
    let _alone = ALONE.lock();
    let kept = tempfile::tempdir().unwrap();
    let report = Guard::new(kept.path()).unwrap().run(&mut Wrong("file".into()), 0, 0..0, &mut |_| {}).unwrap();
    let problems = ["panicked: a fault", "its contents were changed", "exit code 1", "without its file", "took 1.6 GB"];
    assert_eq!(report.faults.len(), problems.len(), "{:?}", report.faults);
    for (fault, problem) in report.faults.iter().zip(problems) {
        assert!(fault.contains(problem), "{fault}");
    }
    assert_eq!(std::fs::read(kept.path().join("wrong-changed")).unwrap(), b"changed");
}
