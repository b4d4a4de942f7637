//! The help of every program and command.

use crate::common::bins::Workplace;

/// What a command prints for `--help`.
fn help(line: &str) -> String {
    Workplace::empty().run(&format!("{line} --help")).succeeded().stdout
}

#[test]
fn of_eqim_run() {
    insta::assert_snapshot!(help("eqim-run"));
}

#[test]
fn of_eqim_bench() {
    insta::assert_snapshot!(help("eqim-bench"));
}

#[test]
fn of_eqim_export() {
    let commands =
        ["eqim-export", "eqim-export onnx", "eqim-export calibrate", "eqim-export trt", "eqim-export inspect"];
    insta::assert_snapshot!(commands.map(help).join("\n"));
}

#[test]
fn of_eqim_train() {
    let commands = ["eqim-train", "eqim-train tokenizer", "eqim-train generator"];
    insta::assert_snapshot!(commands.map(help).join("\n"));
}
