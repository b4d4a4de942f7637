//! Forward and backward pass of the demo model's tokenizer, on two 256×256 images in parallel:
//! `cargo bench --bench training`. `CANDLE_NUM_THREADS=1` turns off Candle's own threads; eqim-train sets it by itself.

use std::hint::black_box;
use std::path::Path;

use candle_core::{Device, Tensor, Var};
use criterion::{Criterion, criterion_group, criterion_main};
use eqim::checkpoint::load_safetensors;
use eqim::model::tokenizer;
use eqim::ops::eager::Eager;
use eqim::weights::Weights;
use eqim::{Config, Result};
use rayon::prelude::*;

fn gradient(config: &Config, weights: &Weights, image: &Tensor) -> Result<()> {
    let o = &mut Eager::new(weights);
    let latent = tokenizer::encode(o, &config.tokenizer, image)?;
    let reconstruction = tokenizer::decode(o, &config.tokenizer, &latent)?;
    black_box((reconstruction - image)?.abs()?.mean_all()?.backward()?);
    Ok(())
}

fn training(criterion: &mut Criterion) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo/model.safetensors");
    let (config, stored) = load_safetensors(&model).expect("the demo model");
    let mut weights = Weights::default();
    for (name, tensor) in stored.iter() {
        let variable = Var::from_tensor(tensor).expect("a variable");
        weights.insert(name.to_string(), variable.as_tensor()).expect("a weight");
    }
    let image = Tensor::rand(-1f32, 1f32, (1, 3, 256, 256), &Device::Cpu).expect("an image");
    let mut group = criterion.benchmark_group("training");
    group.sample_size(10);
    group.bench_function("tokenizer forward and backward, two images", |b| {
        b.iter(|| (0..2).into_par_iter().try_for_each(|_| gradient(&config, &weights, &image)).expect("gradients"));
    });
    group.finish();
}

criterion_group!(benches, training);
criterion_main!(benches);
