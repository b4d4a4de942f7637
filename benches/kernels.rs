//! The CPU operators of training and their gradients, compared with the same computation in Candle's own operators, at
//! the sizes of the demo model: `cargo bench --bench kernels`.

use std::hint::black_box;

use candle_core::{Device, Result, Tensor, Var};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use eqim::ops::kernels::{self, portable};

const GROUPS: usize = 8;
const EPS: f32 = 1e-6;

fn var(shape: &[usize]) -> Var {
    let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i as f32).sin()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).and_then(|tensor| Var::from_tensor(&tensor)).expect("a variable")
}

/// An operator as a function of its inputs.
type Operator<'a> = &'a dyn Fn(&[&Tensor]) -> Result<Tensor>;

/// Measures our operator and Candle's operator, each alone and with its gradient.
fn compare(criterion: &mut Criterion, name: &str, inputs: &[&Tensor], ours: Operator, candle: Operator) {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(inputs[0].elem_count() as u64)).sample_size(10);
    for (which, run) in [("ours", ours), ("portable", candle)] {
        let constants: Vec<Tensor> = inputs.iter().map(|input| input.detach()).collect();
        let constants: Vec<&Tensor> = constants.iter().collect();
        group.bench_function(which, |b| b.iter(|| black_box(run(&constants).expect(name))));
        let both = || run(inputs)?.sqr()?.sum_all()?.backward();
        group.bench_function(format!("{which} and gradient"), |b| b.iter(|| black_box(both().expect(name))));
    }
    group.finish();
}

fn kernels(criterion: &mut Criterion) {
    // Features of a crop at the second level of the tokenizer: batch, channels, height, width.
    let x = var(&[4, 32, 128, 64]);
    let (scale, shift) = (var(&[32]), var(&[32]));
    compare(criterion, "silu", &[&x], &|t| kernels::silu(t[0]), &|t| t[0].silu());
    compare(
        criterion,
        "group_norm",
        &[&x, &scale, &shift],
        &|t| kernels::group_norm(t[0], t[1], t[2], GROUPS, EPS),
        &|t| portable::group_norm(t[0], t[1], t[2], GROUPS, EPS),
    );
    compare(criterion, "pad_reflect", &[&x], &|t| kernels::pad_reflect(t[0]), &|t| portable::pad_reflect(t[0]));
    let (padded, weight, bias) = (var(&[4, 32, 130, 66]), var(&[32, 32, 3, 3]), var(&[32]));
    compare(criterion, "conv3x3", &[&padded, &weight, &bias], &|t| kernels::conv3x3(t[0], t[1], t[2]), &|t| {
        portable::conv2d(t[0], t[1], t[2], 1)
    });

    // A shard of the generator's batch: hidden values of the MLP, attention weights, and the flow head's modulations.
    compare(criterion, "gelu", &[&var(&[384, 768])], &|t| kernels::gelu(t[0]), &|t| t[0].gelu_erf());
    let scores = var(&[16, 6, 24, 24]);
    compare(criterion, "softmax", &[&scores], &|t| kernels::softmax(t[0]), &|t| portable::softmax(t[0]));
    let (x, modulations) = (var(&[1024, 368]), var(&[1024, 3 * 368]));
    let part = |t: &Tensor, part: usize| t.narrow(1, part * 368, 368);
    compare(
        criterion,
        "modulate",
        &[&x, &modulations],
        &|t| kernels::modulate(t[0], &part(t[1], 0)?, &part(t[1], 1)?),
        &|t| portable::modulate(t[0], &part(t[1], 0)?, &part(t[1], 1)?),
    );
}

criterion_group!(benches, kernels);
criterion_main!(benches);
