//! Photographs that are continued to the left or right, and images as folders of tiles.

use image::{RgbImage, imageops};
use serde_json::Value;

use crate::common::bins::Workplace;
use crate::common::{Fixture, fixtures};

/// Width of the photograph in tokens.
const GIVEN: u32 = 7;
/// Number of tokens over which the photograph is blended into the generated image.
const EDGE: u32 = 2;
const RUN: &str = "eqim-run --engine bundle --class 1 --seed 3 --tokens 12";

/// A workplace with a photograph of `GIVEN` tokens and its mirror image, and the width of a token in pixels.
fn workplace() -> (Workplace, u32) {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    place.run("eqim-run --engine bundle --class 0 --tokens 2 -o small.png").succeeded();
    let (width, height) = image::open(place.path("small.png")).unwrap().to_rgb8().dimensions();
    let wave = |x: u32, y: u32, speed: u32| (x * speed + y * 11 + x * y % 37) as u8;
    let photo =
        RgbImage::from_fn(GIVEN * width / 2, height, |x, y| image::Rgb([3, 5, 7].map(|speed| wave(x, y, speed))));
    photo.save(place.path("photo.png")).unwrap();
    imageops::flip_horizontal(&photo).save(place.path("mirrored.png")).unwrap();
    (place, width / 2)
}

fn image(place: &Workplace, file: &str) -> RgbImage {
    image::open(place.path(file)).unwrap().to_rgb8()
}

fn columns(image: &RgbImage, from: u32, to: u32) -> RgbImage {
    imageops::crop_imm(image, from, 0, to - from, image.height()).to_image()
}

#[test]
fn a_photograph_keeps_its_pixels_up_to_a_blended_edge() {
    let (place, width) = workplace();
    place.run(&format!("{RUN} --prefix photo.png -o decoded.png")).succeeded();
    place.run(&format!("{RUN} --prefix photo.png --keep-prefix-pixels -o kept.png")).succeeded();
    let [photo, decoded, kept] = ["photo.png", "decoded.png", "kept.png"].map(|file| image(&place, file));
    let (edge, end) = ((GIVEN - EDGE) * width, GIVEN * width);
    assert!(columns(&kept, 0, edge) == columns(&photo, 0, edge), "the photograph's pixels are others");
    assert!(columns(&kept, end, 12 * width) == columns(&decoded, end, 12 * width), "what follows is another");
    // At the blended edge, every pixel value lies between the two images, up to rounding.
    for (x, y, pixel) in columns(&kept, edge, end).enumerate_pixels() {
        for channel in 0..3 {
            let ends = [&photo, &decoded].map(|image| image.get_pixel(edge + x, y)[channel]);
            let (low, high) = (ends[0].min(ends[1]), ends[0].max(ends[1]));
            assert!((low.saturating_sub(1)..=high.saturating_add(1)).contains(&pixel[channel]), "{x}, {y}");
        }
    }
    // The same in tiles; the photograph ends inside a tile.
    let tiles = "--tile 4 --overlap 1";
    place.run(&format!("{RUN} --prefix photo.png {tiles} -o tiled.png")).succeeded();
    place.run(&format!("{RUN} --prefix photo.png --keep-prefix-pixels {tiles} -o tiled-kept.png")).succeeded();
    let [tiled, tiled_kept] = ["tiled.png", "tiled-kept.png"].map(|file| image(&place, file));
    assert!(columns(&tiled_kept, 0, edge) == columns(&photo, 0, edge));
    assert!(columns(&tiled_kept, end, 12 * width) == columns(&tiled, end, 12 * width));
}

#[test]
fn to_the_left_is_the_mirror_image_of_to_the_right() {
    let (place, width) = workplace();
    for how in ["", " --keep-prefix-pixels", " --tile 4 --overlap 1 --keep-prefix-pixels"] {
        place.run(&format!("{RUN} --prefix mirrored.png -o right.png{how}")).succeeded();
        place.run(&format!("{RUN} --prefix photo.png --direction left -o left.png{how}")).succeeded();
        let [left, right] = ["left.png", "right.png"].map(|file| image(&place, file));
        assert!(left == imageops::flip_horizontal(&right), "{how}");
        if !how.is_empty() {
            let end = 12 * width;
            let photo = image(&place, "photo.png");
            let kept = (GIVEN - EDGE) * width;
            assert!(columns(&left, end - kept, end) == columns(&photo, GIVEN * width - kept, GIVEN * width), "{how}");
        }
    }
    // The photograph is cut on the side that is not continued.
    let photo = image(&place, "photo.png");
    columns(&photo, 0, GIVEN * width - 3).save(place.path("odd.png")).unwrap();
    let run = place.run(&format!("{RUN} --prefix odd.png --direction left --keep-prefix-pixels -o odd-left.png"));
    assert!(run.succeeded().stderr.contains(&format!("{} cut on the right", width - 3)));
    let (odd, kept) = (image(&place, "odd-left.png"), (GIVEN - 1 - EDGE) * width);
    let end = 12 * width;
    assert!(columns(&odd, end - kept, end) == columns(&photo, EDGE * width, EDGE * width + kept));
}

#[test]
fn jobs_are_finished_in_the_same_way() {
    let (place, _) = workplace();
    place.run(&format!("{RUN} --prefix photo.png --direction left --keep-prefix-pixels -o alone.png")).succeeded();
    let job = r#"{"id": "a", "class": 1, "seed": 3, "tokens": 12, "prefix": "photo.png", "direction": "left", "keep_prefix_pixels": true}
{"id": "b", "class": 1, "seed": 3, "tokens": 12, "keep_prefix_pixels": true}
"#;
    place.write("jobs.jsonl", job);
    let run =
        place.run("eqim-run --engine bundle --jobs jobs.jsonl --max-batch 1 -o many/").failed(1, &["1 jobs failed"]);
    let error = "jobs.jsonl line 2: keep_prefix_pixels needs a PNG or JPEG as the prefix";
    assert!(run.stdout.contains(error), "{}", run.stdout);
    assert!(place.read("many/a.png") == place.read("alone.png"));
}

#[test]
fn what_cannot_be_finished_is_refused() {
    let (place, _) = workplace();
    place.run(&format!("{RUN} --save-tokens run.safetensors -o run.png")).succeeded();
    let refused = |flags: &str| place.refused(&format!("{RUN} -o a.png {flags}"));
    refused("--keep-prefix-pixels");
    let line = "eqim-run --engine bundle --tokens 20 -o a.png --prefix run.safetensors";
    place.refused(&format!("{line} --keep-prefix-pixels"));
    refused("--direction left");
    refused("--direction up --prefix photo.png");
    insta::assert_snapshot!(place.messages());
}

#[test]
fn a_folder_of_tiles_holds_the_same_columns() {
    let (place, width) = workplace();
    for (how, first) in [("", 0), (" --prefix photo.png --keep-prefix-pixels --direction left", 0)] {
        let line = format!("{RUN}{how} --tile 4 --overlap 1");
        place.run(&format!("{line} -o whole.png")).succeeded();
        place.run(&format!("{line} -o tiles/")).succeeded();
        let whole = image(&place, "whole.png");
        let index: Value = serde_json::from_slice(&place.read("tiles/index.json")).unwrap();
        assert_eq!((&index["width"], &index["height"]), (&whole.width().into(), &whole.height().into()));
        let mut x = first;
        let mut files = vec!["index.json".to_string()];
        for tile in index["tiles"].as_array().unwrap() {
            assert_eq!(tile["x"], x);
            let file = tile["file"].as_str().unwrap();
            let found = image(&place, &format!("tiles/{file}"));
            assert_eq!(tile["width"], found.width());
            assert!(found == columns(&whole, x, x + found.width()), "{how}: {file}");
            x += found.width();
            files.push(file.into());
        }
        assert_eq!(x, 12 * width);
        files.sort();
        assert_eq!(place.listing_of("tiles"), files);
        assert!(!place.path("tiles.partial").exists());
        place.refused(&format!("{line} -o tiles/"));
        std::fs::remove_dir_all(place.path("tiles")).unwrap();
    }
    place.refused(&format!("{RUN} --tile none -o tiles/"));
    for taken in ["whole.png/", "bundle/", "./", "no/such/"] {
        place.refused(&format!("{RUN} -o {taken}"));
    }
    // A short image is one tile.
    place.run(&format!("{RUN} -o short/")).succeeded();
    place.run(&format!("{RUN} -o short.png")).succeeded();
    assert!(image(&place, "short/0000000000.png") == image(&place, "short.png"));
    insta::assert_snapshot!(place.messages());
}
