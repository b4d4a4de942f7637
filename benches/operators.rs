//! Candle's operators at the sizes of the large published model: `cargo bench --bench operators`. The throughput is in
//! multiply-adds or elements per second.

use std::hint::black_box;

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use eqim::ops::eager::Eager;
use eqim::ops::{Ops, OpsExt};
use eqim::weights::Weights;
use eqim::{Config, Result, checkpoint};

const FLOW: usize = 1280;

fn tensor(shape: &[usize]) -> Tensor {
    let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i as f32).sin()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("tensor")
}

/// Measures `work`, which has `elements` elements or multiply-adds.
fn measure(
    criterion: &mut Criterion,
    weights: &Weights,
    name: &str,
    elements: usize,
    work: impl Fn(&mut Eager) -> Result<Tensor>,
) {
    let mut group = criterion.benchmark_group("operators");
    group.throughput(Throughput::Elements(elements as u64)).sample_size(20);
    group.bench_function(name, |b| b.iter(|| black_box(work(&mut Eager::new(weights)).expect(name))));
    group.finish();
}

fn operators(criterion: &mut Criterion) {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo/model.safetensors");
    let (_, weights): (Config, Weights) = checkpoint::load_safetensors(model.as_ref()).expect("demo model");
    // Products read their weights from the interpreter, which holds the demo model's weights and the weights added
    // here.
    let mut weights = weights;
    let zeros = |width: usize| Tensor::zeros(width, DType::F32, &Device::Cpu).expect("zeros");

    for (name, rows, width) in [("gemm, 2 rows", 2, FLOW), ("gemm, modulations of 100 evaluations", 200, 3 * FLOW)] {
        let x = tensor(&[rows, FLOW]);
        weights.insert(format!("{name}.weight"), &tensor(&[width, FLOW])).expect("weight");
        weights.insert(format!("{name}.bias"), &zeros(width)).expect("bias");
        measure(criterion, &weights, name, rows * width * FLOW, |o| o.linear(name, &x, FLOW, width));
    }
    let x = tensor(&[200, FLOW]);
    measure(criterion, &weights, "layer norm", 200 * FLOW, |o| o.layer_normalization(&x, None, FLOW, 1e-6));

    let x = tensor(&[1, 128, 128, 128]);
    weights.insert("conv.weight".into(), &tensor(&[128, 128, 3, 3])).expect("weight");
    weights.insert("conv.bias".into(), &zeros(128)).expect("bias");
    measure(criterion, &weights, "convolution 3×3", 128 * 128 * 128 * 128 * 9, |o| o.conv2d("conv", &x, 128, 128));
    let affine = (tensor(&[128]), zeros(128));
    measure(criterion, &weights, "group norm", 128 * 128 * 128, |o| {
        o.group_normalization(&x, (&affine.0, &affine.1), 32, 1e-6)
    });

    let (q, kv) = (tensor(&[2, 16, 1, 64]), tensor(&[2, 16, 16, 64]));
    measure(criterion, &weights, "attention of a token", 2 * 2 * 16 * 16 * 64, |o| o.attention(&q, &kv, &kv, None, 64));
}

criterion_group!(benches, operators);
criterion_main!(benches);
