//! The kernels of ONNX Runtime's engine against the bodies of the functions that they replace, in the same graphs.

use eqim::bundle::{Bundle, Int8Target, Precision};
use eqim::checkpoint::WeightSet;
use eqim::close::{Tolerance, close, relative_error};
use eqim::model::{Sizes, Stage, ValueKind};
use eqim::request::solver::{Solver, Tableau};
use eqim_calibration::Policy;
use eqim_calibration::policy::patterns;
use eqim_engines::native::find_onnxruntime;
use eqim_engines::onnxruntime::{GraphOptions, Runtime, float_input, float_output, integer_input};
use eqim_export::lower::{NEWEST_OPSET, OLDEST_OPSET};
use eqim_export::write::{Draft, Options, draft};
use ndarray::{Array, ArrayD, IxDyn};
use tempfile::TempDir;

use crate::common::{Fixture, all, fixtures};
use crate::int8::calibrated;

/// Numbers near 1 that differ from one another.
fn wave(shape: &[usize], phase: f32) -> ArrayD<f32> {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i: usize| (i as f32 * 0.7 + phase).sin() * 1.5).collect();
    Array::from_shape_vec(IxDyn(shape), values).unwrap()
}

/// A bundle of a fixture, in FP32 or with the products in INT8 that a policy selects.
fn bundle(folder: &TempDir, fixture: &Fixture, opset: i64, policy: Option<&Policy>) -> Draft {
    let engine = fixture.engine(WeightSet::Ema);
    let options = Options { precision: Precision::Fp32, opset, policy, functions: true };
    draft(&folder.path().join("bundle"), eqim::engine::Engine::config(&engine), engine.weights(), options, |_| {})
        .unwrap()
}

/// Outputs of a stage for these sizes, with or without kernels. `bad` is the value of the first element of the first
/// input, if it is set.
fn run(
    bundle: &Bundle,
    stage: Stage,
    sizes: &Sizes,
    kernels: bool,
    threads: usize,
    bad: Option<f32>,
) -> Vec<ArrayD<f32>> {
    let runtime = Runtime::load(&find_onnxruntime().unwrap_or_else(|problem| panic!("{problem}")), None).unwrap();
    let config = &bundle.manifest.model;
    let functions = if kernels { &bundle.graph(stage).unwrap().functions[..] } else { &[] };
    let options = GraphOptions { threads: Some(threads), kernels: functions, ..GraphOptions::default() };
    let graph = runtime.graph(&bundle.graph_path(stage).unwrap(), options).unwrap();
    let tableau = Tableau::new(Solver::Ab2, sizes.evaluations);
    let mut inputs = vec![];
    for (index, info) in stage.inputs(config).iter().enumerate() {
        let shape = info.shape(sizes);
        let mut values = match info.name.as_str() {
            "times" => Array::from_shape_vec(IxDyn(&shape), tableau.times.clone()).unwrap(),
            "updates" => Array::from_shape_vec(IxDyn(&shape), tableau.updates.clone()).unwrap(),
            _ => wave(&shape, index as f32),
        };
        if let (0, Some(bad), Some(first)) = (index, bad, values.first_mut()) {
            *first = bad;
        }
        inputs.push(match (info.kind, stage) {
            // Positions in and beyond the window.
            (ValueKind::Integer, Stage::Step) => {
                integer_input(&(0..shape[0] as i64).map(|row| 3 * row).collect::<Vec<_>>())
            }
            (ValueKind::Integer, _) => integer_input(&(0..shape[0] as i64).collect::<Vec<_>>()),
            _ => float_input(values.view()),
        });
    }
    let inputs: Vec<_> = inputs.into_iter().map(|input| input.unwrap().into()).collect();
    graph.run(&inputs).unwrap().iter().map(|output| float_output(output).unwrap()).collect()
}

/// Sizes of a stage with `rows` rows, half of them unconditional if `guided`.
fn sizes(rows: usize, guided: bool) -> Sizes {
    Sizes { batch: if guided { rows / 2 } else { rows }, rows, evaluations: 5, tokens: 1, width: 1 }
}

#[test]
fn kernels_in_fp32_compute_what_the_functions_do() {
    let folder = tempfile::tempdir().unwrap();
    for fixture in all() {
        for opset in [OLDEST_OPSET, NEWEST_OPSET] {
            let draft = bundle(&folder, &fixture, opset, None);
            for (rows, guided) in [(1, false), (2, true), (3, false), (5, false), (8, true), (18, true)] {
                for stage in [Stage::Step, Stage::Flow] {
                    let sizes = match stage {
                        Stage::Step => sizes(rows, false),
                        _ => sizes(rows, guided),
                    };
                    let expected = run(&draft.bundle, stage, &sizes, false, 1, None);
                    let mut equal = true;
                    for threads in [1, 2, 3] {
                        let found = run(&draft.bundle, stage, &sizes, true, threads, None);
                        assert_eq!(found.len(), expected.len());
                        for (found, expected) in found.iter().zip(&expected) {
                            let difference = close(found, expected, Tolerance::ACTIVATION);
                            let difference =
                                difference.unwrap_or_else(|error| panic!("{} {sizes:?}: {error}", stage.name()));
                            equal &= difference == 0.0;
                        }
                    }
                    assert!(!equal, "{} {sizes:?}: no sum has another order, so no kernel ran", stage.name());
                }
            }
        }
    }
}

/// Largest relative error of a kernel in INT8 against its function. Sums that differ in the last place can round to
/// neighbouring levels, as in `int8::ONE_PRODUCT`.
const ROUNDED: f32 = 5e-3;

#[test]
fn kernels_in_int8_compute_what_the_functions_do() {
    let folder = tempfile::tempdir().unwrap();
    for fixture in all() {
        let (_, table) = calibrated(&fixture);
        let policy = Policy::new(Int8Target::Cpu, Stage::ALL, table);
        for opset in [OLDEST_OPSET, NEWEST_OPSET] {
            let draft = bundle(&folder, &fixture, opset, Some(&policy));
            for (rows, guided) in [(1, false), (2, true), (3, false), (8, true), (14, true)] {
                for stage in [Stage::Prefill, Stage::Step, Stage::Flow] {
                    let sizes = match stage {
                        Stage::Flow => sizes(rows, guided),
                        _ => sizes(rows.min(3), false),
                    };
                    let expected = run(&draft.bundle, stage, &sizes, false, 1, None);
                    for threads in [1, 2] {
                        let found = run(&draft.bundle, stage, &sizes, true, threads, None);
                        for (found, expected) in found.iter().zip(&expected) {
                            let error = relative_error(found, expected);
                            println!("{} {rows}: {error:.1e}", stage.name());
                            assert!(error <= ROUNDED, "{} {sizes:?}: {error}", stage.name());
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_in_int8_does_not_depend_on_the_other_rows() {
    let folder = tempfile::tempdir().unwrap();
    let (_, table) = calibrated(&Fixture::open(fixtures()));
    let policy = Policy::new(Int8Target::Cpu, Stage::ALL, table);
    let draft = bundle(&folder, &Fixture::open(fixtures()), NEWEST_OPSET, Some(&policy));
    let [alone, together] = [1, 7].map(|rows| run(&draft.bundle, Stage::Step, &sizes(rows, false), true, 2, None));
    let (alone, together) = (&alone[0], &together[0]);
    let first = together.index_axis(ndarray::Axis(0), 0);
    // The products in FP32 outside of the blocks depend on the batch in the last place.
    close(alone.index_axis(ndarray::Axis(0), 0), first, Tolerance::SUMS).unwrap();
}

#[test]
fn variants_of_a_function_have_kernels_too() {
    let folder = tempfile::tempdir().unwrap();
    let fixture = Fixture::open(fixtures());
    let (_, table) = calibrated(&fixture);
    let exclude = patterns("exclude", &[r"encoder_blocks\.1\.mlp|res_blocks\.0\.mlp\.2".into()]).unwrap();
    let policy = Policy { exclude, ..Policy::new(Int8Target::Cpu, Stage::ALL, table) };
    let draft = bundle(&folder, &fixture, NEWEST_OPSET, Some(&policy));
    let functions = &draft.bundle.graph(Stage::Step).unwrap().functions;
    assert_eq!(functions[..], ["DynamicLinear", "TransformerBlock", "TransformerBlock_1"]);
    for stage in [Stage::Step, Stage::Flow] {
        let [found, expected] =
            [true, false].map(|kernels| run(&draft.bundle, stage, &sizes(2, stage == Stage::Flow), kernels, 2, None));
        for (found, expected) in found.iter().zip(&expected) {
            assert!(relative_error(found, expected) <= ROUNDED);
        }
    }
}

#[test]
fn what_is_not_a_number_stays_so() {
    let folder = tempfile::tempdir().unwrap();
    let fixture = Fixture::open(fixtures());
    let (_, table) = calibrated(&fixture);
    let policy = Policy::new(Int8Target::Cpu, Stage::ALL, table);
    for policy in [None, Some(&policy)] {
        let draft = bundle(&folder, &fixture, NEWEST_OPSET, policy);
        for bad in [f32::NAN, f32::INFINITY] {
            for stage in [Stage::Step, Stage::Flow] {
                let outputs = run(&draft.bundle, stage, &sizes(2, false), true, 2, Some(bad));
                assert!(
                    outputs[0].index_axis(ndarray::Axis(0), 0).iter().all(|value| value.is_nan()),
                    "{}",
                    stage.name()
                );
                assert!(
                    outputs[0].index_axis(ndarray::Axis(0), 1).iter().all(|value| value.is_finite()),
                    "{}",
                    stage.name()
                );
            }
        }
    }
}
