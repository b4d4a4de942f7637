//! INT8: calibration, the calibration table, the preview compared with ONNX Runtime, and the commands.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use candle_core::{Device, Tensor};
use eqim::bundle::Int8Target;
use eqim::bundle::Precision;
use eqim::checkpoint::WeightSet;
use eqim::digest::sha256;
use eqim::engine::candle::CandleEngine;
use eqim::lock::Lock;
use eqim::model::Stage;
use eqim::weights::Weights;
use eqim_calibration::{
    Collection, Estimator, Policy, Preview, Samples, Scheme, Table, fingerprint, plan, quantized, survey,
};
use eqim_engines::native::find_onnxruntime;
use eqim_export::lower::NEWEST_OPSET;
use eqim_export::validate::validate_preview;
use eqim_export::write::{Options, draft};
use image::RgbImage;
use serde_json::Value;

use crate::common::bins::{Workplace, export_line};
use crate::common::{Fixture, VARYING, all, file, fixtures};

/// A smooth picture with noise.
fn picture(width: u32, height: u32, seed: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let noise = (x * 7919 + y * 104_729 + seed * 1_299_709).wrapping_mul(2_654_435_761) >> 28;
        image::Rgb(
            [(x * 3) as u8, (y * 5 + seed) as u8, (x + y) as u8].map(|value: u8| value.wrapping_add(noise as u8)),
        )
    })
}

/// Writes pictures with the image height of a model to a folder.
fn write_pictures(folder: &Path, engine: &CandleEngine) {
    let tokenizer = &engine_config(engine).tokenizer;
    let (height, token) = (tokenizer.image_height() as u32, tokenizer.token_width() as u32);
    std::fs::create_dir_all(folder.join("more")).unwrap();
    for (name, seed) in [("a.png", 1), ("more/b.PNG", 2)] {
        picture(5 * token + 1, height, seed).save(folder.join(name)).unwrap();
    }
}

fn engine_config(engine: &CandleEngine) -> &eqim::Config {
    eqim::engine::Engine::config(engine)
}

fn samples(folder: &Path, engine: &CandleEngine) -> Samples {
    Samples {
        images: survey(folder, engine_config(engine), false).unwrap().0,
        resized: false,
        rollouts: 3,
        tokens: 6,
        steps: engine_config(engine).generator.steps,
        cfg: 3.0,
        seed: 5,
    }
}

/// The model of a fixture and its calibration table.
pub fn calibrated(fixture: &Fixture) -> (CandleEngine, Table) {
    let engine = fixture.engine(WeightSet::Ema);
    let folder = tempfile::tempdir().unwrap();
    write_pictures(folder.path(), &engine);
    let samples = samples(folder.path(), &engine);
    let model = fingerprint(engine_config(&engine), engine.weights()).unwrap();
    let mut collection = Collection::open(&folder.path().join("state"), &model, &samples).unwrap();
    while collection.done() < collection.total() {
        collection.next(engine_config(&engine), engine.weights(), folder.path()).unwrap();
    }
    let table = collection.table(Estimator::Mse).unwrap();
    (engine, table)
}

fn policies(table: &Table) -> [Policy; 3] {
    let policy = |target| Policy::new(target, Stage::ALL, table.clone());
    let mut batched = policy(Int8Target::TensorRt);
    batched.w8a8 = eqim_calibration::policy::patterns("--w8a8", &["adaLN".into()]).unwrap();
    [policy(Int8Target::TensorRt), policy(Int8Target::Cpu), batched]
}

/// Largest allowed error of a graph with one product in INT8 against its preview, as a fraction of the error of INT8
/// itself. Both round to the same grids, but sums that differ in the last place can round to neighbouring levels. In
/// the small products of the fixtures, one such level is a tenth of the INT8 error. Measured: at most 9 %. A wrong
/// scale, zero point or layout gives more than 100 %.
const ONE_PRODUCT: f32 = 0.25;

/// Scopes in groups, so that a graph has at most one scope of a group. Every scope is in one group.
fn one_per_stage(scopes: &BTreeMap<String, BTreeSet<Stage>>) -> Vec<BTreeSet<String>> {
    let mut groups: Vec<(BTreeSet<String>, BTreeSet<Stage>)> = vec![];
    for (scope, stages) in scopes {
        let free = groups.iter_mut().find(|(_, taken)| taken.is_disjoint(stages));
        match free {
            Some((group, taken)) => {
                group.insert(scope.clone());
                taken.extend(stages);
            }
            None => groups.push(([scope.clone()].into(), stages.clone())),
        }
    }
    groups.into_iter().map(|(group, _)| group).collect()
}

#[test]
fn every_product_alone_is_what_onnx_runtime_computes() {
    let library = find_onnxruntime().unwrap_or_else(|problem| panic!("{problem}"));
    for fixture in all() {
        let (engine, table) = calibrated(&fixture);
        let (config, weights) = (engine_config(&engine), engine.weights());
        for policy in policies(&table) {
            let mut worst = 0.0f32;
            let mut scopes = quantized(config, &policy).unwrap();
            assert!(scopes.len() > 20, "{}", scopes.len());
            if !policy.w8a8.is_empty() {
                scopes.retain(|scope, _| policy.w8a8.iter().any(|pattern| pattern.is_match(scope)));
            }
            for group in one_per_stage(&scopes) {
                let policy = Policy { only: Some(group.clone()), ..policy.clone() };
                let folder = tempfile::tempdir().unwrap();
                let options =
                    Options { precision: Precision::Fp32, opset: NEWEST_OPSET, policy: Some(&policy), functions: true };
                let draft = draft(&folder.path().join("bundle"), config, weights, options, |_| {}).unwrap();
                let preview = Preview::engine(config, weights, &policy).unwrap();
                for check in validate_preview(&draft.bundle, &preview, &engine, &library, |_| {}).unwrap() {
                    let quantized = group.iter().any(|scope| scopes[scope].contains(&check.stage));
                    // Only the stages with the INT8 product differ from FP32, by enough to reveal a wrong scale, zero
                    // point or layout.
                    assert_eq!(check.own > 1e-4, quantized, "{group:?} {check:?}");
                    if quantized {
                        worst = worst.max(check.error / check.own);
                        assert!(check.error <= ONE_PRODUCT * check.own, "{} {group:?}: {check:?}", policy.target);
                    } else {
                        assert!(check.error <= 1e-5, "{group:?}: {check:?}");
                    }
                }
            }
            println!("{} products for {}: {worst:.1e} of INT8's own error", scopes.len(), policy.target);
        }
    }
}

#[test]
fn rules_say_what_is_in_int8() {
    let (engine, table) = calibrated(&Fixture::open(fixtures()));
    let config = engine_config(&engine);
    let [tensorrt, cpu, batched] = policies(&table).map(|policy| plan(config, &policy).unwrap());
    let scheme = |plans: &BTreeMap<Stage, eqim_calibration::QuantizationPlan>, stage, scope: &str| {
        plans[&stage].schemes.get(scope).copied().unwrap_or_else(|| panic!("no {scope}"))
    };
    let (qkv, ada) = ("encoder_blocks.0.attn.qkv", "diffloss.net.res_blocks.0.adaLN_modulation.1");
    let conv = "decoder.up.0.block.0.conv1";
    assert_eq!(scheme(&tensorrt, Stage::Step, qkv), Scheme::WeightOnly);
    assert_eq!(scheme(&tensorrt, Stage::Flow, ada), Scheme::WeightOnly);
    assert_eq!(scheme(&batched, Stage::Flow, ada), Scheme::Static { scale: table.scopes[ada].scale });
    assert_eq!(scheme(&tensorrt, Stage::Decoder, conv), Scheme::Static { scale: table.scopes[conv].scale });
    assert_eq!(scheme(&cpu, Stage::Step, qkv), Scheme::Dynamic);
    assert!(matches!(scheme(&cpu, Stage::Decoder, conv), Scheme::Integer { .. }));
    let columns = "decoder.decoder1d";
    assert_eq!(scheme(&cpu, Stage::Decoder, columns), Scheme::Dynamic);
    assert_eq!(scheme(&tensorrt, Stage::Decoder, columns), Scheme::Float);
    for plans in [&tensorrt, &cpu, &batched] {
        for end in ["diffloss.net.input_proj", "diffloss.net.final_layer.linear", "diffloss.net.time_embed.mlp.0"] {
            assert_eq!(scheme(plans, Stage::Flow, end), Scheme::Float, "{end}");
        }
        for end in ["decoder.conv_in", "decoder.conv_out", "post_quant_layer"] {
            assert_eq!(scheme(plans, Stage::Decoder, end), Scheme::Float, "{end}");
        }
        let floats = &plans[&Stage::Step].floats;
        assert!(floats.contains("encoder_norm.weight") && !floats.contains("encoder_blocks.0.attn.qkv.weight"));
    }
}

#[test]
fn calibration_that_was_stopped_goes_on_to_the_same_table() {
    let (engine, expected) = calibrated(&Fixture::open(fixtures()));
    let (config, weights) = (engine_config(&engine), engine.weights());
    let folder = tempfile::tempdir().unwrap();
    write_pictures(folder.path(), &engine);
    let samples = samples(folder.path(), &engine);
    let state = folder.path().join("state");
    for done in 0..5 {
        let mut collection = Collection::open(&state, &expected.model, &samples).unwrap();
        assert_eq!((collection.done(), collection.total()), (done, 5));
        collection.next(config, weights, folder.path()).unwrap();
        collection.save(&state).unwrap();
    }
    let collection = Collection::open(&state, &expected.model, &samples).unwrap();
    assert_eq!(collection.table(Estimator::Mse).unwrap(), expected);
    let refused = |model: &str, samples: &Samples, words: &str| {
        let error = Collection::open(&state, model, samples).unwrap_err();
        assert!(error.is_input() && error.to_string().contains(words), "{error}");
    };
    refused(&expected.model, &Samples { seed: 6, ..samples.clone() }, "seed was 5 and is 6");
    refused(&expected.model, &Samples { rollouts: 4, ..samples.clone() }, "rollouts was 3 and is 4");
    refused("another", &samples, "of another model");
}

#[test]
fn a_calibration_goes_on_with_more_pictures() {
    let (engine, expected) = calibrated(&Fixture::open(fixtures()));
    let (config, weights) = (engine_config(&engine), engine.weights());
    let folder = tempfile::tempdir().unwrap();
    write_pictures(folder.path(), &engine);
    let (state, second) = (folder.path().join("state"), folder.path().join("more/b.PNG"));
    let open = || Collection::open(&state, &expected.model, &samples(folder.path(), &engine));
    let contents = std::fs::read(&second).unwrap();
    std::fs::remove_file(&second).unwrap();
    let mut collection = open().unwrap();
    // The picture, and one of the rollouts.
    for _ in 0..2 {
        collection.next(config, weights, folder.path()).unwrap();
        collection.save(&state).unwrap();
    }
    std::fs::write(&second, &contents).unwrap();
    let mut collection = open().unwrap();
    assert_eq!((collection.done(), collection.total()), (2, 5));
    while collection.done() < collection.total() {
        collection.next(config, weights, folder.path()).unwrap();
    }
    assert_eq!(collection.table(Estimator::Mse).unwrap(), expected);
    collection.save(&state).unwrap();

    let refused = |words: &str| {
        let error = open().unwrap_err();
        assert!(error.is_input() && error.to_string().contains(words), "{error}");
    };
    std::fs::copy(folder.path().join("a.png"), &second).unwrap();
    refused("with the picture more/b.PNG, which was changed");
    std::fs::remove_file(&second).unwrap();
    refused("with the picture more/b.PNG, which is missing");
    // A picture that changes while the calibration runs.
    std::fs::remove_file(&state).unwrap();
    let mut collection = open().unwrap();
    std::fs::write(folder.path().join("a.png"), &contents).unwrap();
    let error = collection.next(config, weights, folder.path()).unwrap_err();
    assert!(error.is_input() && error.to_string().contains("a.png: was changed"), "{error}");
}

#[test]
fn an_overflow_while_calibrating_names_the_scope() {
    let fixture = Fixture::open(fixtures());
    let engine = fixture.engine(WeightSet::Ema);
    let config = engine_config(&engine);
    let mut weights: Weights = engine.weights().clone();
    let name = "decoder.mid.block_1.conv1.weight";
    let huge = (weights.find(name).unwrap() * 1e38).unwrap();
    weights.insert(name.into(), &huge).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write_pictures(folder.path(), &engine);
    let samples = samples(folder.path(), &engine);
    let mut collection = Collection::open(&folder.path().join("state"), "model", &samples).unwrap();
    let error = collection.next(config, &weights, folder.path()).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    let text = error.to_string();
    assert!(text.contains("decoder.mid.block_1") && text.contains("not finite"), "{text}");
}

#[test]
fn dead_channels_and_a_constant_input_run() {
    let (engine, mut table) = calibrated(&Fixture::open(fixtures()));
    let config = engine_config(&engine);
    let mut weights = engine.weights().clone();
    for name in ["decoder.up.0.block.0.conv1.weight", "encoder_blocks.0.attn.qkv.weight"] {
        let weight = weights.find(name).unwrap();
        let dead = Tensor::zeros_like(weight).unwrap();
        let first = weight.narrow(0, 1, weight.dim(0).unwrap() - 1).unwrap();
        let mixed = Tensor::cat(&[&dead.narrow(0, 0, 1).unwrap(), &first], 0).unwrap();
        weights.insert(name.into(), &mixed).unwrap();
    }
    let entry = table.scopes.get_mut("decoder.up.0.block.0.conv1").unwrap();
    entry.input = eqim_calibration::Range { low: 0.0, high: 0.0 };
    entry.scale = entry.input.scale().unwrap();
    let library = find_onnxruntime().unwrap_or_else(|problem| panic!("{problem}"));
    let reference = CandleEngine::new(config.clone(), weights.clone());
    for policy in policies(&table) {
        let folder = tempfile::tempdir().unwrap();
        let options =
            Options { precision: Precision::Fp32, opset: NEWEST_OPSET, policy: Some(&policy), functions: true };
        let draft = draft(&folder.path().join("bundle"), config, &weights, options, |_| {}).unwrap();
        let preview = Preview::engine(config, &weights, &policy).unwrap();
        let checks = validate_preview(&draft.bundle, &preview, &reference, &library, |_| {}).unwrap();
        assert!(checks.iter().all(|check| check.passed && check.own.is_finite()), "{checks:?}");
    }
    let zeros = Tensor::zeros((4, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
    assert_eq!(eqim_calibration::int8::round_weight(&zeros, 127.0).unwrap().scales, [1.0; 4]);
}

/// A workplace with the bundle of a fixture, pictures and a calibration table.
pub fn place(fixture: &Fixture) -> Workplace {
    let place = Workplace::with_bundle(fixture);
    write_pictures(&place.path("photos"), &fixture.engine(WeightSet::Ema));
    place.run(&format!("{CALIBRATE} -o table.json")).succeeded();
    place
}

const CALIBRATE: &str = "eqim-export calibrate --engine bundle --images photos --rollouts 2 --tokens 5";

#[test]
fn bundles_in_int8_run_and_report() {
    for fixture in all() {
        let place = place(&fixture);
        let line = export_line(&fixture);
        for target in ["cpu", "tensorrt"] {
            // `--force`, because the test must not depend on measured times.
            let options = format!("--int8 --calibration table.json --for {target} --force -o {target}");
            let exported = place.run(&format!("{line} {options}")).succeeded();
            assert!(!exported.stdout.contains("-[x]"), "{}", exported.stdout);
            let report: Value = serde_json::from_slice(&place.read(&format!("{target}/quantization.json"))).unwrap();
            for image in report["images"].as_array().unwrap() {
                let psnr = image["psnr"].as_f64().unwrap();
                println!("{target}: {psnr:.1} dB, SSIM {:.4}", image["ssim"].as_f64().unwrap());
                assert!(psnr >= 30.0, "{target}: {psnr} dB");
            }
            assert_eq!(report["positions"].as_array().unwrap().len(), 256);
            assert_eq!(report["rollouts"].as_array().unwrap().len(), 3);
            assert_eq!(report["end_to_end"].is_object(), target == "cpu");
            let text = String::from_utf8(place.read(&format!("{target}/quantization.txt"))).unwrap();
            assert!(text.starts_with("INT8 "), "{text}");
            if target == "tensorrt" {
                // Without times: those of a CPU say nothing about a GPU.
                insta::with_settings!({filters => VARYING}, { insta::assert_snapshot!(text) });
            }
            let bytes = &report["bytes"];
            assert!(bytes["int8"].as_u64() < bytes["fp32"].as_u64());

            checker_accepts(&place, target);
            place.run(&format!("eqim-run --engine {target} --backend ort --tokens 4 -o {target}.png")).succeeded();
            place.run(&format!("eqim-export inspect {target}")).succeeded();
            let candle = place.run(&format!("eqim-run --engine {target} --backend candle --tokens 4 -o no.png"));
            candle.failed(2, &["INT8", "ONNX Runtime"]);
        }
    }
}

/// Asserts that the checker of the Python package onnx accepts the graphs of a bundle.
fn checker_accepts(place: &Workplace, bundle: &str) {
    let graphs = Stage::ALL.map(|stage| place.path(bundle).join(format!("{}.onnx", stage.name())));
    let mut command = Command::new("python3");
    command.arg(file("tests/check_onnx.py")).args(&graphs);
    let output = command.env("PYTHONPATH", file(".native/python")).output().unwrap();
    assert!(output.status.success(), "{bundle}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The demo model on the photographs that it was trained with. On a CPU, its decoder gains from INT8.
#[test]
fn the_demo_model_keeps_its_images() {
    let place = Workplace::new(&Fixture::open(fixtures()));
    let model = file("assets/demo/model.safetensors").display().to_string();
    let report: Value = serde_json::from_slice(&std::fs::read(file("assets/demo/report.json")).unwrap()).unwrap();
    std::fs::create_dir(place.path("photos")).unwrap();
    for photo in ["training", "held_out"].iter().flat_map(|part| report[part].as_array().unwrap()) {
        let photo = file(photo[0].as_str().unwrap());
        std::fs::copy(&photo, place.path("photos").join(photo.file_name().unwrap())).unwrap();
    }
    // Fewer steps run the same products with the same weights in less time.
    let line = format!("eqim-export onnx --generator {model} --tokenizer {model} --steps 5");
    place.run(&format!("{line} --no-validate -o bundle")).succeeded();
    place.run("eqim-export calibrate --engine bundle --images photos --resize -o table.json").succeeded();
    for options in ["decoder --for cpu --force", "step,flow,decoder --for tensorrt"] {
        place.run(&format!("{line} --int8 {options} --calibration table.json -o int8")).succeeded();
        let report: Value = serde_json::from_slice(&place.read("int8/quantization.json")).unwrap();
        for image in report["images"].as_array().unwrap() {
            let psnr = image["psnr"].as_f64().unwrap();
            println!("{options}: {psnr:.1} dB");
            assert!(psnr >= 30.0, "{options}: {psnr} dB");
        }
    }
}

#[test]
fn fp16_around_int8() {
    let fixture = Fixture::open(fixtures());
    let place = place(&fixture);
    let line = format!("{} --int8 --calibration table.json --dtype fp16", export_line(&fixture));
    place.run(&format!("{line} -o half")).succeeded();
    checker_accepts(&place, "half");
    place.refused(&format!("{line} --int8-target cpu -o no"));
    place.refused(&format!("{line} --opset 17 -o no"));
    insta::assert_snapshot!(place.messages());
}

#[test]
fn stages_and_scopes_can_be_left_out() {
    let fixture = Fixture::open(fixtures());
    let place = place(&fixture);
    let line = format!("{} --int8 decoder --calibration table.json --no-validate", export_line(&fixture));
    place.run(&format!("{line} --keep decoder\\.up\\.0 --keep conv2$ -o some")).succeeded();
    let config: Value = serde_json::from_slice(&place.read("some/config.json")).unwrap();
    let quantization = &config["quantization"];
    assert_eq!(quantization["stages"], serde_json::json!(["decoder"]));
    let scopes: Vec<&str> = quantization["scopes"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
    assert!(scopes.contains(&"decoder.mid.block_1.conv1"), "{scopes:?}");
    assert!(scopes.iter().all(|scope| scope.starts_with("decoder.")), "{scopes:?}");
    assert!(!scopes.iter().any(|scope| scope.starts_with("decoder.up.0") || scope.ends_with("conv2")), "{scopes:?}");
    place.refused(&format!("{line} --exclude nonsense -o no"));
    place.refused(&format!("{line} --exclude ( -o no"));
    place.refused(&format!("{line} --for cpu --w8a8 adaLN -o no"));
    place
        .run(&format!("{} --int8 nonsense --calibration table.json -o no", export_line(&fixture)))
        .failed(2, &["decoder"]);
    insta::assert_snapshot!(place.messages());
}

#[test]
fn below_the_floor_nothing_is_written_unless_forced() {
    let fixture = Fixture::open(fixtures());
    let place = place(&fixture);
    let line = format!("{} --int8 --calibration table.json --min-psnr 200", export_line(&fixture));
    let failed =
        place.run(&format!("{line} -o out")).failed(1, &["below the floor of 200", "--force", "--sensitivity"]);
    assert!(failed.stdout.contains("INT8 fails: an image of 16 tokens is"), "{}", failed.stdout);
    assert!(!place.path("out").exists());
    place.run(&format!("{line} --force -o out")).succeeded();
    let text = String::from_utf8(place.read("out/quantization.txt")).unwrap();
    assert!(text.starts_with("INT8 fails: "), "{text}");
}

#[test]
fn the_sensitivity_search_ranks_scopes_and_keeps_the_worst_out() {
    let fixture = Fixture::open(fixtures());
    let place = place(&fixture);
    let ranked = place.run(&format!("{CALIBRATE} -o ranked.json --sensitivity --for cpu")).succeeded();
    let table: Value = serde_json::from_slice(&place.read("ranked.json")).unwrap();
    let found = &table["sensitivity"];
    let scopes = found["scopes"].as_array().unwrap();
    let psnr: Vec<f64> = scopes.iter().map(|scope| scope["psnr"].as_f64().unwrap_or(f64::INFINITY)).collect();
    assert!(scopes.len() > 20 && psnr.is_sorted(), "{psnr:?}");
    assert!(found["exclude"].as_array().unwrap().is_empty() && ranked.stdout.contains("scope alone in INT8"));
    let all = found["psnr"].as_f64().unwrap();

    // A floor between the PSNR with all scopes in INT8 and the PSNR with only the worst scope in INT8.
    let floor = all + 3.0;
    place.run(&format!("{CALIBRATE} -o kept.json --sensitivity --for cpu --min-psnr {floor}")).succeeded();
    let table: Value = serde_json::from_slice(&place.read("kept.json")).unwrap();
    let found = &table["sensitivity"];
    assert!(found["psnr"].as_f64().unwrap() >= floor, "{found}");
    let excluded = found["exclude"].as_array().unwrap();
    assert!(!excluded.is_empty() && excluded.len() < scopes.len());
    assert!(excluded.iter().any(|scope| *scope == scopes[0]["scope"]));

    let line = format!(
        "{} --int8 prefill,step,flow,decoder --calibration kept.json --for cpu --no-validate -o out",
        export_line(&fixture)
    );
    place.run(&line).succeeded();
    let config: Value = serde_json::from_slice(&place.read("out/config.json")).unwrap();
    let quantized = config["quantization"]["scopes"].as_array().unwrap();
    assert_eq!(quantized.len() + excluded.len(), scopes.len());
    assert!(excluded.iter().all(|scope| !quantized.contains(scope)));
    // No scope in INT8 reaches this floor: all scopes are excluded, and the image is the FP32 image.
    place.run(&format!("{CALIBRATE} -o none.json --sensitivity --for cpu --min-psnr 1000")).succeeded();
    let table: Value = serde_json::from_slice(&place.read("none.json")).unwrap();
    let found = &table["sensitivity"];
    assert_eq!(found["exclude"].as_array().unwrap().len(), scopes.len());
    assert!(found["psnr"].is_null(), "{found}");
}

#[test]
fn calibration_refuses_what_does_not_fit() {
    let fixture = Fixture::open(fixtures());
    let place = Workplace::with_bundle(&fixture);
    let engine = fixture.engine(WeightSet::Ema);
    let height = engine_config(&engine).tokenizer.image_height() as u32;
    let calibrate = |images: &str| format!("eqim-export calibrate --engine bundle --images {images} -o table.json");
    place.refused(&calibrate("nothing"));
    std::fs::create_dir(place.path("empty")).unwrap();
    place.refused(&calibrate("empty"));
    place.run("eqim-export calibrate --engine bundle -o table.json").failed(2, &["--images"]);
    std::fs::create_dir(place.path("tall")).unwrap();
    picture(200, height + 1, 1).save(place.path("tall/a.png")).unwrap();
    place.refused(&calibrate("tall"));
    place.run(&format!("{} --resize --rollouts 1 --tokens 4", calibrate("tall"))).succeeded();
    std::fs::remove_file(place.path("table.json")).unwrap();
    std::fs::create_dir(place.path("broken")).unwrap();
    place.write("broken/a.png", "no picture");
    place.refused(&calibrate("broken"));
    write_pictures(&place.path("photos"), &engine);
    place.refused(&calibrate("photos").replace("table.json", "no/table.json"));
    place.refused(&format!("{} --estimator mean", calibrate("photos")));
    place.refused(&format!("{} --min-psnr 40", calibrate("photos")));
    let lock = Lock::beside(&place.path("table.json.partial")).unwrap();
    place.run(&calibrate("photos")).failed(1, &["table.json.partial: is in use by process"]);
    drop(lock);
    place.write("table.json.partial", "{}");
    place.refused(&calibrate("photos"));
    // A state whose numbers were changed, with and without its hash.
    let state = calibration_state(&engine, &place.path("photos"));
    let (hash, text) = state.split_once('\n').unwrap();
    let edited = text.replacen(r#""end":"#, r#""end":-"#, 1);
    for state in [format!("{hash}\n{edited}"), format!("{}\n{edited}", sha256(&edited)), format!("{hash}\n")] {
        place.write("table.json.partial", state);
        place.refused(&calibrate("photos"));
    }

    let line = export_line(&fixture);
    place.run(&format!("{line} --dtype fp16 --no-validate -o half")).succeeded();
    place.refused(&calibrate("photos").replace("bundle", "half"));
    insta::assert_snapshot!(place.messages());
}

/// The state of a calibration after its first picture.
fn calibration_state(engine: &CandleEngine, photos: &Path) -> String {
    let (config, weights) = (engine_config(engine), engine.weights());
    let state = tempfile::NamedTempFile::new().unwrap();
    std::fs::remove_file(state.path()).unwrap();
    let model = fingerprint(config, weights).unwrap();
    let mut collection = Collection::open(state.path(), &model, &samples(photos, engine)).unwrap();
    collection.next(config, weights, photos).unwrap();
    collection.save(state.path()).unwrap();
    std::fs::read_to_string(state.path()).unwrap()
}

/// A picture that cannot be used stops nothing, and neither does one that is removed while a calibration is unfinished.
#[test]
fn pictures_that_cannot_be_used_are_skipped() {
    let fixture = Fixture::open(fixtures());
    let place = Workplace::with_bundle(&fixture);
    write_pictures(&place.path("photos"), &fixture.engine(WeightSet::Ema));
    place.run(&format!("{CALIBRATE} -o whole.json")).succeeded();
    place.write("photos/c.jpg", b"\xff\xd8\xff\xe0 no picture");
    picture(200, 31, 1).save(place.path("photos/low.png")).unwrap();
    place.write("photos/._a.png", "AppleDouble");
    let said = place.run(&format!("{CALIBRATE} -o table.json")).succeeded().stderr;
    assert!(said.contains("2 pictures (2 skipped)"), "{said}");
    for name in ["skipped: photos/c.jpg: is a truncated JPEG", "skipped: photos/low.png: is 31 pixels high"] {
        assert!(said.contains(name), "{said}");
    }
    assert_eq!(place.read("whole.json"), place.read("table.json"));
    for line in ["--equivariance --positions 20", "--tiling --tokens 64"] {
        let said = place.run(&format!("eqim-bench --engine bundle --images photos {line}")).succeeded().stderr;
        // Other heights are scaled.
        assert!(said.contains("3 pictures (1 skipped)") && said.contains("skipped: photos/c.jpg"), "{said}");
    }
}

/// Class names are labels: a model with other names is the same model.
#[test]
fn a_table_fits_the_model_with_other_class_names() {
    let fixture = Fixture::open(fixtures());
    let place = place(&fixture);
    place.write("names.txt", "field\nforest\nsea\nwater\nsky\n");
    let line = format!("{} --class-names names.txt --no-validate", export_line(&fixture));
    place.run(&format!("{line} --int8 --calibration table.json -o int8")).succeeded();
    place.run(&format!("{line} -o bundle")).succeeded();
    place.run(&format!("{CALIBRATE} -o named.json")).succeeded();
    let [unnamed, named]: [Value; 2] =
        ["table.json", "named.json"].map(|table| serde_json::from_slice(&place.read(table)).unwrap());
    assert_eq!(unnamed["model"], named["model"]);
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let [first, second] = all();
    let place = place(&first);
    let other = Workplace::new(&second);
    let export = |table: &str| format!("{} --int8 --calibration {table} -o out", export_line(&first));
    other.write("table.json", place.read("table.json"));
    let line = format!("{} --int8 --calibration table.json -o out", export_line(&second));
    other.refused(&line);
    place.run(&format!("{} --int8 -o out", export_line(&first))).failed(2, &["--calibration"]);
    place.run(&format!("{} --calibration table.json -o out", export_line(&first))).failed(2, &["--int8"]);
    place.refused(&export("nothing.json"));
    place.write("text.json", "no table");
    place.refused(&export("text.json"));

    let table: Value = serde_json::from_slice(&place.read("table.json")).unwrap();
    let scope = "decoder.up.0.block.0.conv1";
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut table = table.clone();
        edit(&mut table);
        place.write("edited.json", table.to_string());
    };
    edited(&|table| table["scopes"][scope]["scale"] = 0.0.into());
    place.refused(&export("edited.json"));
    edited(&|table| table["scopes"][scope]["input"]["low"] = 1.0.into());
    place.refused(&export("edited.json"));
    edited(&|table| table["format"] = 7.into());
    place.refused(&export("edited.json"));
    edited(&|table| drop(table["scopes"].as_object_mut().unwrap().remove(scope)));
    place.refused(&export("edited.json"));
    insta::assert_snapshot!(place.messages());
    insta::assert_snapshot!(other.messages());
}
