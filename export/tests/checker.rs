//! Checks whole bundles of both fixture models: the checker of the onnx package accepts them, and names and weights are
//! equal to the checkpoint's.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use eqim::bundle::{Bundle, Precision, WEIGHTS_FILE};
use eqim::checkpoint::{self, Hints, WeightSet};
use eqim::engine::Engine;
use eqim::engine::candle::CandleEngine;
use eqim::model::Stage;
use eqim_export::lower::{NEWEST_OPSET, OLDEST_OPSET};
use eqim_export::onnx::{self, DataType, GraphProto, ModelProto};
use eqim_export::write::{Options, draft};
use prost::Message;

const OPTIONS: [Options; 4] = [
    Options { precision: Precision::Fp32, opset: OLDEST_OPSET, policy: None, functions: true },
    Options { precision: Precision::Fp32, opset: NEWEST_OPSET, policy: None, functions: true },
    Options { precision: Precision::Fp16, opset: OLDEST_OPSET, policy: None, functions: true },
    Options { precision: Precision::Fp16, opset: NEWEST_OPSET, policy: None, functions: true },
];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// Both fixture models.
fn engines() -> [CandleEngine; 2] {
    let fixtures = repository().join("tests/fixtures");
    [(fixtures.clone(), 2), (fixtures.join("other"), 4)].map(|(folder, heads)| {
        let (generator, tokenizer) = (folder.join("generator.pth"), folder.join("tokenizer.ckpt"));
        let hints = Hints { heads: Some(heads), ..Hints::default() };
        let (config, weights) = checkpoint::load(&generator, &tokenizer, WeightSet::Ema, &hints).unwrap();
        CandleEngine::new(config, weights)
    })
}

fn export(engine: &CandleEngine, folder: &Path, options: Options) -> Bundle {
    draft(folder, engine.config(), engine.weights(), options, |_| {}).unwrap().publish().unwrap()
}

fn graph_of(bundle: &Bundle, stage: Stage) -> GraphProto {
    let bytes = std::fs::read(bundle.graph_path(stage).unwrap()).unwrap();
    ModelProto::decode(&bytes[..]).unwrap().graph.unwrap()
}

/// A graph and the loop bodies inside it.
fn nested(graph: &GraphProto) -> Vec<&GraphProto> {
    let attributes = graph.node.iter().flat_map(|node| &node.attribute);
    let bodies = attributes.filter_map(|attribute| attribute.g.as_ref());
    std::iter::once(graph).chain(bodies.flat_map(nested)).collect()
}

fn check(graphs: &[PathBuf]) -> std::process::Output {
    let repository = repository();
    let mut command = Command::new("python3");
    command.arg(repository.join("tests/check_onnx.py")).args(graphs);
    command.env("PYTHONPATH", repository.join(".native/python")).output().unwrap()
}

#[test]
fn the_checker_accepts_every_graph() {
    let folder = tempfile::tempdir().unwrap();
    let mut graphs = vec![];
    for (i, engine) in engines().iter().enumerate() {
        for options in OPTIONS {
            let name = format!("model{i}-{}-{}", options.precision, options.opset);
            let bundle = export(engine, &folder.path().join(name), options);
            graphs.extend(Stage::ALL.map(|stage| bundle.graph_path(stage).unwrap()));
        }
    }
    let output = check(&graphs);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.lines().filter(|line| line.starts_with("OK ")).count(), graphs.len(), "{text}");
}

#[test]
fn the_checker_refuses_a_wrong_graph() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = export(&engines()[0], &folder.path().join("bundle"), OPTIONS[1]);
    let path = bundle.graph_path(Stage::Prefill).unwrap();
    let model = ModelProto::decode(&std::fs::read(&path).unwrap()[..]).unwrap();
    let damage: [fn(&mut GraphProto); 3] = [
        |graph| graph.node.swap(0, 1),
        |graph| graph.output[0] = onnx::value_info("z", DataType::Float16, None),
        |graph| {
            graph.initializer.iter_mut().filter(|tensor| tensor.data_location == Some(1)).for_each(|t| t.dims[0] += 1)
        },
    ];
    for (i, damage) in damage.iter().enumerate() {
        let mut model = model.clone();
        damage(model.graph.as_mut().unwrap());
        std::fs::write(&path, model.encode_to_vec()).unwrap();
        assert!(!check(std::slice::from_ref(&path)).status.success(), "damage {i} went unnoticed");
    }
}

#[test]
fn nodes_are_named_by_the_scopes_of_the_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let engine = &engines()[0];
    let bundle = export(engine, &folder.path().join("bundle"), Options { functions: false, ..OPTIONS[1] });
    for (stage, name) in [
        (Stage::Prefill, "encoder_blocks.0.attn2.k.Gemm"),
        (Stage::Step, "encoder_blocks.0.attn.qkv.Gemm"),
        (Stage::Flow, "diffloss.net.Loop"),
        (Stage::Flow, "diffloss.net.res_blocks.0.in_ln.LayerNormalization"),
        (Stage::Decoder, "decoder.mid.attn_1.q.Conv"),
        (Stage::Encoder, "quant_layer.Conv"),
    ] {
        let graph = graph_of(&bundle, stage);
        let named = |graph: &&GraphProto| graph.node.iter().any(|node| node.name.as_deref() == Some(name));
        assert!(nested(&graph).iter().any(named), "{} has no node {name}", stage.name());
    }

    let weights: BTreeSet<&str> = engine.weights().iter().map(|(name, _)| name).collect();
    for stage in Stage::ALL {
        let graph = graph_of(&bundle, stage);
        for node in nested(&graph).iter().flat_map(|graph| &graph.node) {
            let (name, op) = (node.name.as_deref().unwrap(), node.op_type.as_deref().unwrap());
            if ["Gemm", "Conv"].contains(&op) {
                let scope = name.rsplit_once('.').unwrap().0;
                assert_eq!(node.input[1], format!("{scope}.weight"), "{name}");
                assert!(weights.contains(node.input[1].as_str()), "{name}");
            }
        }
    }
}

#[test]
fn nodes_of_functions_are_named_by_the_scopes_inside_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = export(&engines()[0], &folder.path().join("bundle"), OPTIONS[1]);
    for (stage, call, weight, inner) in [
        (Stage::Step, "encoder_blocks.0.TransformerBlock", "encoder_blocks.0.attn.qkv.weight", "attn.qkv.Gemm"),
        (Stage::Step, "encoder_blocks.2.TransformerBlock", "encoder_blocks.2.mlp.fc2.bias", "mlp.fc2.Gemm"),
        (Stage::Flow, "diffloss.net.FlowSolver", "diffloss.net.res_blocks.0.in_ln.weight", "Loop"),
    ] {
        let model = std::fs::read(bundle.graph_path(stage).unwrap()).unwrap();
        let model = ModelProto::decode(&model[..]).unwrap();
        let graph = model.graph.unwrap();
        let call = graph.node.iter().find(|node| node.name.as_deref() == Some(call)).expect(call);
        let function = model.functions.iter().find(|function| function.name == call.op_type).expect("the function");
        assert_eq!(function.input.len(), call.input.len());
        assert!(call.input.iter().any(|input| input == weight), "{weight}");
        let short = weight.strip_prefix(&format!("{}.", call.name().rsplit_once('.').unwrap().0)).unwrap();
        assert!(function.input.iter().any(|input| input == short), "{short}");
        assert!(function.node.iter().any(|node| node.name.as_deref() == Some(inner)), "{inner}");
    }
}

#[test]
fn names_are_unique() {
    let folder = tempfile::tempdir().unwrap();
    for engine in engines() {
        for options in OPTIONS {
            let bundle = export(&engine, &folder.path().join("bundle"), options);
            for stage in Stage::ALL {
                let graph = graph_of(&bundle, stage);
                let (mut nodes, mut values) = (BTreeSet::new(), BTreeSet::new());
                for graph in nested(&graph) {
                    let inputs = graph.input.iter().map(|value| value.name.clone().unwrap());
                    let initializers = graph.initializer.iter().map(|tensor| tensor.name.clone().unwrap());
                    let results = graph.node.iter().flat_map(|node| node.output.clone());
                    for name in inputs.chain(initializers).chain(results) {
                        assert!(values.insert(name.clone()), "{}: two values {name}", stage.name());
                    }
                    for node in &graph.node {
                        assert!(
                            nodes.insert(node.name.clone().unwrap()),
                            "{}: two nodes {:?}",
                            stage.name(),
                            node.name
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn weights_are_the_checkpoint_s_in_one_external_file() {
    let folder = tempfile::tempdir().unwrap();
    for engine in engines() {
        for options in OPTIONS {
            let dtype = if options.precision == Precision::Fp16 { DType::F16 } else { DType::F32 };
            let bundle = export(&engine, &folder.path().join("bundle"), options);
            let bytes = std::fs::read(bundle.folder.join(WEIGHTS_FILE)).unwrap();
            let mut used = BTreeSet::new();
            for stage in Stage::ALL {
                let graph = graph_of(&bundle, stage);
                let external = graph.initializer.iter().filter(|tensor| tensor.data_location == Some(1));
                for tensor in external {
                    let entry = |key: &str| {
                        let entry = tensor.external_data.iter().find(|entry| entry.key.as_deref() == Some(key));
                        entry.unwrap().value.as_deref().unwrap()
                    };
                    assert_eq!(entry("location"), WEIGHTS_FILE);
                    let [offset, length] = ["offset", "length"].map(|key| entry(key).parse::<usize>().unwrap());
                    let (name, shape) = (tensor.name.as_deref().unwrap(), dims(tensor));
                    let stored =
                        Tensor::from_raw_buffer(&bytes[offset..offset + length], dtype, &shape, &Device::Cpu).unwrap();
                    let expected = engine.weights().get(name, &shape).unwrap().to_dtype(dtype).unwrap();
                    assert_eq!(values(&stored), values(&expected), "{name}");
                    used.insert(name.to_string());
                }
            }
            assert!(used.iter().map(String::as_str).eq(engine.weights().iter().map(|(name, _)| name)));
        }
    }
}

fn dims(tensor: &onnx::TensorProto) -> Vec<usize> {
    tensor.dims.iter().map(|&size| size as usize).collect()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

#[test]
fn exporting_twice_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let engine = &engines()[0];
    for options in OPTIONS {
        let files = ["first", "second"].map(|name| {
            let bundle = export(engine, &folder.path().join(name), options);
            let mut files: Vec<_> =
                std::fs::read_dir(&bundle.folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            files.sort();
            files
                .into_iter()
                .map(|file| (file.clone(), std::fs::read(bundle.folder.join(file)).unwrap()))
                .collect::<Vec<_>>()
        });
        assert_eq!(files[0].len(), Stage::ALL.len() + 2);
        for (first, second) in files[0].iter().zip(&files[1]) {
            assert!(first == second, "{:?} and {:?} differ", first.0, second.0);
        }
    }
}
