//! From checkpoints to images by the programs alone, compared with the results of the PyTorch reference.

use std::collections::{BTreeSet, HashMap};
use std::process::{Command, Stdio};

use candle_core::Tensor;
use eqim::checkpoint;
use eqim::checkpoint::tensors::{self, TensorFile};
use eqim::close::{Tolerance, values};
use eqim::engine::Engine;
use eqim::engine::candle::CandleEngine;
use eqim::request::solver::Solver;
use image::RgbImage;
use ndarray::{Array3, Array4};
use serde_json::Value;

use crate::common::bins::{Workplace, export_line, program};
use crate::common::{Fixture, all, assert_array, assert_close, assert_tensor, fixtures};

const BACKENDS: [&str; 2] = ["candle", "ort"];

fn first() -> Fixture {
    Fixture::open(fixtures())
}

impl Workplace {
    pub fn tensor(&self, file: &str, name: &str) -> Tensor {
        TensorFile::open(&self.path(file)).unwrap().read(name).unwrap()
    }

    fn write_tensor(&self, file: &str, name: &str, tensor: &Tensor) {
        tensors::write(&self.path(file), &[(name, tensor.clone())], HashMap::new()).unwrap();
    }

    fn image(&self, file: &str) -> RgbImage {
        image::open(self.path(file)).unwrap().to_rgb8()
    }

    fn engine(&self, bundle: &str) -> CandleEngine {
        let (config, weights) = checkpoint::load_safetensors(&self.path(bundle).join("model.safetensors")).unwrap();
        CandleEngine::new(config, weights)
    }
}

/// The command line of a fixture's sampling run, without seed, backend and outputs.
pub fn run_line(fixture: &Fixture, run: &str) -> String {
    let meta = &fixture.meta["sampling"][run];
    let labels: Vec<String> = match fixture.expected.get(&format!("{run}/labels")) {
        Some(labels) => labels.to_vec1::<i64>().unwrap().iter().map(i64::to_string).collect(),
        None => vec!["none".into(); meta["batch"].as_u64().unwrap() as usize],
    };
    let schedule = meta["cfg_schedule"].as_str().unwrap();
    let (labels, tokens, cfg) = (labels.join(","), &meta["n_tokens"], &meta["cfg"]);
    format!("eqim-run --engine bundle --class {labels} --tokens {tokens} --cfg {cfg} --cfg-schedule {schedule}")
}

/// Names of the images that a batch writes for `-o out.png`.
fn image_names(count: usize) -> Vec<String> {
    if count == 1 { vec!["out.png".into()] } else { (0..count).map(|row| format!("out-{row}.png")).collect() }
}

/// Asserts that two runs gave the same tokens.
#[track_caller]
fn assert_same(found: &Tensor, expected: &Tensor) {
    assert_eq!(found.dims(), expected.dims());
    let [found, expected] = [found, expected].map(|tensor| values(tensor).unwrap());
    assert_close("tokens", &found, &expected, Tolerance::SAMPLING);
}

#[test]
fn what_the_reference_sampled() {
    for fixture in all() {
        let place = Workplace::new(&fixture);
        let export = place.run(&format!("{} -o bundle", export_line(&fixture))).succeeded();
        assert!(export.stdout.matches("-[✓]").count() > 5, "{}", export.stdout);
        assert!(!export.stdout.contains("-[x]"), "{}", export.stdout);
        place.write_tensor("prefix.safetensors", "tokens", fixture.tensor("outpaint/prefix"));
        for run in fixture.runs() {
            let seed = &fixture.meta["sampling"][&run]["seed"];
            let prefix = if run == "outpaint" { " --prefix prefix.safetensors" } else { "" };
            place.write_tensor("noise.safetensors", "noise", fixture.tensor(&format!("{run}/noise")));
            for backend in BACKENDS {
                for noise in [format!("--seed {seed}"), "--noise noise.safetensors".into()] {
                    let line = run_line(&fixture, &run) + prefix;
                    let line = format!("{line} {noise} --backend {backend} --save-tokens saved.safetensors -o out.png");
                    place.run(&line).succeeded();
                    let tokens = place.tensor("saved.safetensors", "tokens");
                    assert_tensor(&fixture, &format!("{run}/tokens"), &tokens, Tolerance::SAMPLING);
                    assert_tensor(
                        &fixture,
                        &format!("{run}/noise"),
                        &place.tensor("saved.safetensors", "noise"),
                        Tolerance::SAMPLING,
                    );
                    images_are_close(&place, &fixture, &run, tokens.dim(0).unwrap());
                }
            }
        }
    }
}

/// Compares the images of a run with the images of the reference, if the fixture has them.
pub fn images_are_close(place: &Workplace, fixture: &Fixture, run: &str, rows: usize) {
    let Some(expected) = fixture.expected.get(&format!("{run}/image_u8")) else { return };
    for (row, name) in image_names(rows).iter().enumerate() {
        let expected = expected.get(row).unwrap();
        let (height, width, _) = expected.dims3().unwrap();
        let image = place.image(name);
        assert_eq!(image.dimensions(), (width as u32, height as u32), "{run}: {name}");
        let expected = expected.flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let levels = image.as_raw().iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(levels <= Some(1), "{run}: {name} differs by {levels:?} levels");
    }
}

#[test]
fn every_image_of_a_batch_is_of_its_class() {
    let fixture = first();
    let place = Workplace::with_bundle(&fixture);
    let line = "eqim-run --engine bundle --backend ort --tokens 6 --cfg 3";
    place.run(&format!("{line} --class 3,0,none --save-tokens batch.safetensors -o out.png")).succeeded();
    assert!(!place.path("out.png").exists() && !place.path("out-3.png").exists());
    let [tokens, noise] = ["tokens", "noise"].map(|key| place.tensor("batch.safetensors", key));
    for (row, class) in ["3", "0", "none"].into_iter().enumerate() {
        place.write_tensor("noise.safetensors", "noise", &noise.narrow(0, row, 1).unwrap());
        let alone = "--noise noise.safetensors --save-tokens alone.safetensors -o alone.png";
        place.run(&format!("{line} --class {class} {alone}")).succeeded();
        assert_same(&place.tensor("alone.safetensors", "tokens"), &tokens.narrow(0, row, 1).unwrap());
        let (image, alone) = (place.image(&format!("out-{row}.png")), place.image("alone.png"));
        let levels = image.as_raw().iter().zip(alone.as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(levels <= Some(1), "{class}: {levels:?} levels");
    }
}

#[test]
fn a_width_is_so_many_tokens_and_the_same_command_gives_the_same_bytes() {
    for fixture in all() {
        let place = Workplace::with_bundle(&fixture);
        let width = 6 * place.engine("bundle").config().tokenizer.token_width();
        for backend in BACKENDS {
            let line = format!("eqim-run --engine bundle --backend {backend} --class 1 --cfg 2 --seed 9");
            place.run(&format!("{line} --tokens 6 -o tokens.png")).succeeded();
            place.run(&format!("{line} --width {width} -o width.png")).succeeded();
            assert_eq!(place.image("width.png").width() as usize, width);
            assert!(place.read("tokens.png") == place.read("width.png"), "{backend}");
        }
    }
}

#[test]
fn every_solver_is_the_same_on_both_backends_and_another_than_euler() {
    let place = Workplace::new(&first());
    place.run(&format!("{} -o bundle", export_line(&first()))).succeeded();
    let mut euler = None;
    for solver in Solver::ALL {
        let tokens = BACKENDS.map(|backend| {
            let line = "eqim-run --engine bundle --class 1 --tokens 6 --cfg 3 --steps 5 -o out.png --save-tokens t.safetensors";
            place.run(&format!("{line} --backend {backend} --solver {solver}")).succeeded();
            place.tensor("t.safetensors", "tokens")
        });
        assert_same(&tokens[1], &tokens[0]);
        let euler = euler.get_or_insert(tokens[0].clone());
        let difference = (&tokens[0] - &*euler).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        assert_eq!(difference.to_scalar::<f32>().unwrap() > 1e-3, solver != Solver::Euler, "{solver}: {difference}");
    }
}

/// Without guidance, a longer image begins with the tokens of a shorter image of the same seed.
#[test]
fn an_image_far_longer_than_in_training() {
    let fixture = first();
    let place = Workplace::with_bundle(&fixture);
    let line = run_line(&fixture, "plain").replace("--tokens 16", "--tokens 600");
    place.run(&format!("{line} --seed 1 --backend ort --save-tokens saved.safetensors -o out.png")).succeeded();
    let tokens = place.tensor("saved.safetensors", "tokens");
    assert_eq!(tokens.dims(), [3, 600, 8]);
    assert_tensor(&fixture, "plain/tokens", &tokens.narrow(1, 0, 16).unwrap(), Tolerance::SAMPLING);
    for name in image_names(3) {
        assert_eq!(place.image(&name).dimensions(), (2400, 32));
    }
}

#[test]
fn a_picture_is_continued() {
    for fixture in all() {
        let place = Workplace::with_bundle(&fixture);
        place.run("eqim-run --engine bundle --tokens 7 -o begun.png").succeeded();
        let engine = place.engine("bundle");
        let picture = place.image("begun.png");
        let (width, height) = (picture.width() as usize, picture.height() as usize);
        let pixels = Array4::from_shape_fn((1, 3, height, width), |(_, channel, y, x)| {
            f32::from(picture.get_pixel(x as u32, y as u32)[channel]) / 127.5 - 1.0
        });
        let prefix = engine.encode(pixels.view()).unwrap() * engine.config().generator.vae_norm as f32;
        let prefix = eqim::engine::candle::to_tensor(prefix.view()).unwrap();
        for backend in BACKENDS {
            let line = format!("eqim-run --engine bundle --backend {backend} --prefix begun.png --class 0,none");
            place.run(&format!("{line} --tokens 9 --save-tokens saved.safetensors -o out.png")).succeeded();
            let saved = place.tensor("saved.safetensors", "tokens");
            for row in 0..2 {
                assert_same(&saved.narrow(0, row, 1).unwrap().narrow(1, 0, 7).unwrap(), &prefix);
            }
            assert_eq!(place.tensor("saved.safetensors", "noise").dims(), [2, 2, saved.dim(2).unwrap()]);
        }
    }
}

#[test]
fn a_jpeg_of_another_size_is_scaled() {
    let place = Workplace::with_bundle(&first());
    // Twice as high as the model's images: 200×64 becomes 100×32, and 25 tokens of 4 pixels.
    RgbImage::from_fn(200, 64, |x, y| image::Rgb([x as u8, y as u8, 90])).save(place.path("photo.jpg")).unwrap();
    let run = place.run("eqim-run --engine bundle --prefix photo.jpg --tokens 27 --json -o out.png").succeeded();
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((&report["prefix_tokens"], &report["width"]), (&25.into(), &108.into()));
    assert!(run.stderr.contains("photo.jpg") && run.stderr.contains("100×32"), "{}", run.stderr);
}

#[test]
fn a_report_for_programs() {
    let place = Workplace::with_bundle(&first());
    let line = "eqim-run --engine bundle --backend candle --class 3,none --seed 7 --tokens 5 --json -o out.png";
    let run = place.run(&format!("{line} --save-tokens saved.safetensors")).succeeded();
    let mut report: Value = serde_json::from_str(&run.stdout).unwrap();
    let seconds = report.as_object_mut().unwrap().remove("seconds").unwrap();
    for key in ["images_per_second", "tokens_per_second", "peak_bytes"] {
        let rate = report.as_object_mut().unwrap().remove(key).unwrap();
        assert!(rate.as_f64().unwrap() > 0.0, "{key}: {rate}");
    }
    let expected = serde_json::json!({
        "engine": "bundle", "backend": "Candle", "classes": [3, null], "seed": 7, "tokens": 5, "prefix_tokens": 0,
        "width": 20, "height": 32, "files": ["out-0.png", "out-1.png", "saved.safetensors"],
    });
    assert_eq!(report, expected);
    let stages = ["load", "prefill", "transformer_step", "flow_sampler", "decoder", "total"];
    let found: BTreeSet<&str> = seconds.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(found, stages.into());
    assert!(seconds["total"].as_f64() >= seconds["decoder"].as_f64(), "{seconds}");
}

#[test]
fn one_thread() {
    let fixture = first();
    let place = Workplace::with_bundle(&fixture);
    let line = run_line(&fixture, "guided_linear") + " --seed 2 --backend ort --threads 1";
    place.run(&format!("{line} --save-tokens saved.safetensors -o out.png")).succeeded();
    assert_tensor(&fixture, "guided_linear/tokens", &place.tensor("saved.safetensors", "tokens"), Tolerance::SAMPLING);
}

#[test]
fn half_precision() {
    for fixture in all() {
        let place = Workplace::new(&fixture);
        let export = place.run(&format!("{} --dtype fp16 -o bundle", export_line(&fixture))).succeeded();
        assert!(export.stdout.contains("-[✓]") && !export.stdout.contains("-[x]"), "{}", export.stdout);
        assert_eq!(place.tensor("bundle/model.safetensors", "z_proj.weight").dtype(), candle_core::DType::F16);
        let seed = &fixture.meta["sampling"]["guided_linear"]["seed"];
        for backend in BACKENDS {
            let line = run_line(&fixture, "guided_linear");
            let line = format!("{line} --seed {seed} --backend {backend} --save-tokens saved.safetensors -o out.png");
            place.run(&line).succeeded();
            assert_tensor(
                &fixture,
                "guided_linear/tokens",
                &place.tensor("saved.safetensors", "tokens"),
                Tolerance::FP16,
            );
        }
    }
}

#[test]
fn the_oldest_operator_set() {
    for fixture in all() {
        let place = Workplace::new(&fixture);
        let export = place.run(&format!("{} --opset 17 -o bundle", export_line(&fixture))).succeeded();
        assert!(export.stdout.contains("-[✓]") && !export.stdout.contains("-[x]"), "{}", export.stdout);
        assert!(place.run("eqim-export inspect bundle").succeeded().stdout.contains("opset 17"));
    }
}

#[test]
fn raw_weights_are_not_the_averages() {
    for fixture in all() {
        let place = Workplace::with_bundle(&fixture);
        place
            .run(&format!(
                "{} --generator-weights raw --tokenizer-weights raw --no-validate -o raw",
                export_line(&fixture)
            ))
            .succeeded();
        let image: Array4<f32> = fixture.array("tokenizer/image3");
        for (bundle, expected) in [("bundle", "tokenizer/latent3"), ("raw", "tokenizer/latent3_raw_weights")] {
            let latent: Array3<f32> = place.engine(bundle).encode(image.view()).unwrap();
            assert_array(&fixture, expected, &latent, Tolerance::ACTIVATION);
        }
        assert!(place.read("bundle/model.safetensors") != place.read("raw/model.safetensors"));
    }
}

#[test]
fn a_bundle_is_a_checkpoint_too() {
    let place = Workplace::with_bundle(&first());
    let line = "eqim-export onnx --generator bundle/model.safetensors --tokenizer bundle/model.safetensors -o again";
    place.run(line).succeeded();
    assert_eq!(place.listing_of("bundle"), place.listing_of("again"));
    for file in place.listing_of("bundle").into_iter().filter(|file| file != "config.json") {
        assert!(place.read(&format!("bundle/{file}")) == place.read(&format!("again/{file}")), "{file}");
    }
    // Only the origins of the values differ.
    let [mut first, mut second] = ["bundle", "again"].map(|bundle| -> serde_json::Value {
        serde_json::from_slice(&place.read(&format!("{bundle}/config.json"))).unwrap()
    });
    assert_eq!(second["inferred"][1], serde_json::json!({"name": "window", "value": "3", "origin": "metadata"}));
    for config in [&mut first, &mut second] {
        config["inferred"].take();
    }
    assert_eq!(first, second);
}

#[test]
fn an_older_bundle_is_replaced_and_nothing_else() {
    let fixture = first();
    let place = Workplace::with_bundle(&fixture);
    let before = place.listing_of(".");
    place.run(&format!("{} --dtype fp16 --no-validate -o bundle", export_line(&fixture))).succeeded();
    assert!(String::from_utf8(place.read("bundle/config.json")).unwrap().contains("fp16"));
    assert_eq!(before, place.listing_of("."), "nothing is left beside it");
    place.run("eqim-run --engine bundle --tokens 3 -o out.png").succeeded();

    std::fs::create_dir(place.path("empty")).unwrap();
    place.run(&format!("{} --no-validate -o empty", export_line(&fixture))).succeeded();

    for (folder, file) in [("photos", "summer.jpg"), ("home", ".profile"), ("bert", "config.json"), ("bundle", "notes")]
    {
        std::fs::create_dir_all(place.path(folder)).unwrap();
        place.write(&format!("{folder}/{file}"), r#"{"model_type": "bert"}"#);
        place.refused(&format!("{} --no-validate -o {folder}", export_line(&fixture)));
    }
    insta::assert_snapshot!(place.messages());
}

#[test]
fn a_bundle_that_fails_validation_is_not_written() {
    let fixture = first();
    let place = Workplace::with_bundle(&fixture);
    let before = place.listing();
    let export = place.run(&format!("{} --atol 0 -o bundle", export_line(&fixture)));
    let export = export.failed(1, &["validation", "--atol", "--no-validate"]);
    assert!(export.stdout.contains("-[x]"), "{}", export.stdout);
    assert_eq!(before, place.listing(), "the older bundle stays");
}

#[test]
fn what_a_bundle_holds() {
    for fixture in all() {
        let place = Workplace::with_bundle(&fixture);
        let text = place.run("eqim-export inspect bundle").succeeded().stdout;
        let json = place.run("eqim-export inspect bundle --json --tokens 16").succeeded().stdout;
        let report: Value = serde_json::from_str(&json).unwrap();
        let config: Value = serde_json::from_slice(&place.read("bundle/config.json")).unwrap();
        assert_eq!(report["manifest"], config);
        let g = &fixture.meta["generator"];
        assert_eq!((&report["tokens"], &report["steps"]), (&16.into(), &g["steps"]));

        let names = ["prefill", "transformer_step", "flow_sampler", "decoder", "encoder"];
        let stages = report["stages"].as_array().unwrap();
        assert_eq!(stages.iter().map(|stage| stage["name"].as_str().unwrap()).collect::<Vec<_>>(), names);
        for stage in stages {
            let name = stage["name"].as_str().unwrap();
            let bytes = place.read(&format!("bundle/{name}.onnx")).len();
            assert_eq!(stage["file_bytes"], bytes, "{name}");
            assert_eq!(
                stage["parameter_bytes"].as_u64(),
                stage["cost"]["parameters"].as_u64().map(|n| 4 * n),
                "{name}"
            );
            let nodes: u64 = stage["operators"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
            let row = text.lines().find(|line| line.starts_with(name)).unwrap();
            assert!(row.ends_with(&format!(" {nodes}")), "{row}: {nodes} nodes");
        }
        insta::assert_snapshot!(text);

        let double = place.run("eqim-export inspect bundle --json --tokens 32 --steps 20").succeeded().stdout;
        let double: Value = serde_json::from_str(&double).unwrap();
        let work = |report: &Value, stage: usize| report["stages"][stage]["cost"]["multiply_adds"].as_u64().unwrap();
        assert_eq!(work(&report, 1), work(&double, 1), "a step costs the same at every length");
        assert!(work(&report, 3) < work(&double, 3) && work(&report, 2) < work(&double, 2));
    }
}

/// `ORT_DYLIB_PATH` is the path of ONNX Runtime, so that a missing file means no ONNX Runtime.
const WITHOUT_RUNTIME: [(&str, &str); 1] = [("ORT_DYLIB_PATH", "missing.so")];

#[test]
fn without_onnx_runtime() {
    let fixture = first();
    let place = Workplace::with_bundle(&fixture);
    let line = run_line(&fixture, "plain") + " --seed 1 --save-tokens saved.safetensors -o out.png";
    let run = place.run_with(&line, &WITHOUT_RUNTIME).succeeded();
    assert!(run.stdout.contains("on Candle"), "{}", run.stdout);
    for word in ["warning", "missing.so", "Candle"] {
        assert!(run.stderr.contains(word), "no {word}: {}", run.stderr);
    }
    assert_tensor(&fixture, "plain/tokens", &place.tensor("saved.safetensors", "tokens"), Tolerance::SAMPLING);

    let before = place.listing();
    let line = "eqim-run --engine bundle --backend ort --tokens 3 -o new.png";
    place.run_with(line, &WITHOUT_RUNTIME).failed(1, &["ORT_DYLIB_PATH", "missing.so", "cargo xtask setup"]);
    let line = format!("{} -o new", export_line(&fixture));
    place.run_with(&line, &WITHOUT_RUNTIME).failed(1, &["ORT_DYLIB_PATH", "missing.so", "--no-validate"]);
    assert_eq!(before, place.listing());

    place.run_with(&format!("{line} --no-validate"), &WITHOUT_RUNTIME).succeeded();
    assert_eq!(place.listing_of("new"), place.listing_of("bundle"));
}

#[test]
fn a_library_that_is_not_onnx_runtime() {
    let place = Workplace::with_bundle(&first());
    let before = place.listing();
    let library = [("ORT_DYLIB_PATH", "bundle/config.json")];
    let line = "eqim-run --engine bundle --backend ort --tokens 3 -o new.png";
    place.run_with(line, &library).failed(1, &["bundle/config.json", "ONNX Runtime"]);
    assert_eq!(before, place.listing());
}

/// Standard output is closed early, as by `head`.
#[test]
fn a_reader_that_goes_away() {
    let fixture = first();
    let place = Workplace::with_bundle(&fixture);
    let export = format!("{} -o new", export_line(&fixture));
    for line in ["eqim-export inspect bundle", "eqim-export inspect bundle --json", &export, "eqim-run --engine bundle"]
    {
        let mut words = line.split(' ');
        let mut command = Command::new(program(words.next().unwrap()));
        command.args(words).current_dir(place.path(".")).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !stderr.contains("panicked"), "{line}: {} {stderr}", output.status);
    }
    assert!(place.path("new/config.json").exists() && place.path("image.png").exists());
}
