//! The corpus, and ten thousand mutations. `cargo run --release -p eqim-fuzz` tries a million.

use eqim_fuzz::runner::{Guard, text};
use eqim_fuzz::targets;

/// Mutations of all readers together.
const CASES: u64 = 10_000;

#[test]
fn hostile_and_mutated_inputs_are_read_or_refused() {
    let kept = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
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
