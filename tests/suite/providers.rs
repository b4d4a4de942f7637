//! Execution providers of ONNX Runtime: OpenVINO on the CPU, and the errors of those that this machine does not have.

use eqim::close::Tolerance;
use serde_json::Value;

use crate::common::bins::{Finished, Workplace, export_line};
use crate::common::{Fixture, all, assert_tensor, file, fixtures};
use crate::end_to_end::{images_are_close, run_line};
use crate::int8;

/// Runs a program on the library of ONNX Runtime with OpenVINO.
fn run(place: &Workplace, line: &str) -> Finished {
    let library = file(".native/openvino/libonnxruntime.so.1.24.1");
    assert!(library.is_file(), "no {}: run `cargo xtask setup`", library.display());
    place.run_with(line, &[("ORT_DYLIB_PATH", library.to_str().unwrap())])
}

fn first() -> Fixture {
    Fixture::open(fixtures())
}

/// The report of a run as JSON.
fn report(finished: &Finished) -> Value {
    serde_json::from_str(&finished.stdout).unwrap()
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no library with OpenVINO to install"
)]
fn openvino_samples_what_the_reference_does() {
    for fixture in all() {
        let place = Workplace::with_bundle(&fixture);
        for name in fixture.runs().iter().filter(|name| *name != "outpaint") {
            let seed = &fixture.meta["sampling"][name]["seed"];
            let line = format!("{} --seed {seed} --save-tokens saved.safetensors -o out.png", run_line(&fixture, name));
            let finished = run(&place, &format!("{line} --provider openvino --json")).succeeded();
            assert_eq!(report(&finished)["backend"], "ONNX Runtime with openvino");
            // No node runs on the CPU's own kernels: each would be named.
            assert!(!finished.stderr.contains("the CPU runs"), "{}", finished.stderr);
            let tokens = place.tensor("saved.safetensors", "tokens");
            assert_tensor(&fixture, &format!("{name}/tokens"), &tokens, Tolerance::SAMPLING);
            images_are_close(&place, &fixture, name, tokens.dim(0).unwrap());
        }
    }
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no library with OpenVINO to install"
)]
fn nodes_run_on_the_cpu_only_if_it_is_named() {
    let place = int8::place(&first());
    let line = format!("{} --int8 --int8-target cpu --calibration table.json --no-validate", export_line(&first()));
    place.run(&format!("{line} -o int8")).succeeded();
    let line = "eqim-run --engine int8 --backend ort --tokens 4 --save-tokens saved.safetensors -o out.png";
    let refused = run(&place, &format!("{line} --provider openvino")).failed(2, &["name cpu as the last provider"]);
    assert!(refused.stderr.contains("QLinearConv") || refused.stderr.contains("MatMulInteger"), "{}", refused.stderr);
    assert!(!place.path("out.png").exists());

    let both = run(&place, &format!("{line} --provider openvino --provider cpu --json")).succeeded();
    assert!(both.stderr.contains("decoder.onnx: the CPU runs"), "{}", both.stderr);
    assert_eq!(report(&both)["backend"], "ONNX Runtime with openvino and cpu");
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no library with OpenVINO to install"
)]
fn providers_that_cannot_be_used_are_refused() {
    let place = Workplace::with_bundle(&first());
    place.write("text.so", "This is no library.\n");
    let line = "eqim-run --engine bundle --tokens 4 -o out.png";
    for provider in [
        "cuda", "rocm", "migraphx", "openvino", "coreml", "directml", "xnnpack", "webgpu", "nvrtx", "tpu", "cpu:1",
        "cuda,a=",
    ] {
        place.refused(&format!("{line} --provider {provider}"));
    }
    for options in [
        "--provider cpu --provider openvino",
        "--provider cuda --provider cuda:1",
        "--provider openvino --provider-library missing.so",
        "--provider openvino --provider-library text.so",
        "--provider cpu --provider-library text.so",
        "--provider-library text.so",
        "--provider openvino --backend candle",
        "--provider openvino --backend trt",
    ] {
        place.refused(&format!("{line} {options}"));
    }
    place.refused("eqim-bench --engine bundle --provider openvino");
    insta::assert_snapshot!(place.messages());

    // Options and devices that OpenVINO does not know.
    run(&place, &format!("{line} --provider openvino:GPU")).failed(1, &["provider openvino:GPU"]);
    run(&place, &format!("{line} --provider openvino,speed=9")).failed(1, &["provider openvino,speed=9"]);
    assert!(!place.path("out.png").exists());
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no library with OpenVINO to install"
)]
fn benchmarks_run_on_a_provider() {
    let place = Workplace::with_bundle(&first());
    let line = "eqim-bench --engine bundle --tokens 4 --warmUp 0 --duration 0 --iterations 1 --provider openvino";
    let finished = run(&place, &format!("{line} --reference --export-json bench.json")).succeeded();
    assert!(finished.stdout.contains("openvino"), "{}", finished.stdout);
}
