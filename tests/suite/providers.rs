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

/// Compares the runs of the fixtures with the reference, and images of several lengths in one batch with those alone. The
/// images of the fixtures are compared if the tolerance is that of the CPU.
fn samples_what_the_reference_does(providers: &str, tolerance: Tolerance, run: impl Fn(&Workplace, &str) -> Finished) {
    for fixture in all() {
        let place = Workplace::with_bundle(&fixture);
        for name in fixture.runs().iter().filter(|name| *name != "outpaint") {
            let seed = &fixture.meta["sampling"][name]["seed"];
            let line = format!("{} --seed {seed} --save-tokens saved.safetensors -o out.png", run_line(&fixture, name));
            let finished = run(&place, &format!("{line} {providers} --json")).succeeded();
            assert!(report(&finished)["backend"].as_str().unwrap().starts_with("ONNX Runtime with"));
            let tokens = place.tensor("saved.safetensors", "tokens");
            assert_tensor(&fixture, &format!("{name}/tokens"), &tokens, tolerance);
            if tolerance == Tolerance::SAMPLING {
                images_are_close(&place, &fixture, name, tokens.dim(0).unwrap());
            }
        }
    }
    // The longer image keeps its caches when the shorter one ends.
    let place = Workplace::with_bundle(&first());
    let job =
        |id: &str, tokens: usize| format!("{{\"id\": \"{id}\", \"class\": 1, \"seed\": 3, \"tokens\": {tokens}}}\n");
    place.write("jobs.jsonl", job("long", 9) + &job("short", 4));
    run(&place, &format!("eqim-run --engine bundle --cfg 2 --steps 5 --jobs jobs.jsonl -o images {providers}"))
        .succeeded();
    let line = "eqim-run --engine bundle --cfg 2 --steps 5 --class 1 --seed 3 --tokens 9 --backend candle -o long.png";
    place.run(line).succeeded();
    let [found, expected] =
        ["images/long.png", "long.png"].map(|name| image::open(place.path(name)).unwrap().to_rgb8().into_raw());
    assert_eq!(found.len(), expected.len());
    let levels = found.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(levels <= Some(1), "differs by {levels:?} levels");
}

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no library with OpenVINO to install"
)]
fn openvino_samples_what_the_reference_does() {
    samples_what_the_reference_does("--provider openvino", Tolerance::SAMPLING, |place, line| {
        let finished = run(place, line);
        // No node runs on the CPU's own kernels: each would be named.
        assert!(!finished.stderr.contains("the CPU runs"), "{}", finished.stderr);
        finished
    });
}

/// With caches in the memory of the device. WebGPU allows exponentials and sines of less precision than the CPU's.
/// Measured with SwiftShader, a Vulkan driver for the CPU: at most 2.4e-4 after a complete run. The decoder of ONNX Runtime
/// 1.27.0 gave wrong images there for one run of the second fixture, from the right tokens.
#[test]
#[ignore = "needs a GPU, or a Vulkan driver for the CPU, and ORT_DYLIB_PATH with the library of onnxruntime-webgpu"]
fn webgpu_samples_what_the_reference_does() {
    let tolerance = Tolerance { name: "WebGPU", limit: 5e-4, ..Tolerance::SAMPLING };
    samples_what_the_reference_does("--provider webgpu --provider cpu", tolerance, Workplace::run);
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

#[test]
fn no_statistics_of_the_use_are_kept_or_sent() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    std::fs::create_dir(place.path("home")).unwrap();
    let home = place.path("home").display().to_string();
    let variables = [("HOME", home.as_str()), ("XDG_CACHE_HOME", &home), ("ORT_DISABLE_TELEMETRY", "0")];
    place.run_with("eqim-run --engine bundle --backend ort --tokens 4 --steps 1 -o out.png", &variables).succeeded();
    assert_eq!(place.listing_of("home"), [""; 0]);
}
