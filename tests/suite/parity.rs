//! The model on Candle, compared with the results of the PyTorch reference at two configurations.

use candle_core::{Device, Tensor};
use eqim::checkpoint::{self, Hints, Shapes, WeightSet};
use eqim::close::Tolerance;
use eqim::config::Preset;
use eqim::engine::Engine;
use eqim::engine::candle::tableau_tensors;
use eqim::generate::generate;
use eqim::model::tokenizer::{self, Semantics};
use eqim::model::{flow, parameters, transformer};
use eqim::ops::OpsExt;
use eqim::ops::eager::Eager;
use eqim::picture::to_byte;
use eqim::request::Noise;
use eqim::request::condition::ClassSchedule;
use eqim::request::random::TorchRng;
use eqim::request::solver::{Solver, Tableau};
use ndarray::{Array3, Axis, Ix3, Ix4, concatenate};

use crate::common::{Fixture, all, assert_array, assert_close, assert_tensor};

fn dims(fixture: &Fixture, key: &str) -> Vec<usize> {
    fixture.tensor(key).dims().to_vec()
}

#[test]
fn teacher_forced_transformer() {
    for fixture in all() {
        let engine = fixture.engine(WeightSet::Ema);
        let g = &engine.config().generator;
        let o = &mut Eager::new(engine.weights());
        let (labels, tokens) = (fixture.tensor("forward/labels"), fixture.tensor("forward/tokens"));
        let (batch, n, embed) = tokens.dims3().unwrap();
        let tokens = tokens.reshape((batch * n, embed)).unwrap();

        let both = |c: &Tensor, x: &Tensor| {
            let (c, x) = (c.reshape((batch, g.buffer, g.dim)).unwrap(), x.reshape((batch, n, g.dim)).unwrap());
            Tensor::cat(&[&c, &x], 1).unwrap()
        };
        let mut c = transformer::embed_condition(o, g, labels).unwrap();
        let mut x = transformer::embed_tokens(o, g, &tokens).unwrap();
        assert_tensor(&fixture, "forward/z_proj_ln", &both(&c, &x), Tolerance::ACTIVATION);
        let (rope, bias) = transformer::teacher_forcing(o, g, n, 0).unwrap();
        for i in 0..g.depth {
            (c, x) = o
                .scope(&format!("encoder_blocks.{i}"), |o| {
                    let (cross, c) = transformer::condition_block(o, g, &c)?;
                    let (x, _) = transformer::token_block(o, g, &x, n, &cross, None, &rope, &bias)?;
                    Ok((c, x))
                })
                .unwrap();
            assert_tensor(&fixture, &format!("forward/block{i}"), &both(&c, &x), Tolerance::ACTIVATION);
        }
        let z = transformer::teacher_forced(o, g, labels, &tokens, n, 0).unwrap();
        assert_tensor(&fixture, "forward/z", &z, Tolerance::ACTIVATION);
    }
}

#[test]
fn cached_steps_equal_the_teacher_forced_transformer() {
    for fixture in all() {
        let engine = fixture.engine(WeightSet::Ema);
        let labels = fixture.tensor("forward/labels").to_vec1::<i64>().unwrap();
        let tokens: Array3<f32> = fixture.array("forward/tokens");
        let z: Array3<f32> = fixture.array("forward/z");
        let (mut session, mut found) = engine.start(&labels).unwrap();
        for i in 0..z.dim().1 {
            if i > 0 {
                let token = tokens.index_axis(Axis(1), i - 1);
                found = session.step(token, &vec![i as i64 - 1; labels.len()]).unwrap();
            }
            assert_close(format_args!("token {i}"), &found, z.index_axis(Axis(1), i), Tolerance::ACTIVATION);
        }
    }
}

#[test]
fn flow_head() {
    for fixture in all() {
        let engine = fixture.engine(WeightSet::Ema);
        let g = &engine.config().generator;
        let o = &mut Eager::new(engine.weights());
        let [x, t, c, guided_c] = ["x", "t", "c", "guided_c"].map(|key| fixture.tensor(&format!("flow/{key}")));
        let rows = x.dim(0).unwrap();
        assert_tensor(&fixture, "flow/v", &flow::velocity(o, g, x, t, c).unwrap(), Tolerance::ACTIVATION);

        let [x2, t2] = [x, t].map(|tensor| Tensor::cat(&[tensor, tensor], 0).unwrap());
        let v = flow::velocity(o, g, &x2, &t2, guided_c).unwrap().reshape((2, rows, g.embed)).unwrap();
        let guidance = Tensor::full(3.5f32, rows, &fixture.device).unwrap();
        let guided = flow::guide(o, g, &v, &guidance).unwrap();
        let expected = dims(&fixture, "flow/guided_v_3.5")[0];
        let guided = if expected == 2 * rows { Tensor::cat(&[&guided, &guided], 0).unwrap() } else { guided };
        assert_tensor(&fixture, "flow/guided_v_3.5", &guided, Tolerance::ACTIVATION);

        let tableau = tableau_tensors(&Tableau::new(Solver::Euler, g.steps)).unwrap();
        let [times, updates] = tableau.map(|tensor| tensor.to_device(&fixture.device).unwrap());
        let end = flow::sample(o, g, c, x, &guidance, &times, &updates).unwrap();
        assert_tensor(&fixture, "flow/end", &end, Tolerance::ACTIVATION);
        let end = flow::sample(o, g, guided_c, x, &guidance, &times, &updates).unwrap();
        let expected = dims(&fixture, "flow/guided_end_3.5")[0];
        let end = if expected == 2 * rows { Tensor::cat(&[&end, &end], 0).unwrap() } else { end };
        assert_tensor(&fixture, "flow/guided_end_3.5", &end, Tolerance::ACTIVATION);
    }
}

#[test]
fn tokenizer_both_ways() {
    for fixture in all() {
        let engine = fixture.engine(WeightSet::Ema);
        for n in [3, 16] {
            let latent = engine.encode(fixture.array::<Ix4>(&format!("tokenizer/image{n}")).view()).unwrap();
            assert_array(&fixture, &format!("tokenizer/latent{n}"), &latent, Tolerance::ACTIVATION);
            let decoded = engine.decode(fixture.array::<Ix3>(&format!("tokenizer/latent{n}")).view()).unwrap();
            assert_array(&fixture, &format!("tokenizer/decoded{n}"), &decoded, Tolerance::ACTIVATION);
        }
        let raw = fixture.engine(WeightSet::Raw);
        let latent = raw.encode(fixture.array::<Ix4>("tokenizer/image3").view()).unwrap();
        assert_array(&fixture, "tokenizer/latent3_raw_weights", &latent, Tolerance::ACTIVATION);
    }
}

#[test]
fn semantic_decoder() {
    for fixture in all() {
        let engine = fixture.engine(WeightSet::Ema);
        let tokenizer = &engine.config().tokenizer;
        let stored = candle_core::pickle::read_all_with_key(fixture.folder.join("tokenizer.ckpt"), Some("state_dict"));
        let stored: std::collections::HashMap<String, Tensor> = stored.unwrap().into_iter().collect();
        let mut weights = engine.weights().clone();
        let names = stored.keys().filter_map(|name| name.strip_prefix("semantic_decoder."));
        for name in names {
            let average = &stored[&format!("ema_semantic_decoder.{}", name.replace('.', ""))];
            weights.insert(format!("semantic_decoder.{name}"), &average.to_device(&fixture.device).unwrap()).unwrap();
        }
        let shape = stored["semantic_decoder.conv_out.weight"].dims();
        let first = |level: &usize| stored.contains_key(&format!("semantic_decoder.down.{level}.block.0.conv1.weight"));
        let levels = (0..).take_while(first).count();
        let semantics = Semantics { levels, channels: shape[1], res_blocks: 1, features: shape[0] };
        for n in [3, 16] {
            let o = &mut Eager::new(&weights);
            let latent = fixture.tensor(&format!("tokenizer/latent{n}"));
            let (image, features) = tokenizer::decode_with_features(o, tokenizer, latent).unwrap();
            assert_tensor(&fixture, &format!("tokenizer/decoded{n}"), &image, Tolerance::ACTIVATION);
            let found = tokenizer::semantics(o, tokenizer, semantics, &features).unwrap();
            assert_tensor(&fixture, &format!("tokenizer/semantic{n}"), &found, Tolerance::ACTIVATION);
        }
    }
}

#[test]
fn encoder_before_its_last_projection() {
    for fixture in all() {
        let engine = fixture.engine(WeightSet::Ema);
        for n in [3, 16] {
            let o = &mut Eager::new(engine.weights());
            let image = fixture.tensor(&format!("tokenizer/image{n}"));
            let columns = tokenizer::encode_columns(o, &engine.config().tokenizer, image).unwrap();
            let columns = columns.permute((0, 2, 1)).unwrap();
            assert_tensor(&fixture, &format!("tokenizer/encoder_out{n}"), &columns, Tolerance::ACTIVATION);
        }
    }
}

#[test]
fn sampling_runs_from_the_seed_alone() {
    for fixture in all() {
        let engine = fixture.engine(WeightSet::Ema);
        for run in fixture.runs() {
            let request = fixture.request(engine.config(), &run);
            let generated = generate(&engine, &request, |_| {}).unwrap();
            let noise: Array3<f32> = fixture.array(&format!("{run}/noise"));
            assert_array(&fixture, &format!("{run}/noise"), &generated.noise, Tolerance::NOISE);
            assert_array(&fixture, &format!("{run}/tokens"), &generated.tokens, Tolerance::SAMPLING);

            let given = eqim::request::Request { noise: Noise::Given(noise), ..request };
            let given = generate(&engine, &given, |_| {}).unwrap();
            assert_array(&fixture, &format!("{run}/tokens"), &given.tokens, Tolerance::SAMPLING);

            if fixture.expected.contains_key(&format!("{run}/image")) {
                let image =
                    engine.decode((&generated.tokens / engine.config().generator.vae_norm as f32).view()).unwrap();
                assert_array(&fixture, &format!("{run}/image"), &image, Tolerance::SAMPLING);
                let bytes = image.permuted_axes([0, 2, 3, 1]).mapv(|value| f32::from(to_byte(value)));
                let expected = fixture.array::<Ix4>(&format!("{run}/image_u8"));
                assert_close(run, &bytes, &expected, Tolerance::LEVEL);
            }
        }
    }
}

#[test]
fn conditions_of_sampling_runs() {
    for fixture in all() {
        let engine = fixture.engine(WeightSet::Ema);
        for run in fixture.runs() {
            let expected: Array3<f32> = fixture.array(&format!("{run}/z"));
            let tokens: Array3<f32> = fixture.array(&format!("{run}/tokens"));
            let unconditional = engine.config().generator.unconditional();
            let request = fixture.request(engine.config(), &run);
            let label = |label: &ClassSchedule| label.condition(0, unconditional).label;
            let mut labels: Vec<i64> = request.classes.iter().map(label).collect();
            let streams = expected.dim().0 / labels.len();
            labels.resize(expected.dim().0, unconditional as i64);
            let tokens = concatenate(Axis(0), &vec![tokens.view(); streams]).unwrap();

            let given = request.tokens - expected.dim().1;
            let mut found = Array3::zeros(expected.dim());
            let (mut session, mut z) = engine.start(&labels).unwrap();
            for i in 0..request.tokens {
                if i > 0 {
                    z = session.step(tokens.index_axis(Axis(1), i - 1), &vec![i as i64 - 1; labels.len()]).unwrap();
                }
                if i >= given {
                    found.index_axis_mut(Axis(1), i - given).assign(&z);
                }
            }
            assert_array(&fixture, &format!("{run}/z"), &found, Tolerance::ACTIVATION);
        }
    }
}

#[test]
fn torch_random_numbers() {
    let fixture = &all()[0];
    let mut checked = 0;
    for key in fixture.expected.keys().filter(|key| key.starts_with("torch_rng/") && key.ends_with("_first")) {
        let seed: u64 = key["torch_rng/seed".len()..].split('_').next().unwrap().parse().unwrap();
        let mut random = TorchRng::new(seed);
        for key in [key.clone(), key.replace("_first", "_second")] {
            let expected = fixture.tensor(&key).flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let found = random.randn(expected.len());
            assert_close(key, &found, &expected, Tolerance::NOISE);
            checked += 1;
        }
    }
    assert_eq!(checked, 10);
}

#[test]
fn published_checkpoints_give_the_published_configurations() {
    let text = std::fs::read_to_string(crate::common::fixtures().join("published_shapes.json")).unwrap();
    let published: serde_json::Value = serde_json::from_str(&text).unwrap();
    let shapes = |key: &str| -> Shapes { serde_json::from_value(published[key]["state_dict"].clone()).unwrap() };
    let tokenizer = checkpoint::infer_tokenizer(&shapes("tokenizer")).unwrap();
    let presets = [
        ("small-1000-classes", Preset::Small),
        ("base-1000-classes", Preset::Base),
        ("large-1000-classes", Preset::Large),
        ("huge-1000-classes", Preset::Huge),
        ("large-30-classes", Preset::PlacesLarge),
    ];
    for (key, preset) in presets {
        let shapes = shapes(key);
        let hints = Hints { preset: Some(preset), ..Hints::default() };
        let (generator, _) = checkpoint::infer_generator(&shapes, &hints, &Hints::default()).unwrap();
        let config = eqim::Config { generator, tokenizer: tokenizer.clone() };
        assert_eq!(config, preset.config(), "{key}");
        config.check().unwrap();
        let expected: Shapes = parameters(&config).unwrap().into_iter().collect();
        for (name, shape) in &shapes {
            assert_eq!(expected.get(name), Some(shape), "{key}: {name}");
        }
        let count: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
        assert_eq!(published[key]["parameters"], count, "{key}");
    }
}

#[test]
#[should_panic(expected = "forward/z: the difference is inf")]
fn a_value_that_is_not_a_number_fails_a_comparison() {
    let fixture = &all()[0];
    let expected = fixture.tensor("forward/z");
    let mut values = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values[1] = f32::NAN;
    let found = Tensor::from_vec(values, expected.shape(), &Device::Cpu).unwrap();
    assert_tensor(fixture, "forward/z", &found, Tolerance::ACTIVATION);
}
