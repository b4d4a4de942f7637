//! The demo model: the quality of its reconstructions and long images, as `assets/demo/README.md` describes it.

use std::collections::BTreeMap;

use eqim::checkpoint;
use eqim::engine::Engine;
use eqim::engine::candle::CandleEngine;
use eqim::generate::generate;
use eqim::picture::quality::psnr_of_values;
use eqim::picture::{self, Side};
use eqim::request::{Noise, Request};
use ndarray::{Array3, Axis, s};

use crate::common::file;

fn engine() -> CandleEngine {
    let (config, weights) = checkpoint::load_safetensors(&file("assets/demo/model.safetensors")).unwrap();
    CandleEngine::new(config, weights)
}

fn psnr(engine: &CandleEngine, photo: &str) -> f64 {
    let tokenizer = &engine.config().tokenizer;
    let picture =
        picture::read(&file(photo), tokenizer.image_height(), tokenizer.token_width(), Side::Right).unwrap().pixels;
    let latents = engine.encode(picture.view().insert_axis(Axis(0))).unwrap();
    let found = engine.decode(latents.view()).unwrap().mapv(|value| value.clamp(-1.0, 1.0));
    psnr_of_values(found.index_axis(Axis(0), 0), picture.view())
}

#[test]
fn photographs_are_reconstructed_as_reported() {
    let engine = engine();
    let text = std::fs::read_to_string(file("assets/demo/report.json")).unwrap();
    let report: BTreeMap<String, Vec<(String, f64)>> = serde_json::from_str(&text).unwrap();
    for (part, least) in [("training", 24.0), ("held_out", 24.0)] {
        let photos = &report[part];
        let mut sum = 0.0;
        for (photo, reported) in photos {
            let found = psnr(&engine, photo);
            // The report was made with the weights before they were rounded to FP16.
            assert!((found - reported).abs() < 0.05, "{photo}: {found} dB, reported {reported}");
            sum += found;
        }
        let mean = sum / photos.len() as f64;
        println!("{part}: {mean:.2} dB over {} photographs", photos.len());
        assert!(mean >= least, "{part}: {mean} dB");
    }
    assert_eq!(report["training"].len() + report["held_out"].len(), 13);
}

/// Mean absolute difference between each column of pixels and the next, `[width - 1]`.
fn steps(image: &Array3<f32>) -> Vec<f32> {
    let width = image.dim().2;
    let step = |x: usize| {
        let difference = &image.slice(s![.., .., x + 1]) - &image.slice(s![.., .., x]);
        difference.mapv(f32::abs).mean().unwrap()
    };
    (0..width - 1).map(step).collect()
}

#[test]
fn a_long_image_goes_on_without_seams_or_collapse() {
    let engine = engine();
    for (class, seed) in [(2, 22), (3, 23)] {
        let request =
            Request { steps: 20, noise: Noise::Seed(seed), ..Request::new(engine.config(), [Some(class)], 256) };
        let tokens = generate(&engine, &request, |_| {}).unwrap().tokens / engine.config().generator.vae_norm as f32;
        let image = engine.decode(tokens.view()).unwrap().index_axis_move(Axis(0), 0);
        let width = engine.config().tokenizer.token_width();
        let steps = steps(&image);
        let mean = |at_border: bool| {
            let chosen = steps.iter().enumerate().filter(|(x, _)| ((x + 1) % width == 0) == at_border);
            let chosen: Vec<f32> = chosen.map(|(_, step)| *step).collect();
            chosen.iter().sum::<f32>() / chosen.len() as f32
        };
        let seams = mean(true) / mean(false);
        // Standard deviation along the width, in the last quarter: it is 0 for a flat colour and for a repeated column.
        let last = image.slice(s![.., .., 3 * image.dim().2 / 4..]);
        let spread = last.std_axis(Axis(2), 0.0).mean().unwrap();
        let rows = last.mean_axis(Axis(2)).unwrap().std(0.0);
        println!(
            "class {class}: steps across borders {seams:.2} of those elsewhere, spread {spread:.3}, rows {rows:.3}"
        );
        assert!((0.75..1.3).contains(&seams), "{seams}");
        assert!(spread > 0.02 && rows > 0.1, "{spread}, {rows}");
    }
}
