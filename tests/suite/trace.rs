//! `eqim-run --trace`: pictures of the effect of each token.

use image::RgbImage;
use serde_json::Value;

use crate::common::bins::Workplace;
use crate::common::{Fixture, fixtures};

const RUN: &str = "eqim-run --engine bundle --seed 3 --tokens 5 --cfg 2";

fn image(place: &Workplace, file: &str) -> RgbImage {
    image::open(place.path(file)).unwrap().to_rgb8()
}

fn json(place: &Workplace, file: &str) -> Value {
    serde_json::from_slice(&place.read(file)).unwrap()
}

/// Frames of an animated PNG.
fn frames(place: &Workplace, file: &str) -> Vec<Vec<u8>> {
    let file = std::fs::File::open(place.path(file)).unwrap();
    let mut reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().unwrap();
    let count = reader.info().animation_control.unwrap().num_frames;
    let frame = |_| {
        let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut bytes).unwrap();
        bytes
    };
    (0..count).map(frame).collect()
}

#[test]
fn tokens_take_the_places_of_random_ones() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    place.run(&format!("{RUN} --class 1 -o image.png --trace trace")).succeeded();
    assert_eq!(place.listing_of("trace"), ["encoded", "encoded.png", "generated", "generated.png", "trace.json"]);
    for view in ["generated", "encoded"] {
        let names: Vec<String> = (0..=5).map(|index| format!("{index:04}.png")).collect();
        assert_eq!(place.listing_of(&format!("trace/{view}")), names);
        let animated = frames(&place, &format!("trace/{view}.png"));
        let single = names.iter().map(|name| image(&place, &format!("trace/{view}/{name}")).into_raw());
        assert!(single.eq(animated.clone()), "{view}: the animation has other frames");
        assert!(animated.is_sorted_by(|a, b| a != b), "{view}: a token changes nothing");
    }
    assert!(image(&place, "trace/generated/0005.png") == image(&place, "image.png"), "all tokens are the image");
    assert!(image(&place, "trace/generated/0000.png") == image(&place, "trace/encoded/0000.png"), "both begin alike");
    let trace = json(&place, "trace/trace.json");
    assert_eq!(trace["encoded"]["of"], "the generated image");
    let tokens = trace["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 5);
    for (index, token) in tokens.iter().enumerate() {
        assert!(token["index"] == index && token["given"] == false);
        assert!(["norm", "noise_norm", "flow_sampler_ms"].iter().all(|key| token[key].as_f64().unwrap() > 0.0));
        assert_eq!(token["transformer_step_ms"].is_null(), index == 0);
    }
    let changes = trace["generated"]["changes"].as_array().unwrap();
    assert_eq!(changes.len(), 5);
    for change in changes {
        let [mean, own, near] = ["mean", "own", "near"].map(|key| change[key].as_f64().unwrap());
        assert!(mean > 0.0 && 0.0 < own && own <= near && near <= 1.0, "{change}");
    }
}

#[test]
fn norms_are_those_of_the_saved_tokens() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    place.run(&format!("{RUN} --class 1 -o image.png --trace trace --save-tokens run.safetensors")).succeeded();
    let mut file = eqim::checkpoint::tensors::TensorFile::open(&place.path("run.safetensors")).unwrap();
    for (key, of) in [("norm", "tokens"), ("noise_norm", "noise")] {
        let rows = file.read(of).unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        let norms = rows.iter().map(|row| row.iter().map(|value| f64::from(value * value)).sum::<f64>().sqrt());
        for (norm, token) in norms.zip(json(&place, "trace/trace.json")["tokens"].as_array().unwrap()) {
            assert!((norm - token[key].as_f64().unwrap()).abs() < 1e-5 * norm, "{key}: {token}");
        }
    }
}

#[test]
fn a_picture_is_traced_by_the_tokens_of_its_encoder() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    place.run("eqim-run --engine bundle --class 0 --tokens 3 -o photo.png").succeeded();
    place.run(&format!("{RUN} --prefix photo.png --direction left -o image.png --trace trace")).succeeded();
    let trace = json(&place, "trace/trace.json");
    assert_eq!(trace["encoded"]["of"], "the picture of --prefix");
    let given: Vec<bool> =
        trace["tokens"].as_array().unwrap().iter().map(|token| token["given"].as_bool().unwrap()).collect();
    assert_eq!(given, [true, true, true, false, false]);
    assert!(trace["tokens"][2]["noise_norm"].is_null() && trace["tokens"][3]["noise_norm"].is_number());
    assert_eq!(place.listing_of("trace/encoded").len(), 4);
    assert_eq!(image(&place, "trace/encoded/0000.png").width(), image(&place, "photo.png").width());
    assert!(image(&place, "trace/generated/0005.png") == image(&place, "image.png"), "frames are not mirrored");
    // A batch has one folder per image.
    place.run(&format!("{RUN} --class 1,2 -o image.png --trace both")).succeeded();
    assert_eq!(place.listing_of("both"), ["0", "1"]);
    for row in 0..2 {
        let last = image(&place, &format!("both/{row}/generated/0005.png"));
        assert!(last == image(&place, &format!("image-{row}.png")), "image {row}");
    }
}

#[test]
fn what_cannot_be_traced_is_refused() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    std::fs::create_dir(place.path("there")).unwrap();
    place.refused(&format!("{RUN} -o a.png --trace there"));
    place.refused(&format!("{RUN} -o a.png --trace no/such"));
    place.refused(&format!("{RUN} -o a.png --trace t --tile 4"));
    place.refused(&format!("{RUN} -o a.png --trace bundle/t"));
    insta::assert_snapshot!(place.messages());
}
