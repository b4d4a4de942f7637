//! `eqim-bench`, on the fixture: that it measures what it says, not how long it takes.

mod common;

use common::bins::Workplace;
use common::{Fixture, fixtures};
use serde_json::Value;

fn workplace() -> Workplace {
    Workplace::with_bundle(&Fixture::open(fixtures()))
}

fn json(place: &Workplace) -> Value {
    serde_json::from_slice(&place.read("bench.json")).unwrap()
}

const QUICK: &str = "--duration 0 --iterations 2 --warmUp 0 --export-json bench.json";

#[test]
fn images_stage_by_stage_beside_the_reference() {
    let place = workplace();
    let line = format!("eqim-bench --engine bundle --reference --tokens 4,6 --batch 1,3 --cfg 3 {QUICK}");
    let run = place.run(&format!("{line} --export-markdown bench.md")).succeeded();
    assert!(run.stdout.contains("=== Performance summary: bundle on ONNX Runtime ==="), "{}", run.stdout);
    assert!(run.stdout.contains("GFLOP/s in FP32") && run.stdout.contains("times as fast"), "{}", run.stdout);

    let report = json(&place);
    let cases = report["cases"].as_array().unwrap();
    let sizes: Vec<(u64, u64)> =
        cases.iter().map(|case| (case["batch"].as_u64().unwrap(), case["tokens"].as_u64().unwrap())).collect();
    assert_eq!(sizes, [(1, 4), (1, 6), (3, 4), (3, 6)]);
    for (case, (batch, tokens)) in cases.iter().zip(sizes) {
        let [reference, bundle] = case["results"].as_array().unwrap().as_slice() else { panic!("{case}") };
        assert_eq!((&reference["is_reference"], &bundle["is_reference"]), (&true.into(), &false.into()));
        assert!(bundle["agreement"]["largest"].as_f64().unwrap() <= 1e-4, "{bundle}");
        assert!(bundle["ratio"].as_f64().unwrap() > 0.0);
        let stages = bundle["stages"].as_array().unwrap();
        let calls: Vec<(&str, f64)> =
            stages.iter().map(|stage| (stage["stage"].as_str().unwrap(), stage["calls"].as_f64().unwrap())).collect();
        let (n, images) = (tokens as f64, batch as f64);
        let expected = [("prefill", 1.0), ("transformer_step", n - 1.0), ("flow_sampler", n), ("decoder", images)];
        assert_eq!(calls, expected);
        // The whole is not less than its parts.
        let parts: f64 =
            stages.iter().map(|stage| stage["call"]["min"].as_f64().unwrap() * stage["calls"].as_f64().unwrap()).sum();
        assert!(bundle["batch"]["max"].as_f64().unwrap() >= parts, "{bundle}");
        for stage in stages {
            let effort = &stage["effort"];
            assert!(
                ["bytes", "multiply_adds", "limit"].iter().all(|key| effort[key].as_f64().unwrap() > 0.0),
                "{stage}"
            );
        }
    }
    let markdown = String::from_utf8(place.read("bench.md")).unwrap();
    assert_eq!(markdown.matches("| stage | calls |").count(), 4, "{markdown}");
}

#[test]
fn the_last_tokens_of_a_long_image() {
    let place = workplace();
    place.run(&format!("eqim-bench --engine bundle --reference --tokens 30 --tail 3 --cfg 3 {QUICK}")).succeeded();
    let report = json(&place);
    let case = &report["cases"][0];
    assert_eq!(case["generated"], 3);
    for result in case["results"].as_array().unwrap() {
        let calls: Vec<f64> =
            result["stages"].as_array().unwrap().iter().map(|stage| stage["calls"].as_f64().unwrap()).collect();
        assert_eq!(calls, [3.0, 3.0], "{result}");
    }
}

#[test]
fn one_stage_by_itself() {
    let place = workplace();
    for (stage, name) in
        [("prefill", "prefill"), ("step", "transformer_step"), ("flow", "flow_sampler"), ("decode", "decoder")]
    {
        place.run(&format!("eqim-bench --engine bundle --stage {stage} --batch 2 {QUICK}")).succeeded();
        let report = json(&place);
        let stages = report["cases"][0]["results"][0]["stages"].as_array().unwrap();
        assert_eq!((stages.len(), &stages[0]["stage"]), (1, &name.into()));
        assert!(stages[0]["call"]["count"].as_u64().unwrap() >= 2);
    }
    place.run(&format!("eqim-bench --engine bundle --stage flow --threads 1,2 {QUICK}")).succeeded();
    let report = json(&place);
    let names = report["cases"][0]["results"].as_array().unwrap().iter().map(|result| result["name"].as_str().unwrap());
    assert_eq!(names.collect::<Vec<_>>(), [1, 2].map(|n| format!("bundle on ONNX Runtime, {n} threads")));
}

#[test]
fn solvers_come_closer_with_every_evaluation() {
    let place = workplace();
    let run = place.run(&format!("eqim-bench --engine bundle --solvers --tokens 4 --cfg 2 {QUICK}")).succeeded();
    assert!(run.stdout.contains("| solver | steps | evaluations |"), "{}", run.stdout);
    let report = json(&place);
    let solved = report["solvers"].as_array().unwrap();
    for solver in ["euler", "midpoint", "heun", "ab2", "dpm2"] {
        let distances: Vec<f64> = solved
            .iter()
            .filter(|solved| solved["solver"] == solver)
            .map(|solved| solved["tokens"].as_f64().unwrap())
            .collect();
        assert!(distances.len() >= 6 && distances.last() < distances.first(), "{solver}: {distances:?}");
    }
    let at = |solver: &str, evaluations: u64| {
        let found = solved.iter().find(|it| it["solver"] == solver && it["evaluations"] == evaluations);
        found.unwrap()["tokens"].as_f64().unwrap()
    };
    assert!(at("ab2", 50) < at("euler", 50));
}

#[test]
fn tokens_that_differ_have_no_ratio() {
    let place = workplace();
    // Two steps of Euler's method are far from the reference's own number of them.
    let run = place.run(&format!("eqim-bench --engine bundle --reference --solver ab2 --steps 1 --cfg 3 {QUICK}"));
    assert!(run.stdout.contains("no ratio"), "{}", run.stdout);
    run.failed(1, &["its tokens are not those"]);
    assert!(json(&place)["cases"][0]["results"][1]["ratio"].is_null());
}

#[test]
fn lines_that_cannot_be_measured_are_refused() {
    let place = workplace();
    place.write("not-python", "");
    for (line, mentions) in [
        ("--engine missing", &["missing"][..]),
        ("", &["--engine"]),
        ("--engine bundle --tokens 1", &["--tokens"]),
        ("--engine bundle --batch 0", &["--batch"]),
        ("--engine bundle --tokens 4 --tail 4", &["--tail"]),
        ("--engine bundle --percentile 101", &["--percentile"]),
        ("--engine bundle --pytorch .", &["--python"]),
        ("--engine bundle --pytorch . --python python3", &["--pytorch .", "equ_modeling.py"]),
        ("--engine bundle --stage flow --reference", &["--reference"]),
    ] {
        place.refused(format!("eqim-bench {line}").trim_end(), mentions);
    }
}
