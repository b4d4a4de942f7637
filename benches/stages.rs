//! Every stage of the fixture model on both engines: `cargo bench --bench stages`. The model is tiny, so this measures
//! the overhead of a call.

use std::hint::black_box;
use std::path::Path;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use eqim::bundle::Precision;
use eqim::checkpoint::{self, Hints, WeightSet};
use eqim::engine::Engine;
use eqim::engine::candle::CandleEngine;
use eqim::request::solver::{Solver, Tableau};
use eqim_engines::native::find_onnxruntime;
use eqim_engines::onnxruntime::{OrtEngine, Providers};
use eqim_export::lower::NEWEST_OPSET;
use eqim_export::write::{Options, draft};
use ndarray::{Array2, Array3};

fn engines(folder: &Path) -> Vec<Box<dyn Engine>> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let hints = Hints { heads: Some(2), ..Hints::default() };
    let (generator, tokenizer) = (fixtures.join("generator.pth"), fixtures.join("tokenizer.ckpt"));
    let (config, weights) = checkpoint::load(&generator, &tokenizer, WeightSet::Ema, &hints).expect("fixture");
    let options = Options { precision: Precision::Fp32, opset: NEWEST_OPSET, policy: None, functions: true };
    let draft = draft(&folder.join("bundle"), &config, &weights, options, |_| {}).expect("export");
    let bundle = draft.publish().expect("export");
    let library = find_onnxruntime().expect("cargo xtask setup");
    let ort = OrtEngine::new(&bundle, &library, None, &Providers::default()).expect("ONNX Runtime");
    vec![Box::new(CandleEngine::new(config, weights)), Box::new(ort)]
}

fn stages(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("temporary folder");
    for engine in engines(folder.path()) {
        let g = &engine.config().generator;
        let labels = [3, g.unconditional() as i64];
        let (token, z) = (Array2::from_elem((2, g.embed), 0.5), Array2::from_elem((2, g.dim), 0.5));
        let noise = Array2::from_elem((1, g.embed), 0.5);
        let latents = Array3::from_elem((1, 16, g.embed), 0.5);
        let tableau = Tableau::new(Solver::Euler, g.steps);
        let mut group = criterion.benchmark_group("stages");
        let id = |stage| BenchmarkId::new(stage, engine.name());
        group.bench_function(id("prefill"), |b| b.iter(|| black_box(engine.start(&labels).expect("prefill").1)));
        let (mut session, _) = engine.start(&labels).expect("prefill");
        group.bench_function(id("transformer step"), |b| {
            b.iter(|| session.step(black_box(token.view()), &[5, 5]).expect("step"));
        });
        group.bench_function(id("flow sampler, guided"), |b| {
            b.iter(|| engine.sample(black_box(z.view()), noise.view(), &[4.0], &tableau).expect("sample"));
        });
        group.bench_function(id("decoder, 16 tokens"), |b| {
            b.iter(|| engine.decode(black_box(latents.view())).expect("decode"));
        });
        group.finish();
    }
}

criterion_group!(benches, stages);
criterion_main!(benches);
