//! What the programs do with the system around them: outputs that cannot be written, a standard error that is full, and
//! native libraries and graphs that are not the expected ones.

use std::process::{Command, Stdio};

use eqim::digest::sha256;
use eqim::model::Stage;
use eqim_export::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto};
use prost::Message;
use serde_json::{Value, json};

use crate::common::bins::{Finished, Workplace, export_line, program};
use crate::common::{Fixture, fixtures};

fn first() -> Fixture {
    Fixture::open(fixtures())
}

// Outputs.

/// Command lines that end with the path of a result. They refuse it before they read their other inputs.
fn outputs() -> Vec<String> {
    let export = format!("{} --no-validate -o", export_line(&first()));
    let rest = ["eqim-export calibrate --engine bundle --images none -o", "eqim-bench --engine bundle --export-json"];
    let bench = ["--export-markdown", "--equivariance --images none --plot"];
    let bench = bench.map(|flags| format!("eqim-bench --engine bundle {flags}"));
    [vec![export], rest.map(String::from).into(), bench.into()].concat()
}

#[cfg(unix)]
#[test]
fn outputs_that_cannot_be_written_are_found_before_the_work() {
    let place = Workplace::with_bundle(&first());
    place.write("file", "");
    place.write("target", "");
    std::fs::create_dir(place.path("folder")).unwrap();
    std::os::unix::fs::symlink("target", place.path("link")).unwrap();
    std::os::unix::fs::symlink("nothing", place.path("dangling")).unwrap();
    for line in outputs() {
        for path in ["missing/out", "file/out", "link", "dangling", "."] {
            place.refused(&format!("{line} {path}"));
        }
        place.run(&format!("{line} /dev/null")).failed(2, &["/dev/null: is not a f"]);
        place.run(&format!("{line} /proc/out")).failed(2, &["the folder /proc cannot be written to"]);
        let other = if line.contains("onnx") { "file" } else { "folder" };
        place.refused(&format!("{line} {other}"));
    }
    insta::assert_snapshot!(place.messages());
}

#[cfg(target_os = "linux")]
#[test]
fn a_standard_error_that_cannot_be_written_stops_nothing() {
    let place = Workplace::with_bundle(&first());
    let runs = [
        "eqim-run --engine bundle --backend candle --threads 1 --tokens 3 -o out.png",
        "eqim-run --engine bundle --backend ort --tokens 3 -o out.png",
        &format!("{} -o out", export_line(&first())),
    ];
    for line in runs {
        let full = || Stdio::from(std::fs::File::options().write(true).open("/dev/full").unwrap());
        // The other end of this pipe is closed.
        let closed = || Stdio::from(std::io::pipe().unwrap().1);
        for stderr in [full(), closed()] {
            let mut words = line.split(' ');
            let mut command = Command::new(program(words.next().unwrap()));
            command.args(words).env("EQIM_LOG", "trace").current_dir(place.path(""));
            let status = command.stdout(Stdio::null()).stderr(stderr).status().unwrap();
            assert_eq!(status.code(), Some(0), "{line}");
        }
    }
}

#[cfg(unix)]
#[test]
fn lists_of_classes_are_files() {
    let place = Workplace::new(&first());
    let made = Command::new("mkfifo").arg(place.path("pipe")).status().unwrap();
    assert!(made.success());
    for file in ["/dev/zero", "pipe", "missing", "."] {
        place.refused(&format!("{} --no-validate -o out --class-names {file}", export_line(&first())));
    }
    insta::assert_snapshot!(place.messages());
}

// Native libraries.

/// A library with the two functions of ONNX Runtime that are the same in every version. Using any other one ends the
/// process, as some versions do.
const LIBRARY: &str = r#"
#include <stdlib.h>
typedef struct { const void *(*api)(unsigned); const char *(*version)(void); } Base;
static const void *api(unsigned version) { abort(); }
static const char *version(void) { return VERSION; }
static const Base base = { api, version };
const Base *OrtGetApiBase(void) { return BASE; }
"#;

fn compile(place: &Workplace, name: &str, code: &str, definitions: &[&str]) {
    let source = format!("{name}.c");
    place.write(&source, code);
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o", name, &source]).args(definitions.iter().map(|it| format!("-D{it}")));
    assert!(cc.current_dir(place.path("")).status().unwrap().success());
}

#[test]
fn libraries_that_are_not_the_onnx_runtime_that_is_needed() {
    let place = Workplace::with_bundle(&first());
    let versions = [("old.so", "\"1.20.1\""), ("aborts.so", "\"1.22.1\""), ("odd.so", "\"nightly\""), ("mute.so", "0")];
    for (name, version) in versions {
        compile(&place, name, LIBRARY, &["BASE=&base", &format!("VERSION={version}")]);
    }
    compile(&place, "none.so", LIBRARY, &["BASE=0", "VERSION=\"1.32.0\""]);
    compile(&place, "other.so", "int other(void) { return 0; }", &[]);
    place.write("text.so", "This is no library.\n");
    let mut messages = String::new();
    for name in ["old.so", "aborts.so", "odd.so", "mute.so", "none.so", "other.so", "text.so", "missing.so", "."] {
        for line in ["eqim-run --engine bundle --tokens 3 -o out.png --backend", "eqim-bench --engine bundle --backend"]
        {
            let run = place.run_with(&format!("{line} ort"), &[("ORT_DYLIB_PATH", name)]);
            let message = run.failed(1, &[name]).stderr;
            if !messages.contains(&message) {
                messages += &format!("$ ORT_DYLIB_PATH={name} {line} ort\n{message}\n");
            }
        }
    }
    assert!(!place.path("out.png").exists());
    insta::assert_snapshot!(messages.replace(&place.path("").display().to_string(), "[folder]/"));
}

// Graphs.

/// Replaces the graph of a stage, as if it had been exported.
fn put(place: &Workplace, stage: Stage, model: &[u8]) {
    place.write(&format!("bundle/{}.onnx", stage.name()), model);
    let mut config: Value = serde_json::from_slice(&place.read("bundle/config.json")).unwrap();
    let graph = &mut config["graphs"][stage.name()];
    (graph["sha256"], graph["bytes"]) = (json!(sha256(model)), json!(model.len()));
    place.write("bundle/config.json", config.to_string());
}

fn graph(model: &mut ModelProto) -> &mut GraphProto {
    model.graph.as_mut().unwrap()
}

/// Lets a node, which has the output of before as every input, compute the graph's first output.
fn append(model: &mut ModelProto, mut node: NodeProto) {
    let graph = graph(model);
    let name = graph.output[0].name.clone().unwrap();
    let before = format!("{name}.before");
    for value in graph.node.iter_mut().flat_map(|node| node.input.iter_mut().chain(&mut node.output)) {
        if *value == name {
            value.clone_from(&before);
        }
    }
    node.input.iter_mut().for_each(|input| input.clone_from(&before));
    node.output = vec![name];
    graph.node.push(node);
}

fn node(operator: &str, inputs: usize, attribute: (&str, i64)) -> NodeProto {
    const INTEGER: i32 = 2;
    let (name, i) = (Some(attribute.0.into()), Some(attribute.1));
    NodeProto {
        op_type: Some(operator.into()),
        input: vec![String::new(); inputs],
        attribute: vec![AttributeProto { name, i, kind: Some(INTEGER), ..AttributeProto::default() }],
        ..NodeProto::default()
    }
}

/// Runs every stage of the bundle.
fn run(place: &Workplace) -> Finished {
    place.run("eqim-run --engine bundle --backend ort --prefix prefix.png --tokens 5 --cfg 2 --class 1 -o out.png")
}

#[test]
fn graphs_with_other_outputs_are_refused_by_name() {
    let place = Workplace::with_bundle(&first());
    place.run("eqim-run --engine bundle --tokens 2 -o prefix.png").succeeded();
    let whole = Stage::ALL.map(|stage| place.read(&format!("bundle/{}.onnx", stage.name())));
    let mut messages = String::new();
    let mut refused = |stage: Stage, what: &str, model: &[u8]| {
        put(&place, stage, model);
        let message = run(&place).failed(2, &[stage.name()]).stderr;
        messages += &format!("{}, {what}:\n{message}\n", stage.name());
        put(&place, stage, &whole[stage as usize]);
    };
    for stage in Stage::ALL {
        let model = || ModelProto::decode(&whole[stage as usize][..]).unwrap();
        let other = if stage == Stage::Decoder { Stage::Encoder } else { Stage::Decoder };
        refused(stage, "the graph of another stage", &whole[other as usize]);

        let mut fewer = model();
        graph(&mut fewer).output.pop();
        if stage == Stage::Prefill || stage == Stage::Step {
            refused(stage, "an output less", &fewer.encode_to_vec());
        }

        const HALF: i32 = 10;
        let mut half = model();
        append(&mut half, node("Cast", 1, ("to", HALF.into())));
        let kind = graph(&mut half).output[0].kind.as_mut().unwrap().tensor_type.as_mut().unwrap();
        kind.elem_type = Some(HALF);
        refused(stage, "another type", &half.encode_to_vec());

        let mut flat = model();
        append(&mut flat, node("Flatten", 1, ("axis", 0)));
        let kind = graph(&mut flat).output[0].kind.as_mut().unwrap().tensor_type.as_mut().unwrap();
        kind.shape.as_mut().unwrap().dim = vec![Default::default(); 2];
        refused(stage, "another shape", &flat.encode_to_vec());
    }
    run(&place).succeeded();
    insta::assert_snapshot!(messages);
}

/// The number of rows is symbolic, so these graphs declare what their stage needs.
#[test]
fn graphs_that_give_more_rows_fail_by_name() {
    let place = Workplace::with_bundle(&first());
    place.run("eqim-run --engine bundle --tokens 2 -o prefix.png").succeeded();
    for stage in Stage::ALL {
        let whole = place.read(&format!("bundle/{}.onnx", stage.name()));
        let mut model = ModelProto::decode(&whole[..]).unwrap();
        append(&mut model, node("Concat", 2, ("axis", 0)));
        put(&place, stage, &model.encode_to_vec());
        run(&place).failed(1, &[stage.name()]);
        put(&place, stage, &whole);
    }
    assert!(!place.path("out.png").exists());
    run(&place).succeeded();
}

#[test]
fn weights_that_were_edited_are_found_while_they_are_read() {
    let place = Workplace::with_bundle(&first());
    let mut weights = place.read("bundle/model.safetensors");
    let length = weights.len();
    weights[length - 3] ^= 1;
    place.write("bundle/model.safetensors", weights);
    place.refused("eqim-run --engine bundle --backend candle --tokens 3 -o out.png");
    place.refused("eqim-bench --engine bundle --reference");
    insta::assert_snapshot!(place.messages());
}
