//! What programs print: the help of every command, and the report of a run.

use crate::common::bins::Workplace;
use crate::common::{Fixture, VARYING, fixtures};

/// What a command prints for `--help`.
fn help(line: &str) -> String {
    Workplace::empty().run(&format!("{line} --help")).succeeded().stdout
}

#[test]
fn help_of_eqim_run() {
    insta::assert_snapshot!(help("eqim-run"));
}

#[test]
fn help_of_eqim_bench() {
    insta::assert_snapshot!(help("eqim-bench"));
}

#[test]
fn help_of_eqim_export() {
    let commands =
        ["eqim-export", "eqim-export onnx", "eqim-export calibrate", "eqim-export trt", "eqim-export inspect"];
    insta::assert_snapshot!(commands.map(help).join("\n"));
}

#[test]
fn help_of_eqim_eval() {
    let commands = ["eqim-eval", "eqim-eval compare", "eqim-eval bundle", "eqim-eval features", "eqim-eval drift"];
    insta::assert_snapshot!(commands.map(help).join("\n"));
}

#[test]
fn help_of_eqim_serve() {
    insta::assert_snapshot!(help("eqim-serve"));
}

#[test]
fn help_of_eqim_train() {
    let commands = ["eqim-train", "eqim-train tokenizer", "eqim-train generator"];
    insta::assert_snapshot!(commands.map(help).join("\n"));
}

#[test]
fn report_of_a_run() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    let run = place.run("eqim-run --engine bundle --class 0,1 --cfg 2 --tokens 9 -o image.png").succeeded();
    insta::with_settings!({filters => VARYING}, { insta::assert_snapshot!(run.stdout) });
}
