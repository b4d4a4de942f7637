//! In a batch of different images, each image has the same tokens as alone.

use eqim::bundle::Bundle;
use eqim::checkpoint::WeightSet;
use eqim::close::Tolerance;
use eqim::engine::Engine;
use eqim::generate::generate;
use eqim::request::solver::Solver;
use eqim::request::{GuidanceSchedule, Noise, PreparedRequest, Request};
use eqim_engines::native::find_onnxruntime;
use eqim_engines::onnxruntime::{OrtEngine, Providers};
use ndarray::{Array2, Array3, Axis};

use crate::common::bins::Workplace;
use crate::common::{Fixture, assert_close, fixtures, together};

/// Requests for images of different classes, lengths, prefixes and guidance.
fn requests(engine: &dyn Engine, guided: bool) -> Vec<Request> {
    let embed = engine.config().generator.embed;
    let request = |seed: u64, label: Option<usize>, tokens: usize, given: usize| Request {
        cfg: if guided { 1.5 + seed as f32 } else { 1.0 },
        cfg_schedule: if seed.is_multiple_of(2) { GuidanceSchedule::Linear } else { GuidanceSchedule::Constant },
        solver: Solver::Ab2,
        steps: 4,
        prefix: (given > 0)
            .then(|| Array3::from_shape_fn((1, given, embed), |(_, n, e)| ((n * embed + e) as f32).sin())),
        noise: Noise::Seed(seed),
        ..Request::new(engine.config(), [label], tokens)
    };
    vec![
        request(0, Some(0), 9, 0),
        request(1, Some(2), 3, 0),
        request(2, None, 7, 5),
        request(3, Some(0), 2, 1),
        request(4, Some(1), 12, 3),
        request(5, Some(2), 2, 0),
        request(6, Some(0), 5, 4),
    ]
}

fn check(engine: &dyn Engine) {
    for guided in [false, true] {
        let requests = requests(engine, guided);
        let alone: Vec<Array2<f32>> = requests
            .iter()
            .map(|request| generate(engine, request, |_| {}).unwrap().tokens.index_axis_move(Axis(0), 0))
            .collect();
        let prepared: Vec<PreparedRequest> =
            requests.iter().map(|request| PreparedRequest::new(engine.config(), request).unwrap()).collect();
        for most in [1, 2, 3, 16] {
            let mut order = vec![];
            for (number, tokens) in together(engine, &prepared, most) {
                let (found, expected) = (tokens.unwrap(), &alone[number]);
                assert_eq!(found.dim(), expected.dim());
                // Products of a batch are summed in another order than products of one row.
                let what = format!("image {number} of at most {most} on {}", engine.name());
                assert_close(what, &found, expected, Tolerance::ACTIVATION);
                order.push(number);
            }
            if most == 1 {
                assert_eq!(order, (0..requests.len()).collect::<Vec<_>>());
            } else {
                assert_ne!(order, (0..requests.len()).collect::<Vec<_>>(), "short images wait for long ones");
            }
            order.sort_unstable();
            assert_eq!(order, (0..requests.len()).collect::<Vec<_>>());
        }
    }
}

/// ONNX Runtime has one thread here, because idle threads of ONNX Runtime and of Candle would spin on the same cores.
#[test]
fn images_are_those_that_they_are_alone() {
    check(&Fixture::open(fixtures()).engine(WeightSet::Ema));
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    let bundle = Bundle::open(&place.path("bundle")).unwrap();
    check(
        &OrtEngine::new(&bundle, &find_onnxruntime().expect("cargo xtask setup"), Some(1), &Providers::default())
            .unwrap(),
    );
}

#[test]
fn an_image_that_fails_does_not_fail_the_others() {
    let engine = Fixture::open(fixtures()).engine(WeightSet::Ema);
    let mut requests = requests(&engine, true);
    requests.iter_mut().for_each(|request| request.prefix = None);
    // Finite noise whose token is not finite.
    let shape = (1, requests[1].tokens, engine.config().generator.embed);
    requests[1].noise = Noise::Given(Array3::from_elem(shape, f32::MAX));
    let prepared: Vec<PreparedRequest> =
        requests.iter().map(|request| PreparedRequest::new(engine.config(), request).unwrap()).collect();
    let mut failed = vec![];
    for (number, tokens) in together(&engine, &prepared, 4) {
        match tokens {
            Ok(tokens) => assert!(tokens.iter().all(|value| value.is_finite()), "image {number}"),
            Err(error) => failed.push((number, error.to_string())),
        }
    }
    assert_eq!(failed.len(), 1);
    assert!(failed[0].0 == 1 && failed[0].1.contains("token 0 is not finite"), "{failed:?}");
}
