//! Property tests over models, token sequences, seeds and images.

use candle_core::{DType, Device, Tensor};
use eqim::Config;
use eqim::checkpoint::WeightSet;
use eqim::close::{Tolerance, largest_difference, values};
use eqim::config::{GROUPS, GeneratorConfig, Level, TokenizerConfig, Tower};
use eqim::engine::Engine;
use eqim::engine::candle::{CandleEngine, to_array, to_tensor};
use eqim::generate::generate;
use eqim::model::transformer::{self, KeyValue, Prefill};
use eqim::ops::eager::Eager;
use eqim::picture::{to_byte, write_png};
use eqim::request::condition::ClassSchedule;
use eqim::request::random::TorchRng;
use eqim::request::solver::Solver;
use eqim::request::{GuidanceSchedule, Noise, Request};
use eqim::weights::Weights;
use ndarray::{Array2, Array3, Axis, s};
use proptest::prelude::*;

const LONGEST: usize = 40;

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Models of every small size, with random weights.
fn engines() -> impl Strategy<Value = CandleEngine> {
    let sizes = (1..=3usize, 1..=3usize, 1..=4usize, 1..=6usize, 1..=5usize);
    (sizes, any::<u32>()).prop_map(|((depth, heads, half_head, window, embed), seed)| {
        let dim = 2 * half_head * heads;
        let tower = Tower {
            z_channels: 1,
            conv_in: GROUPS,
            res_blocks: 1,
            levels: vec![Level { channels: GROUPS, attention: false }],
        };
        let config = Config {
            generator: GeneratorConfig {
                class_num: 3,
                class_names: vec![],
                buffer: 3,
                embed,
                dim,
                depth,
                heads,
                mlp_dim: 2 * dim,
                window,
                flow_dim: 6,
                flow_depth: 2,
                time_dim: 4,
                vae_norm: 0.5,
                steps: 2,
            },
            tokenizer: TokenizerConfig {
                image_channels: 3,
                rows: 1,
                embed,
                len_down_scale: 0,
                groups: GROUPS,
                encoder: tower.clone(),
                decoder: tower,
            },
        };
        config.check().unwrap();
        let weights = Weights::random(&config, seed).unwrap();
        CandleEngine::new(config, weights)
    })
}

fn normal(seed: u64, shape: (usize, usize, usize)) -> Array3<f32> {
    Array3::from_shape_vec(shape, TorchRng::new(seed).randn(shape.0 * shape.1 * shape.2)).unwrap()
}

fn integers(values: &[i64]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

/// Concatenates the keys and values of single rows to a batch.
fn batch(rows: &[Vec<KeyValue<Tensor>>]) -> Vec<KeyValue<Tensor>> {
    let join = |parts: Vec<&Tensor>| Tensor::cat(&parts, 0).unwrap();
    let block = |i: usize| KeyValue {
        key: join(rows.iter().map(|row| &row[i].key).collect()),
        value: join(rows.iter().map(|row| &row[i].value).collect()),
    };
    (0..rows[0].len()).map(block).collect()
}

/// A row that is computed alone: its condition `z` after the token at `position`, its keys and values `past` before
/// that token, and the keys and values `cross` of its class.
struct Alone {
    z: Array2<f32>,
    past: Vec<KeyValue<Tensor>>,
    cross: Vec<KeyValue<Tensor>>,
}

impl Alone {
    fn run(engine: &CandleEngine, label: i64, tokens: &Array2<f32>, position: usize) -> Self {
        let g = &engine.config().generator;
        let o = &mut Eager::new(engine.weights());
        let Prefill { cross, .. } = transformer::prefill(o, g, &integers(&[label])).unwrap();
        let empty = Tensor::zeros((1, g.heads, g.window, g.head_dim()), DType::F32, &Device::Cpu).unwrap();
        let mut past = vec![KeyValue { key: empty.clone(), value: empty }; g.depth];
        for i in 0..=position {
            let token = to_tensor(tokens.slice(s![i..=i, ..])).unwrap();
            let step = transformer::step(o, g, &token, &integers(&[i as i64]), &past, &cross).unwrap();
            if i == position {
                return Self { z: to_array(&step.z).unwrap(), past, cross };
            }
            past = step.present;
        }
        unreachable!("the loop ends at the position")
    }
}

/// The cache of a row at `position` with `garbage` in every slot that holds no token.
fn littered(past: &[KeyValue<Tensor>], position: usize, garbage: f32) -> Vec<KeyValue<Tensor>> {
    let litter = |cache: &Tensor| {
        let (_, heads, window, head_dim) = cache.dims4().unwrap();
        let held = position.min(window);
        let unused = Tensor::full(garbage, (1, heads, window - held, head_dim), &Device::Cpu).unwrap();
        Tensor::cat(&[unused, cache.narrow(2, window - held, held).unwrap()], 2).unwrap()
    };
    past.iter().map(|KeyValue { key, value }| KeyValue { key: litter(key), value: litter(value) }).collect()
}

proptest! {
    #![proptest_config(cases(32))]

    #[test]
    fn rows_of_a_batch_may_stand_at_different_positions(
        engine in engines(),
        rows in prop::collection::vec((0..=3i64, 0..LONGEST), 1..=4),
        seed: u64,
    ) {
        let g = &engine.config().generator;
        let tokens = normal(seed, (rows.len(), LONGEST, g.embed));
        let alone: Vec<Alone> = rows
            .iter()
            .zip(tokens.outer_iter())
            .map(|(&(label, position), tokens)| Alone::run(&engine, label, &tokens.to_owned(), position))
            .collect();
        let positions: Vec<i64> = rows.iter().map(|&(_, position)| position as i64).collect();
        let cross = batch(&alone.iter().map(|row| row.cross.clone()).collect::<Vec<_>>());
        let mut token = Array2::zeros((rows.len(), g.embed));
        for (row, &(_, position)) in rows.iter().enumerate() {
            token.row_mut(row).assign(&tokens.slice(s![row, position, ..]));
        }
        let expected = Array2::from_shape_fn((rows.len(), g.dim), |(row, i)| alone[row].z[[0, i]]);
        for garbage in [0.0, 1e3, -1e3] {
            let pasts = alone.iter().zip(&rows).map(|(row, &(_, position))| littered(&row.past, position, garbage));
            let past = batch(&pasts.collect::<Vec<_>>());
            let o = &mut Eager::new(engine.weights());
            let step = transformer::step(o, g, &to_tensor(token.view()).unwrap(), &integers(&positions), &past, &cross);
            let largest = largest_difference(&values(&step.unwrap().z).unwrap(), &expected);
            prop_assert!(largest <= Tolerance::ACTIVATION.limit, "positions {positions:?}, garbage {garbage}: {largest:e}");
        }
    }

    #[test]
    fn the_cache_changes_nothing(
        engine in engines(),
        labels in prop::collection::vec(0..=3i64, 1..=3),
        n in 1..=LONGEST,
        seed: u64,
    ) {
        let g = &engine.config().generator;
        let tokens = normal(seed, (labels.len(), n, g.embed));
        let flat = to_tensor(tokens.view()).unwrap().reshape((labels.len() * n, g.embed)).unwrap();
        let o = &mut Eager::new(engine.weights());
        let z = transformer::teacher_forced(o, g, &integers(&labels), &flat, n, 0).unwrap();
        let expected: Array3<f32> = to_array(&z.reshape((labels.len(), n, g.dim)).unwrap()).unwrap();

        let (mut session, mut z) = engine.start(&labels).unwrap();
        for i in 0..n {
            if i > 0 {
                let positions = vec![i as i64 - 1; labels.len()];
                z = session.step(tokens.index_axis(Axis(1), i - 1), &positions).unwrap();
            }
            let largest = largest_difference(&z, &expected.index_axis(Axis(1), i).to_owned());
            prop_assert!(largest <= Tolerance::ACTIVATION.limit, "token {i} of {n}: {largest:e}");
        }
    }

    #[test]
    fn generation_can_be_repeated_from_its_noise(
        engine in engines(),
        labels in prop::collection::vec(prop::option::of(0..3usize), 1..=3),
        (tokens, given) in (2..=9usize).prop_flat_map(|tokens| (Just(tokens), 0..tokens)),
        cfg in prop_oneof![Just(1.0f32), 0.0..4.0f32],
        linear: bool,
        solver in prop::sample::select(Solver::ALL.as_slice()),
        steps in 1..=4usize,
        seed: u64,
    ) {
        let (rows, embed) = (labels.len(), engine.config().generator.embed);
        let prefix = (given > 0).then(|| normal(!seed, (rows, given, embed)));
        let schedule = if linear { GuidanceSchedule::Linear } else { GuidanceSchedule::Constant };
        let noise = Noise::Seed(seed);
        let labels = labels.into_iter().map(ClassSchedule::Constant);
        let request = Request {
            cfg,
            cfg_schedule: schedule,
            solver,
            steps,
            prefix: prefix.clone(),
            noise,
            ..Request::new(engine.config(), labels, tokens)
        };
        let mut reported = vec![];
        let first = generate(&engine, &request, |known| reported.push(known)).unwrap();
        prop_assert_eq!(first.tokens.dim(), (rows, tokens, embed));
        prop_assert_eq!(first.noise.dim(), (rows, tokens - given, embed));
        prop_assert_eq!(reported, (given + 1..=tokens).collect::<Vec<_>>());
        if let Some(prefix) = prefix {
            prop_assert_eq!(first.tokens.slice(s![.., ..given, ..]), prefix);
        }

        let again = Request { noise: Noise::Given(first.noise.clone()), ..request.clone() };
        let again = generate(&engine, &again, |_| {}).unwrap();
        prop_assert_eq!(&again.tokens, &first.tokens);
        prop_assert_eq!(again.noise, first.noise);

        let other = generate(&engine, &Request { noise: Noise::Seed(seed ^ 1), ..request }, |_| {}).unwrap();
        prop_assert_ne!(other.tokens, first.tokens);
    }

    #[test]
    fn noise_is_finite_and_as_long_as_asked_for(seed: u64, counts in prop::collection::vec(0..200usize, 1..8)) {
        let mut random = TorchRng::new(seed);
        for count in counts {
            let values = random.randn(count);
            prop_assert_eq!(values.len(), count);
            prop_assert!(values.iter().all(|value| value.is_finite() && value.abs() < 10.0));
        }
    }

    #[test]
    fn noise_continues_one_stream(seed: u64, a in 16..100usize, b in 16..100usize, blocks in (1..6usize, 1..6usize)) {
        let mut random = TorchRng::new(seed);
        let first = random.randn(a);
        let second = random.clone().randn(b);
        prop_assert_eq!(random.randn(b), second.clone());
        prop_assert_ne!(&first[..16], &second[..16]);

        let (a, b) = (16 * blocks.0, 16 * blocks.1);
        let mut random = TorchRng::new(seed);
        prop_assert_eq!([random.randn(a), random.randn(b)].concat(), TorchRng::new(seed).randn(a + b));
    }

    #[test]
    fn a_seed_is_its_low_32_bits(seed: u64, high: u32, count in 1..100usize) {
        let noise = TorchRng::new(seed).randn(count);
        prop_assert_eq!(&noise, &TorchRng::new((seed & 0xffff_ffff) | u64::from(high) << 32).randn(count));
        prop_assert_ne!(&noise, &TorchRng::new(seed ^ 1).randn(count));
    }
}

proptest! {
    #![proptest_config(cases(8))]

    #[test]
    fn a_png_holds_every_pixel(tokens in 2..=20usize, seed: u64) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.png");
        for fixture in crate::common::all() {
            let engine = fixture.engine(WeightSet::Ema);
            let tokenizer = &engine.config().tokenizer;
            let (width, height) = (tokens * tokenizer.token_width(), tokenizer.image_height());
            prop_assert_eq!(engine.config().image_size(tokens), (width, height));

            let image = normal(seed, (3, height, width));
            write_png(&path, image.view()).unwrap();
            let written = image::open(&path).unwrap().to_rgb8();
            prop_assert_eq!(written.dimensions(), (width as u32, height as u32));
            for (x, y, pixel) in written.enumerate_pixels() {
                let expected = [0, 1, 2].map(|channel| to_byte(image[[channel, y as usize, x as usize]]));
                prop_assert_eq!(pixel.0, expected, "at {}, {}", x, y);
            }
        }
    }
}
