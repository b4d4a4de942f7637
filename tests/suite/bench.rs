//! `eqim-bench` on the fixture. The tests check what it measures and reports, not the times.

use candle_core::{Device, Tensor};
use eqim::checkpoint::WeightSet;
use eqim::close::Tolerance;
use eqim::engine::Engine;
use eqim::engine::candle::{to_array, to_tensor};
use eqim::model::{flow, transformer};
use eqim::ops::eager::Eager;
use eqim::picture::{Side, read};
use eqim::request::random::TorchRng;
use image::RgbImage;
use ndarray::{Array2, Array3, Axis, s};
use serde_json::Value;

use crate::common::bins::{Workplace, export_line};
use crate::common::{Fixture, MEMORY, VARYING, fixtures};

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
    insta::with_settings!({filters => VARYING}, { insta::assert_snapshot!(run.stdout) });
    insta::with_settings!({filters => VARYING}, { insta::assert_snapshot!(String::from_utf8(place.read("bench.md")).unwrap()) });

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
        // The time of the whole is not less than the sum of its parts.
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
    insta::with_settings!({filters => VARYING}, { insta::assert_snapshot!(run.stdout) });
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
fn time_and_distance_of_all_candidates_are_drawn() {
    let place = workplace();
    place.run(&format!("{} --dtype fp16 --no-validate -o half", export_line(&Fixture::open(fixtures())))).succeeded();
    let line = "eqim-bench --engine bundle --engine half --reference --solvers --plot solvers.png --tokens 2 --cfg 2";
    let run = place.run(&format!("{line} {QUICK}")).succeeded();
    assert!(run.stdout.starts_with("| candidate "), "{}", run.stdout);
    let report = json(&place);
    let solved = report["solvers"].as_array().unwrap();
    let of = |name: &str| {
        solved.iter().filter(|solved| solved["name"].as_str().unwrap().starts_with(name)).collect::<Vec<_>>()
    };
    let (bundle, half, reference) = (of("bundle"), of("half"), of("the reference"));
    assert_eq!((bundle.len(), reference.len()), (half.len(), 1));
    assert!(solved.iter().all(|solved| solved["seconds"].as_f64().unwrap() > 0.0));
    // The same solver on two bundles is as far from the exact solution; the reference is Euler's method of the model.
    for (one, other) in bundle.iter().zip(&half) {
        let [one, other] = [one, other].map(|solved| solved["tokens"].as_f64().unwrap());
        assert!((one - other).abs() < 2e-2, "{one} {other}");
    }
    let euler = bundle
        .iter()
        .find(|solved| solved["solver"] == "euler" && solved["evaluations"] == reference[0]["evaluations"]);
    let distance = |solved: &Value| solved["tokens"].as_f64().unwrap();
    assert!((distance(reference[0]) - distance(euler.unwrap())).abs() < 1e-4);
    let plot = image::open(place.path("solvers.png")).unwrap();
    assert_eq!((plot.width(), plot.height()), (1200, 800));
}

#[test]
fn tokens_that_differ_have_no_ratio() {
    let place = workplace();
    // One step is far from the 10 Euler steps of the reference.
    let run = place.run(&format!("eqim-bench --engine bundle --reference --solver ab2 --steps 1 --cfg 3 {QUICK}"));
    assert!(run.stdout.contains("no ratio"), "{}", run.stdout);
    run.failed(1, &["its tokens differ from those of the reference"]);
    assert!(json(&place)["cases"][0]["results"][1]["ratio"].is_null());
}

#[test]
fn lines_that_cannot_be_measured_are_refused() {
    let place = workplace();
    place.write("not-python", "");
    for line in [
        "--engine missing",
        "",
        "--engine bundle --tokens 1",
        "--engine bundle --batch 0",
        "--engine bundle --tokens 4 --tail 4",
        "--engine bundle --tokens 1000000 --tail 1 --batch 4096",
        "--engine bundle --tokens 1000000 --batch 4096",
        "--engine bundle --percentile 101",
        "--engine bundle --pytorch .",
        "--engine bundle --pytorch . --python python3",
        "--engine bundle --stage flow --reference",
    ] {
        place.refused(format!("eqim-bench {line}").trim_end());
    }
    insta::with_settings!({filters => MEMORY}, { insta::assert_snapshot!(place.messages()) });
}

/// Writes pictures in class folders, with the height of the fixture's images and `widths` in tokens.
fn photographs(place: &Workplace, widths: &[(&str, u32)]) {
    place.run("eqim-run --engine bundle --class 0 --tokens 2 -o small.png").succeeded();
    let (token, height) = image::open(place.path("small.png")).unwrap().to_rgb8().dimensions();
    for (number, (class, tokens)) in widths.iter().enumerate() {
        std::fs::create_dir_all(place.path(&format!("photos/{class}"))).unwrap();
        let wave = |x: u32, y: u32, c: u32| (x * (3 + c) + y * 11 + x * y % (29 + number as u32)) as u8;
        let photo = RgbImage::from_fn(tokens * token / 2, height, |x, y| image::Rgb([0, 1, 2].map(|c| wave(x, y, c))));
        photo.save(place.path(&format!("photos/{class}/{number}.png"))).unwrap();
    }
}

/// The loss at every position of a picture, from the teacher-forced pass of the model instead of the steps of the
/// engine.
fn losses(place: &Workplace, picture: &str, class: i64, positions: usize) -> Vec<f64> {
    let engine = Fixture::open(fixtures()).engine(WeightSet::Ema);
    let (g, token) = (&engine.config().generator, engine.config().tokenizer.token_width());
    let pixels =
        read(&place.path(picture), engine.config().tokenizer.image_height(), token, Side::Left).unwrap().pixels;
    let width = pixels.dim().2;
    let mirrored = ndarray::concatenate![Axis(2), pixels, pixels.slice(s![.., .., ..;-1])];
    let views: Vec<Array3<f32>> = (0..8)
        .map(|view| {
            let place = |x: usize| (2 * width * view / 8 + x) % (2 * width);
            let columns: Vec<usize> = (0..(positions + 2) * token).map(place).collect();
            engine.encode(mirrored.select(Axis(2), &columns).view().insert_axis(Axis(0))).unwrap() * g.vae_norm as f32
        })
        .collect();
    let mut random = TorchRng::new(6);
    let noise: Vec<Array2<f32>> =
        (0..8).map(|_| Array2::from_shape_vec((8, g.embed), random.randn(8 * g.embed)).unwrap()).collect();
    let mut sums = vec![0.0; positions];
    for (view, tokens) in views.iter().enumerate() {
        let tokens = tokens.slice(s![0, ..positions, ..]);
        let mut o = Eager::new(engine.weights());
        let labels = Tensor::new(&[class], &Device::Cpu).unwrap();
        let z = transformer::teacher_forced(&mut o, g, &labels, &to_tensor(tokens).unwrap(), positions, 0).unwrap();
        for (time, noise) in noise.iter().enumerate() {
            let t = (time as f32 + 0.5) / 8.0;
            let velocity = &noise.row(view) - &tokens;
            let at = to_tensor((&tokens + &velocity * t).view()).unwrap();
            let times = Tensor::full(t, positions, &Device::Cpu).unwrap();
            let found: Array2<f32> = to_array(&flow::velocity(&mut o, g, &at, &times, &z).unwrap()).unwrap();
            for (sum, error) in sums.iter_mut().zip((found - velocity).rows()) {
                *sum += f64::from(error.dot(&error)) / (g.embed * 64) as f64;
            }
        }
    }
    sums
}

#[test]
fn equivariance_of_the_tokenizer_and_of_positions() {
    let place = Workplace::new(&Fixture::open(fixtures()));
    place.write("names.txt", "a\nsea\nwood\nb\nc\n");
    let export = format!("{} --no-validate -o bundle", export_line(&Fixture::open(fixtures())));
    place.run(&format!("{export} --class-names names.txt")).succeeded();
    photographs(&place, &[("sea", 18)]);
    let line = format!(
        "eqim-bench --engine bundle --equivariance --images photos --trained 6 --positions 25 --seed 6 {QUICK}"
    );
    place.run(&format!("{line} --plot plot.png --export-markdown bench.md")).succeeded();
    let found = json(&place)["equivariance"].clone();

    let expected = losses(&place, "photos/sea/0.png", 1, 25);
    let positions = found["loss"].as_array().unwrap();
    assert_eq!(positions.len(), 25);
    for (position, expected) in positions.iter().zip(&expected) {
        let loss = position["loss"].as_f64().unwrap();
        assert!(
            (loss - expected).abs() <= f64::from(Tolerance::ACTIVATION.limit) * expected,
            "{position}, expected {expected}"
        );
    }
    let bands = found["bands"].as_array().unwrap();
    let ranges: Vec<_> = bands.iter().map(|band| (band["first"].as_u64(), band["last"].as_u64())).collect();
    assert_eq!(ranges.first(), Some(&(Some(0), Some(0))));
    assert_eq!(ranges.last(), Some(&(Some(21), Some(24))));
    let mean = expected[21..].iter().sum::<f64>() / 4.0;
    assert!(
        (bands.last().unwrap()["loss"].as_f64().unwrap() - mean).abs() <= f64::from(Tolerance::ACTIVATION.limit) * mean
    );

    let shifts = found["shifts"].as_array().unwrap();
    let whole = shifts.iter().find(|shift| shift["tokens"] == 1.0).unwrap();
    assert!(whole["all"].as_f64().unwrap() < whole["unshifted"].as_f64().unwrap(), "tokens follow: {whole}");
    let plot = image::open(place.path("plot.png")).unwrap();
    assert_eq!((plot.width(), plot.height()), (1200, 1600));
    insta::with_settings!({filters => VARYING}, { insta::assert_snapshot!(String::from_utf8(place.read("bench.md")).unwrap()) });

    // If a folder name is not a class name, the pictures have no class. Pictures that are too narrow are refused.
    photographs(&place, &[("sea", 18), ("sky", 6)]);
    let run = place.run(&line).succeeded();
    assert!(run.stdout.contains("2 pictures, classes from nothing: the folders"), "{}", run.stdout);
    let refused = |flags: &str| place.refused(&format!("eqim-bench --engine bundle {flags}"));
    refused("--equivariance --images photos --trained 18");
    refused("--equivariance --images bundle");
    refused("--equivariance");
    refused("--images photos");
    insta::assert_snapshot!(place.messages());
}

#[test]
fn tiles_of_generated_images_and_of_photographs() {
    let place = workplace();
    let line = format!("eqim-bench --engine bundle --tiling --tokens 40 --cfg 1 --steps 2 {QUICK}");
    place.run(&line).succeeded();
    let tiles = |found: &Value| -> Vec<(u64, u64)> {
        let tiles = found["tiling"]["tiles"].as_array().unwrap().iter();
        tiles.map(|tile| (tile["tile"].as_u64().unwrap(), tile["overlap"].as_u64().unwrap())).collect()
    };
    let generated = json(&place);
    assert_eq!(tiles(&generated), [(40, 0), (16, 2), (16, 4), (16, 8), (32, 4), (32, 8), (32, 16)]);
    assert!(generated["tiling"]["tiles"][1]["mean"].as_f64().unwrap() > 0.0);
    assert!(generated["tiling"]["tiles"][1]["psnr"].is_null());

    photographs(&place, &[("a", 12), ("b", 9)]);
    let run = place.run(&format!("{line} --images photos")).succeeded();
    insta::with_settings!({filters => VARYING}, { insta::assert_snapshot!(run.stdout) });
    let found = json(&place);
    assert_eq!(tiles(&found), [(21, 0), (16, 2), (16, 4), (16, 8)]);
    assert!(found["tiling"]["tiles"].as_array().unwrap().iter().all(|tile| tile["psnr"].as_f64().unwrap() > 0.0));
    place.run("eqim-bench --engine bundle --tiling --equivariance --images photos").failed(2, &["--equivariance"]);
}
