//! Compares the graph of every single primitive on ONNX Runtime with Candle, in FP32 and FP16 and in several operator
//! sets.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use eqim::bundle::{Precision, WEIGHTS_FILE};
use eqim::checkpoint::tensors::{self, TensorFile};
use eqim::checkpoint::{self, Hints, WeightSet};
use eqim::engine::candle::to_array;
use eqim::model::{Dimension, Sizes, Stage, Symbol, ValueInfo, ValueKind};
use eqim::ops::cost::Cost;
use eqim::ops::eager::Eager;
use eqim::ops::{Binary, Conv, Dim, Ops, OpsExt, Unary};
use eqim::request::random::TorchRng;
use eqim::weights::Weights;
use eqim::{Error, Result};
use eqim_engines::native::find_onnxruntime;
use eqim_engines::onnxruntime::{GraphOptions, Runtime, float_input, float_output, half_input, integer_input};
use eqim_export::lower::{Lower, NEWEST_OPSET, OLDEST_OPSET, Places, places};
use eqim_export::onnx::{GraphProto, ModelProto};
use eqim_export::write::{Options, draft};
use half::f16;
use ndarray::{ArrayD, IxDyn};
use prost::Message;

/// Tolerance of primitives that only move values: every bit is kept, also in FP16.
const MOVED: f32 = 0.0;
/// Tolerance of element-wise functions: both sides round a few times, by 6e-8 each.
const ELEMENTWISE: f32 = 1e-6;
/// Tolerance of sums of tens of elements, which the two sides add in different orders.
const SUMS: f32 = 1e-5;
/// Tolerance in FP16: inputs and weights are exact, and results are rounded up to four times, by 5e-4 of their size
/// each.
const HALF: f32 = 2e-3;

/// Sizes of the symbolic axes. The same graph runs with both.
const SIZES: [Sizes; 2] = [
    Sizes { batch: 1, rows: 1, evaluations: 1, tokens: 2, width: 1 },
    Sizes { batch: 3, rows: 1, evaluations: 4, tokens: 5, width: 1 },
];

/// Kinds of the inputs, which alternate. In FP16, caches are in half precision and floats are in FP32. The cases are
/// each kind alone, and both kinds together.
const KINDS: [[ValueKind; 2]; 4] = [
    [ValueKind::Float; 2],
    [ValueKind::Cache; 2],
    [ValueKind::Cache, ValueKind::Float],
    [ValueKind::Float, ValueKind::Cache],
];

/// Names and shapes of weights.
type Parameters = Vec<(String, Vec<usize>)>;

const INDICES: i64 = 4;
const SEED: u64 = 20;

/// A test case of one primitive, for any interpreter.
trait Case {
    /// Axes of the inputs: numbers, or names of the sizes in [`SIZES`]. The prefix `int` makes the values integers
    /// below [`INDICES`].
    const INPUTS: &[&str];
    const TOLERANCE: f32;

    fn run<O: Ops>(o: &mut O, inputs: &[O::Tensor]) -> Result<O::Tensor>;
}

/// Turns every function into a [`Case`] and a test of it.
macro_rules! cases {
    ($(fn $name:ident($o:ident, $($x:ident: $axes:literal),+) within $tolerance:ident $body:block)+) => {
        $(
            #[allow(non_camel_case_types)]
            enum $name {}

            impl Case for $name {
                const INPUTS: &[&str] = &[$($axes),+];
                const TOLERANCE: f32 = $tolerance;

                fn run<O: Ops>($o: &mut O, inputs: &[O::Tensor]) -> Result<O::Tensor> {
                    let [$($x),+] = inputs else { unreachable!("one input for each of INPUTS") };
                    $body
                }
            }

            #[test]
            fn $name() {
                conforms::<$name>();
            }
        )+

        /// Operators of the graphs of all cases.
        fn exercised(precision: Precision, opset: i64) -> BTreeSet<String> {
            let mut all = BTreeSet::new();
            for kinds in KINDS {
                $(
                    let folder = tempfile::tempdir().unwrap();
                    let (model, _) = lower::<$name>(folder.path(), precision, opset, kinds).unwrap();
                    operators(model.graph.as_ref().unwrap(), &mut all);
                )+
            }
            all
        }
    };
}

cases! {
    fn reshape_keeping_an_axis(o, x: "batch 2 6") within MOVED {
        o.reshape(x, &[Dim::Of(x, 0), Dim::Is(4), Dim::Is(3)])
    }

    fn reshape_moving_an_axis(o, x: "batch 4 tokens") within MOVED {
        o.reshape(x, &[Dim::Of(x, 2), Dim::Of(x, 0), Dim::Is(4)])
    }

    fn reshape_to_an_axis_of_another(o, x: "batch 2 tokens", y: "3 tokens") within MOVED {
        o.reshape(x, &[Dim::Rest, Dim::Of(y, 1)])
    }

    fn reshape_to_the_rest(o, x: "batch tokens 4") within MOVED {
        o.reshape(x, &[Dim::Is(2), Dim::Rest, Dim::Is(2)])
    }

    fn expand_by_a_known_size(o, x: "batch 1 4") within MOVED {
        o.expand(x, &[Dim::Of(x, 0), Dim::Is(3), Dim::Is(4)])
    }

    fn expand_to_an_axis_of_another(o, x: "batch 4", y: "tokens 3") within MOVED {
        o.expand(x, &[Dim::Of(y, 0), Dim::Of(x, 0), Dim::Is(4)])
    }

    fn permute(o, x: "batch 2 tokens 3") within MOVED {
        o.permute(x, &[2, 0, 3, 1])
    }

    fn slice(o, x: "batch 6 3") within MOVED {
        o.slice(x, 1, 2, 5)
    }

    fn slice_the_last(o, x: "tokens 3") within MOVED {
        o.slice(x, 0, -1, i64::MAX)
    }

    fn slice_without_the_last(o, x: "batch tokens") within MOVED {
        o.slice(x, 1, 0, -1)
    }

    fn slice_past_both_ends(o, x: "batch tokens") within MOVED {
        o.slice(x, 1, -99, 99)
    }

    fn concat_of_rows(o, x: "batch 3", y: "tokens 3") within MOVED {
        o.concat(&[x, y], 0)
    }

    fn concat_of_columns(o, x: "batch 2 tokens", y: "batch 3 tokens") within MOVED {
        o.concat(&[x, y, x], 1)
    }

    fn gather(o, table: "4 2 3", indices: "int batch") within MOVED {
        o.gather(table, indices)
    }

    fn gather_weights(o, indices: "int batch") within MOVED {
        let table = o.param("table", &[4, 3])?;
        o.gather(&table, indices)
    }

    fn cos(o, x: "batch tokens") within ELEMENTWISE {
        o.unary(Unary::Cos, x)
    }

    fn sin(o, x: "batch tokens") within ELEMENTWISE {
        o.unary(Unary::Sin, x)
    }

    fn silu(o, x: "batch tokens 8") within ELEMENTWISE {
        o.unary(Unary::Silu, x)
    }

    fn gelu(o, x: "batch tokens 8") within ELEMENTWISE {
        o.unary(Unary::Gelu, x)
    }

    fn to_float(o, x: "int batch") within MOVED {
        o.unary(Unary::ToFloat, x)
    }

    fn add(o, a: "batch tokens", b: "batch tokens") within ELEMENTWISE {
        o.binary(Binary::Add, a, b)
    }

    fn sub(o, a: "batch tokens", b: "batch tokens") within ELEMENTWISE {
        o.binary(Binary::Sub, a, b)
    }

    fn mul(o, a: "batch tokens", b: "batch tokens") within ELEMENTWISE {
        o.binary(Binary::Mul, a, b)
    }

    fn add_of_both_broadcast(o, a: "batch 1 4", b: "tokens 1") within ELEMENTWISE {
        o.add(a, b)
    }

    fn sub_of_the_shorter_first(o, a: "4", b: "batch tokens 4") within ELEMENTWISE {
        o.sub(a, b)
    }

    fn mul_by_weights(o, x: "batch tokens 4") within ELEMENTWISE {
        let weight = o.param("weight", &[1, 4])?;
        o.mul(x, &weight)
    }

    fn scale(o, x: "batch tokens") within ELEMENTWISE {
        o.scale(x, -0.7)
    }

    fn clamp(o, x: "batch tokens 8") within MOVED {
        o.clamp(x, -0.5, 0.25)
    }

    fn mean(o, x: "batch 8 tokens") within SUMS {
        o.mean(x, &[1])
    }

    fn mean_over_two_axes(o, x: "batch 2 3 tokens 4") within SUMS {
        o.mean(x, &[2, 4])
    }

    fn softmax(o, x: "batch 3 tokens") within ELEMENTWISE {
        o.softmax(x)
    }

    fn softmax_of_large_scores(o, x: "batch tokens") within ELEMENTWISE {
        let x = o.scale(x, 1000.0)?;
        o.softmax(&x)
    }

    fn matmul(o, a: "batch 2 tokens 8", b: "batch 2 8 3") within SUMS {
        o.matmul(a, b)
    }

    fn matmul_with_both_batches_broadcast(o, a: "batch 1 3 8", b: "2 8 tokens") within SUMS {
        o.matmul(a, b)
    }

    fn gemm(o, x: "batch 8") within SUMS {
        o.gemm(x, 8, 3)
    }

    fn linear_in_nested_scopes(o, x: "batch 8") within SUMS {
        o.scope("blocks.0", |o| {
            let x = o.linear("first", x, 8, 8)?;
            o.linear("second", &x, 8, 3)
        })
    }

    fn layer_norm(o, x: "batch tokens 8") within SUMS {
        o.layer_normalization(x, None, 8, 1e-6)
    }

    fn layer_norm_affine(o, x: "batch 8") within SUMS {
        o.layer_norm("norm", x, 8, 1e-5)
    }

    // The elements are nearly equal, so that epsilon affects the result.
    fn layer_norm_of_little_variance(o, x: "batch tokens 8") within SUMS {
        let x = o.scale(x, 1e-3)?;
        o.layer_normalization(&x, None, 8, 1e-5)
    }

    fn group_norm(o, x: "batch 8 3 tokens") within SUMS {
        let (weight, bias) = (o.param("weight", &[8])?, o.param("bias", &[8])?);
        o.group_normalization(x, (&weight, &bias), 4, 1e-6)
    }

    fn group_norm_of_little_variance(o, x: "batch 8 3 tokens") within SUMS {
        let (weight, bias) = (o.param("weight", &[8])?, o.param("bias", &[8])?);
        let x = o.scale(x, 1e-3)?;
        o.group_normalization(&x, (&weight, &bias), 2, 1e-5)
    }

    fn conv_1d_of_kernel_1(o, x: "batch 4 tokens") within SUMS {
        o.conv(x, Conv { spatial: 1, ..Conv::new(4, 6, 1) })
    }

    fn conv_1d_of_kernel_3(o, x: "batch 4 tokens") within SUMS {
        o.conv1d("conv", x, 4, 6)
    }

    fn conv_2d_of_kernel_1(o, x: "batch 4 3 tokens") within SUMS {
        o.conv1x1("conv", x, 4, 6)
    }

    fn conv_2d_of_kernel_3(o, x: "batch 4 3 tokens") within SUMS {
        o.conv2d("conv", x, 4, 6)
    }

    fn conv_without_padding(o, x: "batch 4 6") within SUMS {
        o.conv(x, Conv { spatial: 1, ..Conv::new(4, 2, 3) })
    }

    fn pad_reflect_1d(o, x: "batch 2 tokens") within MOVED {
        o.pad_reflect(x, 1)
    }

    fn pad_reflect_2d(o, x: "batch 2 3 tokens") within MOVED {
        o.pad_reflect(x, 2)
    }

    fn pixel_shuffle_of_square_patches(o, x: "batch 12 2 tokens") within MOVED {
        o.pixel_shuffle(x, 3, 2, (2, 2))
    }

    fn pixel_shuffle_of_flat_patches(o, x: "batch 6 2 tokens") within MOVED {
        o.pixel_shuffle(x, 3, 2, (2, 1))
    }

    fn fold(o, x: "evaluations batch 3", state: "batch 3") within SUMS {
        o.fold(&[x], state, |o, now, state| {
            let state = o.scale(state, 0.5)?;
            o.add(&state, &now[0])
        })
    }

    // The loop body is the first to use the weights. It also uses a constant and values of the outer graph.
    fn fold_over_captures(o, x: "evaluations", bias: "batch 4") within SUMS {
        let state = o.scale(bias, 0.1)?;
        o.fold(&[x], &state, |o, now, state| {
            let h = o.linear("linear", state, 4, 4)?;
            let h = o.mul(&h, &now[0])?;
            let h = o.scale(&h, 0.3)?;
            o.add(&h, bias)
        })
    }

    // A size that a loop body computes is not a value of the outer graph or of the next body.
    fn fold_with_shapes_of_its_own(o, x: "evaluations tokens", y: "batch tokens") within SUMS {
        let body = |o: &mut O, now: &[O::Tensor], state: &O::Tensor| {
            let h = o.expand(&now[0], &[Dim::Of(y, 0), Dim::Of(&now[0], 0)])?;
            let sum = o.add(state, &h)?;
            o.scale(&sum, 0.5)
        };
        let first = o.fold(&[x], y, body)?;
        let second = o.fold(&[x, x], &first, body)?;
        o.reshape(&second, &[Dim::Rest, Dim::Of(y, 0)])
    }

    fn fold_in_a_fold(o, x: "evaluations tokens", state: "batch 3") within SUMS {
        o.fold(&[x], state, |o, outer, state| {
            o.fold(&[&outer[0]], state, |o, inner, state| {
                let change = o.scale(&inner[0], 0.1)?;
                o.add(state, &change)
            })
        })
    }

    // The loop body captures a value that is renamed to the name of the output.
    fn fold_that_captures_the_output(o, x: "evaluations", y: "batch 3") within ELEMENTWISE {
        let output = o.scale(y, 2.0)?;
        o.fold(&[x], y, |o, _, state| o.add(state, &output))?;
        Ok(output)
    }

    fn an_input_as_output(_o, x: "batch 3") within MOVED {
        Ok(x.clone())
    }

    fn attention(o, q: "batch 2 3 4", kv: "batch 2 tokens 4") within SUMS {
        o.attention(q, kv, kv, None, 4)
    }

    fn attention_with_a_bias(o, q: "batch 2 1 4", k: "batch 2 6 4", v: "batch 2 6 4", bias: "batch 1 1 6") within SUMS {
        o.attention(q, k, v, Some(bias), 4)
    }

    fn modulate(o, x: "batch 4", shift: "1 4", scale: "batch 4") within ELEMENTWISE {
        o.modulate(x, shift, scale)
    }

    fn gated_residual(o, x: "batch 4", gate: "1 4", y: "batch 4") within ELEMENTWISE {
        o.gated_residual(x, gate, y)
    }
}

fn infos<C: Case>(kinds: [ValueKind; 2]) -> Vec<ValueInfo> {
    let info = |(i, axes): (usize, &&str)| {
        let (kind, axes) = axes.strip_prefix("int ").map_or((kinds[i % 2], *axes), |axes| (ValueKind::Integer, axes));
        let symbol = |word: &str| Symbol::ALL.into_iter().find(|symbol| symbol.name() == word).expect("a symbol");
        let axis = |word: &str| word.parse().map_or_else(|_| Dimension::Symbolic(symbol(word)), Dimension::Fixed);
        ValueInfo { name: format!("input{i}"), kind, shape: axes.split(' ').map(axis).collect() }
    };
    C::INPUTS.iter().enumerate().map(info).collect()
}

/// The output of a case, and the names and shapes of its weights. [`Cost`] runs the case at both sizes to find them.
fn count<C: Case>(kinds: [ValueKind; 2]) -> Result<(ValueInfo, Parameters)> {
    let count = |sizes: &Sizes| -> Result<_> {
        let mut cost = Cost::default();
        let inputs: Vec<_> = infos::<C>(kinds).iter().map(|info| info.shape(sizes)).collect();
        Ok((C::run(&mut cost, &inputs)?, cost.into_parameters()))
    };
    let ((small, parameters), (large, _)) = (count(&SIZES[0])?, count(&SIZES[1])?);
    let axis = |(i, (&small, &large)): (usize, (&usize, &usize))| {
        let is = |symbol: &Symbol| SIZES.map(|sizes| sizes.get(*symbol)) == [small, large];
        // The size is not the size of a symbol. No input uses these two symbols.
        let other = || if i.is_multiple_of(2) { Symbol::Rows } else { Symbol::Width };
        let symbol = Symbol::ALL.into_iter().find(is).unwrap_or_else(other);
        if small == large { Dimension::Fixed(small) } else { Dimension::Symbolic(symbol) }
    };
    let shape = small.iter().zip(&large).enumerate().map(axis).collect();
    Ok((ValueInfo { name: "output".into(), kind: kinds[0], shape }, parameters))
}

/// Random values that the precision represents exactly.
fn randn(random: &mut TorchRng, shape: &[usize], precision: Precision) -> Result<Tensor> {
    let values = Tensor::from_vec(random.randn(shape.iter().product()), shape, &Device::Cpu)?;
    Ok(match precision {
        Precision::Fp32 => values,
        Precision::Fp16 => values.to_dtype(DType::F16)?.to_dtype(DType::F32)?,
        Precision::Bf16 => values.to_dtype(DType::BF16)?.to_dtype(DType::F32)?,
    })
}

/// The graph of a case and its weights. The weights are also written to `folder`, for the graph.
fn lower<C: Case>(
    folder: &Path,
    precision: Precision,
    opset: i64,
    kinds: [ValueKind; 2],
) -> Result<(ModelProto, Weights)> {
    let (output, parameters) = count::<C>(kinds)?;
    let (mut random, mut weights, mut stored) = (TorchRng::new(SEED), Weights::default(), vec![]);
    let dtype = if precision == Precision::Fp16 { DType::F16 } else { DType::F32 };
    for (name, shape) in &parameters {
        let tensor = randn(&mut random, shape, precision)?;
        weights.insert(name.clone(), &tensor)?;
        stored.push((name.as_str(), tensor.to_dtype(dtype)?));
    }
    let mut known = Places::new();
    if !stored.is_empty() {
        let file = folder.join(WEIGHTS_FILE);
        tensors::write(&file, &stored, HashMap::new())?;
        known = places(&TensorFile::open(&file)?)?;
    }

    let mut lower = Lower::new(&known, precision, opset, false);
    let inputs: Vec<_> = infos::<C>(kinds).iter().map(|info| lower.input(info)).collect();
    let result = C::run(&mut lower, &inputs)?;
    Ok((lower.finish("case", &[result], &[output]), weights))
}

/// Runs `Found` on ONNX Runtime and `Expected` on Candle, at both sizes. An error names the first difference.
fn compare<Found: Case, Expected: Case>(precision: Precision, opset: i64, kinds: [ValueKind; 2]) -> Result<()> {
    let runtime = Runtime::load(&find_onnxruntime().unwrap_or_else(|problem| panic!("{problem}")), None)?;
    let folder = tempfile::tempdir().unwrap();
    let (model, weights) = lower::<Found>(folder.path(), precision, opset, kinds)?;
    let path = folder.path().join("case.onnx");
    eqim::files::write(&path, &model.encode_to_vec())?;
    let graph = runtime.graph(&path, GraphOptions { threads: Some(1), prepacking: true, ..GraphOptions::default() })?;
    let tolerance = if precision == Precision::Fp16 && Found::TOLERANCE > MOVED { HALF } else { Found::TOLERANCE };

    let mut random = TorchRng::new(SEED + 1);
    for sizes in SIZES {
        let (mut inputs, mut values) = (vec![], vec![]);
        for info in infos::<Found>(kinds) {
            let shape = info.shape(&sizes);
            if info.kind == ValueKind::Integer {
                let integers: Vec<i64> = (0..shape[0] as i64).map(|i| (2 * i + 1) % INDICES).collect();
                values.push(integer_input(&integers)?.into());
                inputs.push(Tensor::from_vec(integers, shape, &Device::Cpu)?);
                continue;
            }
            let input = randn(&mut random, &shape, precision)?;
            let array: ArrayD<f32> = to_array(&input)?;
            values.push(match (info.kind, precision) {
                (ValueKind::Cache, Precision::Fp16) => half_input(array.mapv(f16::from_f32))?.into(),
                _ => float_input(array.view())?.into(),
            });
            inputs.push(input);
        }
        let found = float_output::<IxDyn>(&graph.run(&values)?[0])?;
        let expected = to_array(&Expected::run(&mut Eager::new(&weights), &inputs)?)?;
        close(&found, &expected, tolerance)?;
    }
    Ok(())
}

/// Fails if two values differ by more than `tolerance · max(1, |expected|)`.
fn close(found: &ArrayD<f32>, expected: &ArrayD<f32>, tolerance: f32) -> Result<()> {
    if found.shape() != expected.shape() {
        return Err(Error::run("shape", format!("{:?}, expected {:?}", found.shape(), expected.shape())));
    }
    let near = |found: f32, expected: f32| (found - expected).abs() <= tolerance * expected.abs().max(1.0);
    match found.iter().zip(expected).find(|&(&found, &expected)| !near(found, expected)) {
        Some((found, expected)) => Err(Error::run("value", format!("{found}, expected {expected} ± {tolerance:e}"))),
        None => Ok(()),
    }
}

fn conforms<C: Case>() {
    let check = |precision, opset, kinds| {
        let result = compare::<C, C>(precision, opset, kinds);
        result.unwrap_or_else(|problem| panic!("{precision}, opset {opset}, {kinds:?}: {problem}"));
    };
    for opset in [OLDEST_OPSET, 18, NEWEST_OPSET] {
        check(Precision::Fp32, opset, KINDS[0]);
    }
    for kinds in KINDS {
        check(Precision::Fp16, NEWEST_OPSET, kinds);
    }
}

#[test]
fn a_wrong_expectation_fails() {
    for precision in [Precision::Fp32, Precision::Fp16] {
        for (result, difference) in [
            (compare::<add, sub>(precision, NEWEST_OPSET, KINDS[0]), "value"),
            (compare::<silu, gelu>(precision, NEWEST_OPSET, KINDS[0]), "value"),
            (compare::<layer_norm_of_little_variance, layer_norm>(precision, NEWEST_OPSET, KINDS[0]), "value"),
            (compare::<slice_without_the_last, an_input_as_output>(precision, NEWEST_OPSET, KINDS[0]), "shape"),
        ] {
            let error = result.unwrap_err().to_string();
            assert!(error.starts_with(difference), "{error}");
        }
    }
    let [one, not_a_number] = [1.0, f32::NAN].map(|value| ArrayD::from_elem(vec![2], value));
    close(&one, &one, MOVED).unwrap();
    close(&not_a_number, &one, HALF).unwrap_err();
    close(&one, &not_a_number, HALF).unwrap_err();
    close(&one, &(&one + 3e-6), ELEMENTWISE).unwrap_err();
}

fn operators(graph: &GraphProto, all: &mut BTreeSet<String>) {
    for node in &graph.node {
        all.insert(node.op_type.clone().unwrap());
        node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()).for_each(|body| operators(body, all));
    }
}

/// Operators that the lowering may use and that TensorRT accepts; without `If` and `Scan`.
const TENSORRT: &str = "Add Cast Clip Concat Conv Cos DepthToSpace Erf Expand Gather Gelu Gemm Identity InstanceNormalization \
                        LayerNormalization Loop MatMul Mul Pad ReduceMean Reshape Shape Sigmoid Sin Slice Softmax \
                        Squeeze Sub Transpose";

#[test]
fn stages_use_only_operators_that_are_exercised_and_that_tensorrt_accepts() {
    let accepted: BTreeSet<String> = TENSORRT.split(' ').map(String::from).collect();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let checkpoints = ["generator.pth", "tokenizer.ckpt"].map(|file| fixtures.join(file));
    let hints = Hints { heads: Some(2), ..Hints::default() };
    let (config, weights) = checkpoint::load(&checkpoints[0], &checkpoints[1], WeightSet::Ema, &hints).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let destination = folder.path().join("bundle");
    for precision in [Precision::Fp32, Precision::Fp16] {
        for opset in [OLDEST_OPSET, NEWEST_OPSET] {
            let options = Options { precision, opset, policy: None, functions: false };
            let draft = draft(&destination, &config, &weights, options, |_| {}).unwrap();
            let exercised = exercised(precision, opset);
            for stage in Stage::ALL {
                let bytes = std::fs::read(draft.bundle.graph_path(stage).unwrap()).unwrap();
                let mut used = BTreeSet::new();
                operators(ModelProto::decode(&bytes[..]).unwrap().graph.as_ref().unwrap(), &mut used);
                for known in [&exercised, &accepted] {
                    let others: Vec<_> = used.difference(known).collect();
                    assert!(others.is_empty(), "{}, {precision}, opset {opset}: {others:?}", stage.name());
                }
                assert!(used.contains("Reshape"), "{} consists of {used:?}", stage.name());
            }
        }
    }
}
