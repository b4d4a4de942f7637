//! `Observe` does not change the values that the inner interpreter computes.

use candle_core::{Device, Tensor};
use eqim::close::{largest, values};
use eqim::config::{Config, Preset};
use eqim::engine::candle::tableau_tensors;
use eqim::model::flow;
use eqim::ops::cost::Cost;
use eqim::ops::eager::Eager;
use eqim::request::solver::{Solver, Tableau};
use eqim::weights::Weights;
use eqim_calibration::{Observe, Ranges, Seen};

const ROWS: usize = 2;
const STEPS: usize = 3;

/// A published model, reduced so that its random weights are generated quickly.
fn micro() -> Config {
    let mut config = Preset::Small.config();
    let generator = &mut config.generator;
    (generator.class_num, generator.dim, generator.depth, generator.heads) = (2, 16, 1, 2);
    (generator.mlp_dim, generator.flow_dim, generator.flow_depth, generator.embed) = (32, 24, 2, 8);
    let tokenizer = &mut config.tokenizer;
    (tokenizer.rows, tokenizer.embed) = (1, 8);
    for tower in [&mut tokenizer.encoder, &mut tokenizer.decoder] {
        (tower.z_channels, tower.conv_in, tower.res_blocks) = (4, 32, 1);
        tower.levels.truncate(2);
        tower.levels.iter_mut().for_each(|level| level.channels = 32);
    }
    config.check().unwrap();
    config
}

fn inputs(config: &Config) -> [Tensor; 5] {
    let tensor = |shape: &[usize], factor: f32| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| factor * (i as f32).sin()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let [times, updates] = tableau_tensors(&Tableau::new(Solver::Euler, STEPS)).unwrap();
    [
        tensor(&[ROWS, config.generator.dim], 1.0),
        tensor(&[ROWS, config.generator.embed], 2.0),
        tensor(&[ROWS], 1.0),
        times,
        updates,
    ]
}

#[test]
fn an_observed_run_computes_the_same() {
    let config = micro();
    let weights = Weights::random(&config, 1).unwrap();
    let [z, noise, guidance, times, updates] = inputs(&config);
    let g = &config.generator;
    let plain = flow::sample(&mut Eager::new(&weights), g, &z, &noise, &guidance, &times, &updates).unwrap();
    let mut ranges = Ranges::default();
    let sampled = ranges.observe(&weights, |o| flow::sample(o, g, &z, &noise, &guidance, &times, &updates)).unwrap();
    assert_eq!(sampled.to_vec2::<f32>().unwrap(), plain.to_vec2::<f32>().unwrap());

    // The noise is an input of the first product inside the loop, so the range of that scope is at least the largest
    // noise value.
    let largest_noise = largest(&values(&noise).unwrap());
    assert!(ranges.scopes()["diffloss.net.input_proj"] >= largest_noise);
    assert!(ranges.largest().unwrap().1 >= ranges.scopes()["diffloss.net.final_layer.linear"]);
}

#[test]
fn ranges_only_widen_and_values_that_are_not_finite_name_their_scope() {
    let config = micro();
    let weights = Weights::random(&config, 1).unwrap();
    let [z, noise, guidance, times, updates] = inputs(&config);
    let g = &config.generator;
    let mut ranges = Ranges::default();
    let mut run = |noise: &Tensor| {
        let run = ranges.observe(&weights, |o| flow::sample(o, g, &z, noise, &guidance, &times, &updates));
        (run.map(drop), ranges.scopes().get("diffloss.net.input_proj").copied().unwrap_or_default())
    };
    let (_, narrow) = run(&noise);
    let (_, wide) = run(&(&noise * 10.0).unwrap());
    let (_, after) = run(&noise);
    assert!(narrow < wide && wide == after, "{narrow} {wide} {after}");
    let (broken, _) = run(&(&noise * f64::NAN).unwrap());
    assert!(broken.unwrap_err().to_string().contains("diffloss.net.input_proj"));
}

#[test]
fn any_interpreter_can_be_observed() {
    let config = micro();
    let g = &config.generator;
    let (z, noise, rows) = (vec![ROWS, g.dim], vec![ROWS, g.embed], vec![ROWS]);
    let (times, updates) = (vec![STEPS], vec![STEPS, 2, 3]);
    let mut shown = vec![];
    let mut record = |scope: &str, _: Seen, shape: &Vec<usize>| {
        shown.push((scope.to_string(), shape.clone()));
        Ok(())
    };
    let mut o = Observe::new(Cost::default(), &mut record);
    flow::sample(&mut o, g, &z, &noise, &rows, &times, &updates).unwrap();
    let velocity = ("diffloss.net.final_layer.linear".to_string(), vec![ROWS, g.embed]);
    assert!(shown.contains(&velocity), "{shown:?}");
}
