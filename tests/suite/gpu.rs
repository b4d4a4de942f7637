//! The script of `cargo xtask gpu`, on the CPU, with programs that are built without CUDA.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::{Command, Output};

use serde_json::Value;

use crate::common::bins::{Workplace, program};
use crate::common::{all, file};

/// The folder that `cargo xtask gpu` makes, with unpacked programs.
fn folder() -> Workplace {
    let place = Workplace::empty();
    for folder in ["programs", "assets/demo", "tests"] {
        fs::create_dir_all(place.path(folder)).unwrap();
    }
    for name in ["eqim-bench", "eqim-export"] {
        symlink(program(name), place.path("programs").join(name)).unwrap();
    }
    symlink(std::env::current_exe().unwrap(), place.path("programs/suite")).unwrap();
    for name in ["assets/demo/model.safetensors", "tests/fixtures"] {
        symlink(file(name), place.path(name)).unwrap();
    }
    fs::copy(file("xtask/gpu/run.py"), place.path("run.py")).unwrap();
    place
}

fn run(place: &Workplace, arguments: &[&str]) -> (Output, Value) {
    let mut python = Command::new("python3");
    let output = python.arg(place.path("run.py")).args(arguments).output().unwrap();
    let results =
        fs::read(place.path("results.json")).map_or(Value::Null, |text| serde_json::from_slice(&text).unwrap());
    (output, results)
}

#[test]
fn the_checks_for_a_gpu_pass_on_the_cpu() {
    let place = folder();
    let (output, results) = run(&place, &["--device", "cpu", "--only", "parity", "demo", "image"]);
    assert!(output.status.success(), "{output:?}");
    let steps = &results["steps"];

    let tests = steps["parity"]["result"].as_object().unwrap();
    assert!(tests.len() >= 10, "{tests:?}");
    let largest = |name: &str| tests[name]["largest_difference"].as_f64().unwrap();
    for name in ["parity::flow_head", "parity::teacher_forced_transformer", "parity::tokenizer_both_ways"] {
        assert!(largest(name) > 0.0 && largest(name) < 1e-5, "{name}: {}", largest(name));
    }
    let bench = &steps["demo"]["result"]["report"]["cases"][0]["results"];
    assert_eq!(bench[1]["agreement"]["agrees"], true, "{bench}");
    assert_eq!(steps["image"]["status"], "skipped");

    let report = fs::read_to_string(place.path("results.md")).unwrap();
    for part in ["## parity: passed", "| `parity::flow_head` | ", "## demo: passed", "cargo xtask gpu --reference"] {
        assert!(report.contains(part), "no {part} in {report}");
    }
}

#[test]
fn a_failed_check_for_a_gpu_is_reported() {
    let place = folder();
    fs::remove_file(place.path("tests/fixtures")).unwrap();
    let (output, results) = run(&place, &["--device", "cpu", "--only", "parity"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let step = &results["steps"]["parity"];
    assert_eq!(step["status"], "failed");
    let reason = step["reason"].as_str().unwrap();
    assert!(reason.contains("tests failed") && reason.contains("parity::flow_head"), "{reason}");
    assert!(fs::read_to_string(place.path("results.md")).unwrap().contains("## parity: failed"));
}

#[test]
fn devices_that_cannot_be_used_are_refused() {
    let place = Workplace::with_bundle(&all()[0]);
    let line = "eqim-run --engine bundle --class 1";
    place.run(&format!("{line} --device cpu --tokens 2 --steps 1 --json")).succeeded();
    for options in [
        "--device cuda:0",
        "--device gpu",
        "--device cuda:0 --backend ort",
        "--device cpu --provider cpu",
        "--device cpu --backend trt",
    ] {
        place.refused(&format!("{line} {options} -o other.png"));
    }
    place.refused("eqim-bench --engine bundle --device cuda:first");
    insta::assert_snapshot!(place.messages());
}
