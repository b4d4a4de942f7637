//! TensorRT: NVIDIA's parser and builder on the fixture, and the runtime without an NVIDIA driver.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use eqim::model::Stage;
use eqim_engines::trt::EngineSet;
use eqim_export::onnx;
use eqim_export::trt::{Limits, Shapes, check};
use prost::Message;
use serde_json::Value;

use crate::common::bins::{Workplace, program};
use crate::common::{Fixture, fixtures};

fn first() -> Fixture {
    Fixture::open(fixtures())
}

/// Edits the sidecar file of the engines.
fn edit(place: &Workplace, edit: impl FnOnce(&mut Value)) {
    let mut sidecar: Value = serde_json::from_slice(&place.read("bundle/trt/engines.json")).unwrap();
    edit(&mut sidecar);
    place.write("bundle/trt/engines.json", sidecar.to_string());
}

#[test]
#[cfg_attr(not(feature = "tensorrt"), ignore = "built without TensorRT: `cargo xtask test` builds with it")]
fn engines_of_every_precision_for_one_and_for_two_targets() {
    let place = Workplace::with_bundle(&first());
    for precision in ["fp32", "fp16", "bf16"] {
        for targets in ["sm86", "sm86,sm120"] {
            let line = format!(
                "eqim-export trt --engine bundle --{precision} --target {targets} --max-batch 8 --max-tokens 64 \
                 --no-validate"
            );
            let built = place.run(&line).succeeded();
            assert_eq!(built.stdout.matches("Engine built in ").count(), 5, "{}", built.stdout);
            assert!(!built.stdout.contains("-[x]"));
            let set: EngineSet = serde_json::from_slice(&place.read("bundle/trt/engines.json")).unwrap();
            assert_eq!(set.tensorrt, "TensorRT-RTX 1.7.1");
            let found: Vec<String> = set.targets.iter().map(ToString::to_string).collect();
            assert_eq!(found.join(","), targets);
            for stage in Stage::ALL {
                let engine = &set.engines[stage.name()];
                assert_eq!(engine.precision.to_string(), precision);
                engine.file.verify(&place.path("bundle/trt")).unwrap();
                let kind =
                    ["FLOAT", "HALF", "BF16"][["fp32", "fp16", "bf16"].iter().position(|&p| p == precision).unwrap()];
                assert!(engine.layers.iter().any(|layers| layers.precision == kind), "{:?}", engine.layers);
                assert!(engine.layers.iter().all(|layers| {
                    let product = ["MATRIX_MULTIPLY", "CONVOLUTION"].contains(&layers.kind.as_str());
                    !product || layers.precision == kind
                }));
                // Normalizations and softmax stay in FP32.
                let precise = |kind: &str| ["SOFTMAX", "NORMALIZATION"].contains(&kind);
                let mut layers = engine.layers.iter().filter(|layers| precise(&layers.kind));
                assert!(layers.all(|layers| layers.precision == "FLOAT"), "{:?}", engine.layers);
            }
            assert_eq!(set.engines["transformer_step"].profiles["token"].max, [16, 8]);
            assert_eq!(set.engines["decoder"].profiles["tokens"].min, [1, 2, 8]);
            assert_eq!(set.engines["decoder"].profiles["tokens"].max, [8, 64, 8]);
        }
    }
    let shown = place.run("eqim-export inspect bundle").succeeded().stdout;
    for words in
        ["TensorRT-RTX 1.7.1 for sm86, sm120", "decoder.engine, bf16", "1x2x8 … 1x16x8 … 8x64x8", "CONVOLUTION BF16"]
    {
        assert!(shown.contains(words), "no {words:?} in {shown}");
    }
    let json: Value = serde_json::from_str(&place.run("eqim-export inspect bundle --json").succeeded().stdout).unwrap();
    assert_eq!(json["engines"]["engines"]["encoder"]["precision"], "bf16");
    // Another export to a bundle with engines removes the engines.
    place
        .run("eqim-export onnx --generator generator.pth --tokenizer tokenizer.ckpt --heads 2 --no-validate -o bundle")
        .succeeded();
    assert!(!place.path("bundle/trt").exists());
}

#[test]
#[cfg_attr(not(feature = "tensorrt"), ignore = "built without TensorRT: `cargo xtask test` builds with it")]
fn fp16_is_compared_with_fp32_and_the_report_kept() {
    let place = Workplace::with_bundle(&first());
    let before = place.listing();
    let line = "eqim-export trt --engine bundle --fp16 --target sm86";
    let refused = place.run(&format!("{line} --atol 1e-9")).failed(1, &["drift: the fp16 graphs", "--atol"]);
    assert!(refused.stdout.contains("-[x] rollout of 16 tokens"), "{}", refused.stdout);
    assert_eq!(before, place.listing(), "engines that drift were written");
    place.run(line).succeeded();
    let drift: Value = serde_json::from_slice(&place.read("bundle/trt/drift.json")).unwrap();
    assert_eq!(drift["rollouts"].as_array().unwrap().len(), 3);
    let names = ["decoder", "encoder", "flow_sampler", "prefill", "transformer_step"];
    let mut expected: Vec<String> = names.iter().map(|name| format!("{name}.engine")).collect();
    expected.extend(["drift.json".into(), "engines.json".into()]);
    expected.sort();
    assert_eq!(place.listing_of("bundle/trt"), expected);
}

#[test]
#[cfg_attr(not(feature = "tensorrt"), ignore = "built without TensorRT: `cargo xtask test` builds with it")]
fn engines_in_int8_with_the_scales_of_a_table() {
    let place = Workplace::with_bundle(&first());
    std::fs::create_dir(place.path("photos")).unwrap();
    let wave = |x: u32, y: u32| image::Rgb([x * 7, y * 5, x + y].map(|value| value as u8));
    image::RgbImage::from_fn(64, 32, wave).save(place.path("photos/a.png")).unwrap();
    let calibrate = "eqim-export calibrate --engine bundle --images photos --rollouts 1 --tokens 4 -o table.json";
    place.run(&format!("{calibrate} --resize")).succeeded();
    for targets in ["sm86", "sm86,sm89,sm120"] {
        let line =
            format!("eqim-export trt --engine bundle --int8 --calibration table.json --w8a8 adaLN --target {targets}");
        let checked = place.run(&format!("{line} --check-only")).succeeded().stdout;
        for words in ["decoder.onnx: all", "products W8A8, 0 weight-only", "weight-only), compiles for sm"] {
            assert!(checked.contains(words), "{words}: {checked}");
        }
        assert!(!checked.contains("-[x]") && !place.path("bundle/trt/quantization.json").exists());
        place.run(&format!("{line} --no-validate")).succeeded();
        let set: Value = serde_json::from_slice(&place.read("bundle/trt/engines.json")).unwrap();
        for stage in Stage::ALL {
            let engine = &set["engines"][stage.name()];
            let int8 = matches!(stage, Stage::Step | Stage::Flow | Stage::Decoder);
            assert_eq!((engine["int8"].as_bool(), engine["precision"].as_str()), (Some(int8), Some("fp16")));
            let layers = engine["layers"].as_array().unwrap();
            let quantized = layers.iter().any(|layer| layer["kind"] == "QUANTIZE");
            let dequantized = layers.iter().any(|layer| layer["kind"] == "DEQUANTIZE");
            assert_eq!(quantized, matches!(stage, Stage::Decoder | Stage::Flow), "{engine}");
            assert_eq!(dequantized, int8, "{engine}");
        }
    }
    place.run("eqim-export trt --engine bundle --int8 --calibration table.json --target sm86 --force").succeeded();
    let report: Value = serde_json::from_slice(&place.read("bundle/trt/quantization.json")).unwrap();
    assert_eq!(report["precision"], "fp16");
    let onnx = "eqim-export onnx --generator generator.pth --tokenizer tokenizer.ckpt --heads 2";
    place.run(&format!("{onnx} --int8 --calibration table.json --no-validate -o quantized")).succeeded();
    place.refused("eqim-export trt --engine quantized --fp16 --target sm86");
    insta::assert_snapshot!(place.messages());
}

#[test]
#[cfg_attr(not(feature = "tensorrt"), ignore = "built without TensorRT: `cargo xtask test` builds with it")]
fn what_a_target_does_not_support_is_named() {
    let place = Workplace::with_bundle(&first());
    let before = place.listing();
    let line = "eqim-export trt --engine bundle --check-only --target turing,sm86";
    let found = place.run(&format!("{line} --fp32")).failed(1, &["TensorRT does not support"]).stdout;
    for words in ["-[x] decoder.onnx", "(Gemm) on sm75", "FP32 GEMM is not supported", "build in FP16"] {
        assert!(found.contains(words), "no {words:?} in {found}");
    }
    assert!(!found.contains("on sm86"), "{found}");
    let found = place.run(&format!("{line} --bf16")).failed(1, &[]).stdout;
    assert!(found.contains("on sm75") && found.contains("build in FP16"), "{found}");
    let found = place.run(&format!("{line} --fp16")).succeeded().stdout;
    assert_eq!(found.matches("-[✓]").count(), 5, "{found}");
    assert_eq!(before, place.listing(), "--check-only wrote something");
}

#[test]
#[cfg_attr(not(feature = "tensorrt"), ignore = "built without TensorRT: `cargo xtask test` builds with it")]
fn nodes_that_the_parser_does_not_take_are_named_all() {
    let place = Workplace::with_bundle(&first());
    let path = place.path("bundle/decoder.onnx");
    let mut model = onnx::ModelProto::decode(&std::fs::read(&path).unwrap()[..]).unwrap();
    let nodes = &mut model.graph.as_mut().unwrap().node;
    let mut names = vec![];
    for node in nodes.iter_mut().filter(|node| node.op_type.as_deref() == Some("Conv")).skip(1).step_by(4).take(2) {
        node.op_type = Some("QLinearConv".into());
        names.push(node.name.clone().unwrap());
    }
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    let config = first().engine(eqim::checkpoint::WeightSet::Ema);
    let config = eqim::engine::Engine::config(&config);
    let shapes = Shapes::default;
    let limits = Limits { max_batch: 2, max_tokens: 16, min: shapes(), opt: shapes(), max: shapes() };
    let profiles = limits.profiles(Stage::Decoder, config).unwrap();
    let support = check("decoder", &path, &profiles, &["sm86".parse().unwrap()]).unwrap();
    let found: Vec<&String> = support.unsupported.iter().map(|node| &node.node).collect();
    assert_eq!(found, names.iter().collect::<Vec<_>>());
    assert!(support.unsupported.iter().all(|node| node.operator == "QLinearConv" && !node.reason.is_empty()));
    println!("{}", support.text());
    assert!(support.text().contains("2 of "), "{}", support.text());
}

#[test]
#[cfg_attr(not(feature = "tensorrt"), ignore = "built without TensorRT: `cargo xtask test` builds with it")]
fn lines_that_cannot_be_done_are_refused() {
    let place = Workplace::with_bundle(&first());
    for arguments in [
        "--int8",
        "--fp16 --target sm90",
        "--fp16 --target sm77",
        "--fp16 --max-batch 0",
        "--fp16 --max-tokens 1",
        "--fp16 --maxShapes tokens:1x2",
        "--fp16 --maxShapes times:1000",
        "--fp16 --minShapes tokens:1x1x8",
        "--fp16 --minShapes what:1",
        "--fp16 --fp32",
        "",
    ] {
        place.refused(format!("eqim-export trt --engine bundle {arguments}").trim_end());
    }
    place.refused("eqim-export trt --engine missing --fp16");
    let half =
        "eqim-export onnx --generator generator.pth --tokenizer tokenizer.ckpt --heads 2 --no-validate --dtype fp16";
    place.run(&format!("{half} -o half")).succeeded();
    place.refused("eqim-export trt --engine half --fp32");
    place.run("eqim-export trt --engine half --fp16 --target sm86 --no-validate").succeeded();
    let set: EngineSet = serde_json::from_slice(&place.read("half/trt/engines.json")).unwrap();
    // At the precision of the bundle, the engines are built from the exported graphs without changes.
    assert!(set.engines.values().all(|engine| engine.graph == engine.lowered));
    insta::assert_snapshot!(place.messages());
}

#[test]
#[cfg_attr(not(feature = "tensorrt"), ignore = "built without TensorRT: `cargo xtask test` builds with it")]
fn a_build_that_is_killed_leaves_the_bundle_as_it_was() {
    let place = Workplace::with_bundle(&first());
    for older in [false, true] {
        if older {
            place.run("eqim-export trt --engine bundle --fp32 --target sm86 --no-validate").succeeded();
        }
        let listing = || -> Vec<_> {
            place.listing().into_iter().filter(|(path, _)| path.starts_with(place.path("bundle"))).collect()
        };
        let before = listing();
        let mut child = Command::new(program("eqim-export"))
            .args(["trt", "--engine"])
            .arg(place.path("bundle"))
            .args(["--fp16", "--target", "sm86,sm120", "--no-validate"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let built = lines.filter(|line| line.contains("Engine built in")).nth(1);
        assert!(built.is_some(), "the build ended before it could be killed");
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success());
        assert_eq!(before, listing());
        place.run("eqim-run --engine bundle --backend ort --tokens 3 -o out.png").succeeded();
    }
}

#[test]
#[cfg_attr(not(feature = "tensorrt"), ignore = "built without TensorRT: `cargo xtask test` builds with it")]
fn the_runtime_stops_at_the_driver() {
    let place = Workplace::with_bundle(&first());
    let line = "eqim-run --engine bundle --tokens 3 -o out.png --backend";
    place.run(&format!("{line} trt")).failed(2, &["has no TensorRT engines", "eqim-export trt"]);
    place.run("eqim-export trt --engine bundle --fp16 --target sm86 --no-validate").succeeded();
    // A library that cannot be loaded stands in the way of the driver's, so that a machine with a GPU has none either.
    std::fs::create_dir(place.path("drivers")).unwrap();
    for name in ["libcuda.so", "libcuda.so.1"] {
        place.write(&format!("drivers/{name}"), "no library");
    }
    let drivers = place.path("drivers");
    let no_driver = [("LD_LIBRARY_PATH", drivers.to_str().unwrap())];
    place
        .run_with(&format!("{line} trt"), &no_driver)
        .failed(1, &["no NVIDIA driver was found", "choose the backend ort"]);
    assert!(!place.path("out.png").exists());
    let auto = place.run_with(&format!("{line} auto"), &no_driver).succeeded();
    assert!(auto.stderr.contains("TensorRT engines are not used: TensorRT: no NVIDIA driver"), "{}", auto.stderr);
    let picture = place.read("out.png");
    place.run(&format!("{line} ort")).succeeded();
    assert_eq!(picture, place.read("out.png"));
    place.run(&format!("{line} ort --cuda-graph")).failed(2, &["--cuda-graph", "--backend trt"]);

    let missing = [("EQIM_TENSORRT", "nowhere")];
    place.run_with(&format!("{line} trt"), &missing).failed(1, &["EQIM_TENSORRT", "cargo xtask setup"]);
    std::fs::create_dir(place.path("libraries")).unwrap();
    let folder = place.path("libraries");
    let empty = [("EQIM_TENSORRT", folder.to_str().unwrap())];
    place.run_with(&format!("{line} trt"), &empty).failed(1, &["libtensorrt_rtx.so.1", "cannot be loaded"]);
    place.write("libraries/libtensorrt_rtx.so.1", "no library");
    place.run_with(&format!("{line} trt"), &empty).failed(1, &["libtensorrt_rtx.so.1", "cannot be loaded"]);
}

#[test]
#[cfg_attr(not(feature = "tensorrt"), ignore = "built without TensorRT: `cargo xtask test` builds with it")]
fn engines_that_are_stale_or_foreign_are_refused() {
    let place = Workplace::with_bundle(&first());
    place.run("eqim-export trt --engine bundle --fp16 --target sm86 --no-validate").succeeded();
    let sidecar = place.read("bundle/trt/engines.json");
    let run = "eqim-run --engine bundle --tokens 3 -o out.png --backend trt";
    let refused = || {
        place.refused(run);
        place.write("bundle/trt/engines.json", &sidecar);
    };
    edit(&place, |sidecar| sidecar["weights"] = "0".repeat(64).into());
    refused();
    edit(&place, |sidecar| sidecar["model"]["generator"]["window"] = 2.into());
    refused();
    edit(&place, |sidecar| sidecar["engines"]["decoder"]["graph"] = "1".repeat(64).into());
    refused();
    edit(&place, |sidecar| sidecar["format"] = 7.into());
    refused();
    edit(&place, |sidecar| drop(sidecar["engines"].as_object_mut().unwrap().remove("encoder")));
    refused();
    edit(&place, |sidecar| sidecar["targets"] = serde_json::json!(["sm1"]));
    refused();
    edit(&place, |sidecar| sidecar["tensorrt"] = "TensorRT-RTX 1.6.0".into());
    place.run(run).failed(1, &["built by TensorRT-RTX 1.6.0", "is TensorRT-RTX 1.7.1"]);
    place.write("bundle/trt/engines.json", &sidecar);
    place.write("bundle/trt/engines.json", "{");
    refused();

    let engine = place.read("bundle/trt/flow_sampler.engine");
    let mut edited = engine.clone();
    edited[engine.len() / 2] ^= 1;
    place.write("bundle/trt/flow_sampler.engine", edited);
    refused();
    place.write("bundle/trt/flow_sampler.engine", &engine[..engine.len() / 2]);
    refused();
    std::fs::remove_file(place.path("bundle/trt/flow_sampler.engine")).unwrap();
    refused();
    place.write("bundle/trt/flow_sampler.engine", engine);

    // Without `--backend trt`, the run prints a note and uses another backend.
    edit(&place, |sidecar| sidecar["weights"] = "0".repeat(64).into());
    let auto = place.run("eqim-run --engine bundle --tokens 3 -o out.png").succeeded();
    assert!(auto.stderr.contains("engines are not used") && auto.stderr.contains("is stale"), "{}", auto.stderr);
    // TensorRT does not build the same bytes twice, nor in the same time.
    let varying = [("[0-9a-f]{12}…", "[hash]…"), (r"\b\d{6,}\b", "[size]"), (r"column \d+", "column [n]")];
    insta::with_settings!({filters => varying}, { insta::assert_snapshot!(place.messages()) });
}

#[test]
#[cfg_attr(feature = "tensorrt", ignore = "built with TensorRT: the test is about programs without it")]
fn without_the_feature_the_commands_say_so() {
    let place = Workplace::with_bundle(&first());
    place.run("eqim-export trt --engine bundle --fp16").failed(1, &["built without it", "--features"]);
    assert!(!Path::new(&place.path("bundle/trt")).exists());
}
