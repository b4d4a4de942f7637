//! `eqim-eval`, with EfficientNet-Lite0 on ONNX Runtime.

use std::path::Path;

use candle_core::{Device, Tensor};
use eqim::close::{largest, largest_difference, values};
use eqim::ops::eager::Eager;
use eqim::{efficientnet, picture};
use image::{Rgb, RgbImage};
use serde_json::Value;

use crate::common::bins::Workplace;
use crate::common::{Fixture, file, fixtures};

/// A picture of waves, whose directions and colours depend on `kind` and `seed`.
fn waves(width: u32, height: u32, kind: f32, seed: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let (x, y, shift) = (x as f32 / 9.0, y as f32 / (5.0 + kind), seed as f32);
        let wave = |phase: f32| (127.0 + 90.0 * (x * (1.0 + 0.1 * shift) + kind * y + phase).sin()) as u8;
        Rgb([wave(0.0), wave(kind), wave(shift)])
    })
}

/// A folder of `count` pictures in two classes.
fn folder(place: &Workplace, name: &str, count: u32, kind: f32) {
    for index in 0..count {
        let class = place.path(name).join(["a", "b"][index as usize % 2]);
        std::fs::create_dir_all(&class).unwrap();
        waves(320, 256, kind, index).save(class.join(format!("{index}.png"))).unwrap();
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn metric(report: &Value, name: &str) -> f64 {
    report["metrics"][name].as_f64().unwrap_or_else(|| panic!("{name} of {report}"))
}

#[test]
fn sets_are_compared() {
    let place = Workplace::empty();
    folder(&place, "same", 8, 0.5);
    folder(&place, "other", 8, 2.0);
    let compare =
        |line: &str| json(&place.run(&format!("eqim-eval compare {line} --splits 2 --json")).succeeded().stdout);
    let equal = compare("same same");
    let distance = metric(&equal, "frechet_distance");
    assert!(distance < 1e-6, "{distance}");
    for (name, expected) in [("precision", 1.0), ("recall", 1.0), ("coverage", 1.0)] {
        assert_eq!(metric(&equal, name), expected, "{name}");
    }
    let different = compare("same other");
    let (distance, kernel) = (metric(&different, "frechet_distance"), metric(&different, "kernel_distance"));
    assert!(distance > 1.0 && kernel > 0.1, "{different}");
    assert_eq!(metric(&different, "precision"), 0.0);
    assert!(metric(&different, "inception_score") >= 1.0);

    // Kept features give the same distances as their images.
    place.run("eqim-eval features same -o same.safetensors").succeeded();
    let kept = compare("same.safetensors other");
    assert_eq!(kept["metrics"], different["metrics"]);
    // Crops of the same pictures are drawn by their seed.
    let crops = |seed: u32| compare(&format!("same other --crops 12 --crop-seed {seed}"))["metrics"].clone();
    assert_eq!(crops(1), crops(1));
    assert_ne!(crops(1), crops(2));
}

#[test]
fn features_are_those_of_candle() {
    let place = Workplace::empty();
    std::fs::create_dir(place.path("images")).unwrap();
    for index in 0..3 {
        waves(256, 256, 0.5, index).save(place.path(&format!("images/{index}.png"))).unwrap();
    }
    place.run("eqim-eval features images -o kept.safetensors").succeeded();
    let kept = candle_core::safetensors::load(place.path("kept.safetensors"), &Device::Cpu).unwrap();
    let weights = file(".native/efficientnet-lite0/efficientnet-lite0.pth");
    let weights = efficientnet::load(&weights).expect("cargo xtask setup --training");
    let images: Vec<Tensor> = (0..3).map(|index| pixels(&place.path(&format!("images/{index}.png")))).collect();
    let images = Tensor::stack(&images, 0).unwrap();
    let (features, logits) = efficientnet::describe(&mut Eager::new(&weights), &images).unwrap();
    for (name, expected) in [("features", &features), ("logits", &logits)] {
        assert_eq!(kept[name].dims(), expected.dims());
        let [found, expected] = [&kept[name], expected].map(|tensor| values(tensor).unwrap());
        let relative = largest_difference(&found, &expected) / largest(&expected);
        assert!(relative <= 1e-4, "{name}: {relative:e}");
    }
}

/// The pixels of a picture, `[3, height, width]`, from 0 to 255.
fn pixels(path: &Path) -> Tensor {
    let picture = picture::load(path).unwrap();
    let (width, height) = picture.dimensions();
    let bytes: Vec<f32> = picture.into_raw().into_iter().map(f32::from).collect();
    let tensor = Tensor::from_vec(bytes, (height as usize, width as usize, 3), &Device::Cpu).unwrap();
    tensor.permute((2, 0, 1)).unwrap().contiguous().unwrap()
}

#[test]
fn images_of_a_bundle_are_generated_once() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    folder(&place, "photos", 6, 1.0);
    let line =
        "eqim-eval bundle --engine bundle --count 6 --tokens 8 --steps 4 --seed 3 -o images photos --splits 2 --json";
    let first = json(&place.run(line).succeeded().stdout);
    assert_eq!((&first["images"]["count"], &first["real"]["count"]), (&6.into(), &6.into()));
    let before = place.listing();
    let again = json(&place.run(line).succeeded().stdout);
    assert_eq!(first, again);
    let images = |listing: &std::collections::BTreeMap<std::path::PathBuf, _>| -> Vec<_> {
        listing.keys().filter(|path| path.extension().is_some_and(|extension| extension == "png")).cloned().collect()
    };
    let after = place.listing();
    assert_eq!(images(&before), images(&after));
    for path in images(&before).iter().filter(|path| path.to_string_lossy().contains("/images/")) {
        assert_eq!(before[path], after[path], "{} was made again", path.display());
    }
    // Fewer images, or other ones, would be compared with those that are there.
    place.run(&line.replace("--count 6", "--count 4")).failed(2, &["images", "--output"]);
    place.run(&line.replace("--seed 3", "--seed 4")).failed(2, &["images", "--output"]);
    place.run(&format!("{line} --class 99 -o others").replace("-o images ", "")).failed(2, &["class", "99"]);
    // Every class has its image.
    let text = String::from_utf8(place.read("images/jobs.jsonl")).unwrap();
    assert_eq!(text.lines().next().unwrap(), r#"{"class":0,"id":"000000","seed":3}"#);
    assert_eq!(text.lines().last().unwrap(), r#"{"class":0,"id":"000005","seed":8}"#);
}

#[test]
fn photographs_are_compared_with_their_reconstructions() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    folder(&place, "photos", 6, 1.0);
    let line = "eqim-eval reconstructions --engine bundle -o pairs photos --crops 6 --crop-size 32 --splits 2 --json";
    let found = json(&place.run(line).succeeded().stdout);
    let psnr = found["psnr"].as_f64().unwrap();
    assert!(psnr > 0.0 && psnr < 60.0, "{psnr}");
    let compare =
        "eqim-eval compare pairs/reconstructions pairs/photographs --crops 6 --crop-size 32 --splits 2 --json";
    let compared = json(&place.run(compare).succeeded().stdout);
    assert_eq!(found["metrics"], compared["metrics"]);
    assert!(compared.get("psnr").is_none());
    place.run(line).failed(2, &["pairs", "has files already", "--output"]);
}

#[test]
fn quality_is_measured_over_the_length() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    folder(&place, "photos", 6, 1.0);
    place.write(
        "jobs.jsonl",
        (0..4).map(|seed| format!("{{\"id\": \"{seed}\", \"seed\": {seed}}}\n")).collect::<String>(),
    );
    place.run("eqim-run --engine bundle --jobs jobs.jsonl --tokens 24 --steps 4 -o images").succeeded();
    // A token is 4 pixels wide, and an image 32 pixels high: 8 tokens per square.
    let line = "eqim-eval drift images photos --token-width 4 --every 4 --seams 16 --plot drift.png --crops 6 --json";
    let refused = place.run(line).failed(2, &["--crops", "32 pixels", "256 pixels"]);
    assert!(refused.stdout.is_empty());
    let line = format!("{line} --crop-size 32");
    let report = json(&place.run(&line).succeeded().stdout);
    let tokens: Vec<u64> =
        report["places"].as_array().unwrap().iter().map(|place| place["token"].as_u64().unwrap()).collect();
    assert_eq!(tokens, [0, 4, 8, 12, 16]);
    assert!(report["seams"]["with_seam"].as_f64().unwrap() > 0.0);
    assert!(image::open(place.path("drift.png")).is_ok());
}

#[test]
fn bad_input_of_an_evaluation() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    folder(&place, "photos", 4, 1.0);
    std::fs::create_dir_all(place.path("empty")).unwrap();
    std::fs::create_dir_all(place.path("sizes")).unwrap();
    waves(64, 48, 1.0, 0).save(place.path("sizes/a.png")).unwrap();
    waves(65, 48, 1.0, 0).save(place.path("sizes/b.png")).unwrap();
    std::fs::create_dir_all(place.path("one")).unwrap();
    waves(64, 48, 1.0, 0).save(place.path("one/a.png")).unwrap();
    place.write("text.npz", "no statistics");
    place.write("text.safetensors", "no features");
    place.run("eqim-eval features photos --resize legacy -o legacy.safetensors").succeeded();
    for line in [
        "compare missing photos",
        "compare empty photos",
        "compare sizes photos",
        "compare one photos",
        "compare photos text.npz",
        "compare photos text.safetensors",
        "compare photos bundle/model.safetensors",
        "compare photos legacy.safetensors",
        "compare photos photos --neighbours 4",
        "compare photos photos --features bundle/decoder.onnx",
        "compare photos photos --features bundle/model.safetensors",
        "compare photos photos --resize sharp",
        "features photos -o missing/photos.safetensors",
        "features photos -o photos.npz",
        "bundle --engine missing -o images photos",
        "bundle --engine bundle -o images legacy.safetensors",
        "drift one photos",
    ] {
        place.refused(&format!("eqim-eval {line}"));
    }
    insta::assert_snapshot!(place.messages());

    // A picture that cannot be read is named and counted; too few images are said.
    place.write("photos/a/broken.png", &place.read("photos/a/0.png")[..200]);
    let run = place.run("eqim-eval compare photos photos --splits 2").succeeded();
    for part in ["broken.png", "1 skipped", "rank"] {
        assert!(run.stderr.contains(part), "no {part:?} in {}", run.stderr);
    }
}
