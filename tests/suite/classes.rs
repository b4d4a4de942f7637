//! Images whose class changes along the width: each token has its class, overlapping classes are blended, and all
//! backends agree.

use candle_core::{DType, Device, Tensor};
use eqim::Config;
use eqim::bundle::Bundle;
use eqim::checkpoint::WeightSet;
use eqim::close::Tolerance;
use eqim::engine::candle::{CandleEngine, to_array, to_tensor};
use eqim::engine::{Engine, Row};
use eqim::generate::generate;
use eqim::model::Stage;
use eqim::request::condition::{ClassSchedule, ClassSpan};
use eqim::request::{Noise, PreparedRequest, Request};
use eqim_engines::native::find_onnxruntime;
use eqim_engines::onnxruntime::{OrtEngine, Providers};
use ndarray::{Array2, Axis, s};

use crate::common::bins::{Workplace, export_line};
use crate::common::{Fixture, assert_close, fixtures, together};

fn candle() -> CandleEngine {
    Fixture::open(fixtures()).engine(WeightSet::Ema)
}

fn spans(spans: &[(Option<usize>, usize, Option<usize>)]) -> ClassSchedule {
    ClassSchedule::Spans(spans.iter().map(|&(class, begin, end)| ClassSpan { class, begin, end }).collect())
}

fn request(config: &Config, class: ClassSchedule, cfg: f32) -> Request {
    Request { cfg, steps: 4, noise: Noise::Seed(5), ..Request::new(config, [class], 11) }
}

fn tokens(engine: &dyn Engine, label: ClassSchedule, cfg: f32) -> Array2<f32> {
    generate(engine, &request(engine.config(), label, cfg), |_| {}).unwrap().tokens.index_axis_move(Axis(0), 0)
}

#[test]
fn the_same_class_all_along_is_that_class() {
    let engine = candle();
    for cfg in [1.0, 3.0] {
        let one = tokens(&engine, Some(1).into(), cfg);
        assert_eq!(tokens(&engine, spans(&[(Some(1), 0, Some(4)), (Some(1), 4, None)]), cfg), one);
        // Blending equal numbers is exact.
        assert_eq!(tokens(&engine, spans(&[(Some(1), 0, Some(8)), (Some(1), 3, None)]), cfg), one);
    }
}

#[test]
fn tokens_before_a_change_do_not_know_of_it() {
    let engine = candle();
    let [one, other] = [1, 2].map(|class| tokens(&engine, Some(class).into(), 3.0));
    let changing = tokens(&engine, spans(&[(Some(1), 0, Some(5)), (Some(2), 5, None)]), 3.0);
    assert_eq!(changing.slice(s![..5, ..]), one.slice(s![..5, ..]));
    let differ = |a: &Array2<f32>| (a.row(5).to_owned() - changing.row(5)).iter().any(|value| value.abs() > 1e-3);
    assert!(differ(&one) && differ(&other), "token 5 is of the new class, after tokens of the old one");
}

/// Conditions of every token of a row, from direct calls of the stages. The keys and values of the two classes are
/// blended here, by `shares`.
fn by_hand(engine: &CandleEngine, (a, b): (i64, i64), shares: &[f32], given: &Array2<f32>) -> Vec<Vec<f32>> {
    let g = &engine.config().generator;
    let prefill = |label: i64| engine.run(Stage::Prefill, &[Tensor::new(&[label], &Device::Cpu).unwrap()]).unwrap();
    let (a, b) = (prefill(a), prefill(b));
    let mut past =
        vec![Tensor::zeros((1, g.heads, g.window, g.head_dim()), DType::F32, &Device::Cpu).unwrap(); 2 * g.depth];
    let mut all = vec![a[0].flatten_all().unwrap().to_vec1().unwrap()];
    for (position, token) in given.rows().into_iter().enumerate() {
        let share = f64::from(shares[position + 1]);
        let cross =
            a[1..].iter().zip(&b[1..]).map(|(a, b)| ((a * (1.0 - share)).unwrap() + (b * share).unwrap()).unwrap());
        let mut inputs = vec![to_tensor(token.insert_axis(Axis(0))).unwrap()];
        inputs.push(Tensor::new(&[position as i64], &Device::Cpu).unwrap());
        inputs.extend(past);
        inputs.extend(cross);
        let mut outputs = engine.run(Stage::Step, &inputs).unwrap();
        all.push(outputs.remove(0).flatten_all().unwrap().to_vec1().unwrap());
        past = outputs;
    }
    all
}

#[test]
fn fading_mixes_keys_and_values_by_their_shares() {
    let engine = candle();
    let label = spans(&[(Some(1), 0, Some(6)), (Some(2), 3, None)]);
    let shares = [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0];
    let given = tokens(&engine, label.clone(), 1.0).slice(s![..7, ..]).to_owned();
    let expected = by_hand(&engine, (1, 2), &shares, &given);
    let none = engine.config().generator.unconditional();
    let mut session = engine.session().unwrap();
    let mut found = session.arrange(&[Row::new(label.condition(0, none))]).unwrap();
    for (position, expected) in expected.iter().enumerate() {
        assert_close(format_args!("token {position}"), &found, expected, Tolerance::ACTIVATION);
        if let Some(token) = given.rows().into_iter().nth(position) {
            session.arrange(&[Row { kept: Some(0), condition: label.condition(position + 1, none) }]).unwrap();
            found = session.step(token.insert_axis(Axis(0)), &[position as i64]).unwrap();
        }
    }
    // A row that begins in the middle of the blend, as in a resumed run.
    let begun = session.arrange(&[Row::new(label.condition(4, none))]).unwrap();
    let first = |class: i64| -> Array2<f32> {
        to_array(&engine.run(Stage::Prefill, &[Tensor::new(&[class], &Device::Cpu).unwrap()]).unwrap()[0]).unwrap()
    };
    assert_close("begun in the middle", &begun, &((first(1) + first(2)) / 2.0), Tolerance::ACTIVATION);
}

/// Class schedules that change, blend or begin without a class, and one constant class.
fn labels() -> Vec<ClassSchedule> {
    vec![
        spans(&[(Some(1), 0, Some(5)), (Some(2), 5, None)]),
        Some(0).into(),
        spans(&[(None, 0, Some(4)), (Some(3), 1, Some(9)), (Some(0), 6, Some(11))]),
        spans(&[(Some(2), 0, Some(10)), (Some(1), 2, None)]),
    ]
}

#[test]
fn images_of_a_batch_change_by_themselves() {
    let engine = candle();
    let requests: Vec<Request> = labels().into_iter().map(|label| request(engine.config(), label, 3.0)).collect();
    let prepared: Vec<PreparedRequest> =
        requests.iter().map(|it| PreparedRequest::new(engine.config(), it).unwrap()).collect();
    let results = together(&engine, &prepared, 3);
    assert_eq!(results.len(), requests.len());
    for (number, found) in results {
        let alone = tokens(&engine, requests[number].classes[0].clone(), 3.0);
        assert_close(format_args!("image {number}"), &found.unwrap(), &alone, Tolerance::ACTIVATION);
    }
}

#[test]
fn onnx_runtime_gives_the_same() {
    let (engine, place) = (candle(), Workplace::new(&Fixture::open(fixtures())));
    for (dtype, tolerance) in [("fp32", Tolerance::SAMPLING), ("fp16", Tolerance::FP16)] {
        let line = export_line(&Fixture::open(fixtures()));
        place.run(&format!("{line} --dtype {dtype} --no-validate -o {dtype}")).succeeded();
        let bundle = Bundle::open(&place.path(dtype)).unwrap();
        let ort =
            OrtEngine::new(&bundle, &find_onnxruntime().expect("cargo xtask setup"), Some(1), &Providers::default())
                .unwrap();
        for (label, cfg) in labels().into_iter().zip([1.0, 3.0, 3.0, 1.0]) {
            let found = tokens(&ort, label.clone(), cfg);
            let expected = tokens(&engine, label.clone(), cfg);
            assert_close(format_args!("{dtype}, {label:?}"), &found, &expected, tolerance);
        }
    }
}

#[test]
fn classes_have_names_on_command_lines() {
    let place = Workplace::new(&Fixture::open(fixtures()));
    let line = format!("{} --no-validate -o bundle", export_line(&Fixture::open(fixtures())));
    for names in [
        "field\nforest",
        "field\nforest\na,b\nwater\nsky",
        "field\n1\nsky\nwater\nmoor",
        "field\nforest\nnone\nwater\nsky",
        "field\n\nforest\nwater\nsky",
    ] {
        place.write("names.txt", names);
        place.refused(&format!("{line} --class-names names.txt"));
    }
    let utf16: Vec<u8> = "field\nforest".encode_utf16().flat_map(u16::to_le_bytes).collect();
    place.write("names.txt", [b"\xff\xfe", &utf16[..]].concat());
    place.refused(&format!("{line} --class-names names.txt"));
    place.write("names.txt", "field\nforest\nopen_sea\nwater\nsky\n");
    place.run(&format!("{line} --class-names names.txt")).succeeded();
    let run = "eqim-run --engine bundle --seed 4 --tokens 9 --cfg 2";
    place.run(&format!("{run} --class open_sea -o named.png")).succeeded();
    place.run(&format!("{run} --class 2 -o numbered.png")).succeeded();
    assert!(place.read("named.png") == place.read("numbered.png"));
    place.refused(&format!("{run} --class ocean -o a.png"));
    place.refused(&format!("{run} --class 5 -o a.png"));
    place.run(&format!("{run} --classes open_sea:0-9 -o spans.png")).succeeded();
    assert!(place.read("spans.png") == place.read("numbered.png"));
    place.run(&format!("{run} --classes open_sea:0-6,1:3- -o blend.png")).succeeded();
    assert!(place.read("blend.png") != place.read("numbered.png"));
    place.refused(&format!("{run} --classes open_sea:0-6,1:7- -o a.png"));
    place.refused(&format!("{run} --classes open_sea:0-6,bog:6- -o a.png"));
    // As Windows writes it, with a class of the same name as another.
    place.write("names.txt", "\u{feff}field\r\nforest\r\nopen sea\r\ncrane\r\ncrane\r\n\r\n\r\n");
    place.run(&format!("{} --class-names names.txt", line.replace("bundle", "doubled"))).succeeded();
    let doubled = run.replace("bundle", "doubled");
    place.refused(&format!("{doubled} --class crane -o a.png"));
    place.run(&format!("{doubled} --class 4 -o crane.png")).succeeded();
    place.run(&format!("{doubled} --class field -o field.png")).succeeded();
    place.run(&format!("{run} --class 0 -o 0.png")).succeeded();
    assert!(place.read("field.png") == place.read("0.png"));
    // The same from a file of jobs.
    let job = r#"{"id": "a", "classes": "open_sea:0-6,1:3-", "seed": 4, "tokens": 9, "cfg": 2}
{"id": "b", "class": "open_sea", "seed": 4, "tokens": 9, "cfg": 2}
"#;
    place.write("jobs.jsonl", job);
    place.run("eqim-run --engine bundle --jobs jobs.jsonl --max-batch 1 -o many").succeeded();
    assert!(place.read("many/a.png") == place.read("blend.png"));
    assert!(place.read("many/b.png") == place.read("numbered.png"));
    insta::assert_snapshot!(place.messages());
}

#[test]
fn a_change_is_resumed_in_its_middle() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    let line = "eqim-run --engine bundle --seed 4 --tokens 30 --cfg 2 --tile 8 --overlap 2 --classes 1:0-20,2:6-";
    place.run(&format!("{line} -o whole.png")).succeeded();
    // A limit on the size of files stops the run after the first tiles.
    let program = crate::common::bins::program("eqim-run").display().to_string();
    let limited = format!("trap '' XFSZ; ulimit -f 1; exec {} -o part.png", line.replace("eqim-run", &program));
    let output =
        std::process::Command::new("bash").args(["-c", &limited]).current_dir(place.path("")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    place.run(&format!("{} -o part.png", line.replace("2:6-", "3:6-"))).failed(2, &["another run"]);
    place.run(&format!("{line} -o part.png")).succeeded();
    assert!(place.read("whole.png") == place.read("part.png"));
}
