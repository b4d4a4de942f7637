//! `eqim-run --jobs`: many images from one jobs file.

use image::RgbImage;
use serde_json::Value;

use crate::common::bins::Workplace;
use crate::common::{Fixture, fixtures};

const JOBS: &str = r#"{"id": "a", "class": 1, "seed": 3, "tokens": 9}
{"id": "b", "class": 2, "seed": 4, "tokens": 3, "cfg": 2.5}

{"class": 0, "width": 24, "cfg": 1, "seed": 5}
{"id": "c", "seed": 6, "tokens": 6, "cfg_schedule": "constant", "solver": "heun", "steps": 3}
{"id": "d", "class": 1, "seed": 7, "tokens": 5, "prefix": "prefix.png"}
"#;

/// A workplace with a bundle, a prefix image, and jobs whose widths are multiples of the token width.
fn workplace() -> (Workplace, String) {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    let line = "eqim-run --engine bundle --class 0 --tokens 2 -o prefix.png";
    place.run(line).succeeded();
    let token_width = image::open(place.path("prefix.png")).unwrap().width() / 2;
    let jobs = JOBS.replace("\"width\": 24", &format!("\"width\": {}", 3 * token_width));
    place.write("jobs.jsonl", &jobs);
    (place, jobs)
}

fn image(place: &Workplace, file: &str) -> RgbImage {
    image::open(place.path(file)).unwrap().to_rgb8()
}

#[track_caller]
fn within_a_level(found: &RgbImage, expected: &RgbImage) {
    assert_eq!(found.dimensions(), expected.dimensions());
    let largest = found.as_raw().iter().zip(expected.as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(largest <= Some(1), "differs by {largest:?} levels");
}

fn lines(stdout: &str) -> Vec<Value> {
    stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_image_is_the_one_that_it_is_alone() {
    let (place, jobs) = workplace();
    let run = place.run("eqim-run --engine bundle --cfg 3 --jobs jobs.jsonl --max-batch 3 -o many").succeeded();
    assert_eq!(lines(&run.stdout).len(), 5);
    assert!(run.stderr.contains("5 jobs done, 0 done before, 0 failed"), "{}", run.stderr);
    for (number, line) in jobs.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
        let job: Value = serde_json::from_str(line).unwrap();
        let mut alone = "eqim-run --engine bundle -o alone.png".to_string();
        for (key, value) in job.as_object().unwrap().iter().filter(|(key, _)| *key != "id") {
            let value = value.as_str().map_or_else(|| value.to_string(), String::from);
            alone += &format!(" --{} {value}", key.replace('_', "-"));
        }
        if job["cfg"].is_null() {
            alone += " --cfg 3";
        }
        place.run(&alone).succeeded();
        let id = job["id"].as_str().map_or_else(|| (number + 1).to_string(), String::from);
        within_a_level(&image(&place, &format!("many/{id}.png")), &image(&place, "alone.png"));
    }
}

#[test]
fn a_run_that_is_repeated_does_only_what_is_left() {
    let (place, jobs) = workplace();
    let line = "eqim-run --engine bundle --cfg 3 --jobs jobs.jsonl -o many";
    place.run(line).succeeded();
    let before = place.read("many/a.png");
    std::fs::remove_file(place.path("many/b.png")).unwrap();
    place.write("jobs.jsonl", jobs.replace("\"seed\": 6", "\"seed\": 60"));
    let run = place.run(line).succeeded();
    let mut ids: Vec<String> = lines(&run.stdout).iter().map(|line| line["id"].as_str().unwrap().into()).collect();
    ids.sort();
    assert_eq!(ids, ["b", "c"], "the lost one and the changed one");
    assert!(run.stderr.contains("2 jobs done, 3 done before, 0 failed"), "{}", run.stderr);
    assert_eq!(place.read("many/a.png"), before);
}

#[test]
fn shards_share_the_jobs() {
    let (place, _) = workplace();
    let mut ids = vec![];
    for shard in ["1/2", "2/2"] {
        let run = place.run(&format!("eqim-run --engine bundle --jobs jobs.jsonl --shard {shard} -o many")).succeeded();
        ids.extend(lines(&run.stdout).iter().map(|line| line["id"].as_str().unwrap().to_string()));
    }
    ids.sort();
    assert_eq!(ids, ["4", "a", "b", "c", "d"]);
}

#[test]
fn jobs_that_fail_do_not_fail_the_rest() {
    let (place, jobs) = workplace();
    let bad = [
        r#"{"id": "e", "class": 1"#,
        r#"{"id": "f", "colour": 1}"#,
        r#"{"id": "g", "class": 99}"#,
        r#"{"id": "../h"}"#,
        r#"{"id": "a"}"#,
        r#"{"id": "i", "prefix": "missing.png"}"#,
        r#"{"id": "j", "tokens": 4, "width": 4}"#,
    ];
    place.write("jobs.jsonl", format!("{jobs}{}", bad.join("\n")));
    let run = place.run("eqim-run --engine bundle --jobs jobs.jsonl -o many");
    let all = lines(&run.stdout);
    let errors: Vec<&str> = all.iter().filter_map(|line| line["error"].as_str()).collect();
    insta::assert_snapshot!(errors.join("\n"));
    run.failed(1, &["7 jobs failed", "jobs.jsonl"]);
    assert_eq!(place.listing_of("many").len(), 10, "an image and a record of each of the five others");
}

#[test]
fn lines_that_cannot_be_done_are_refused() {
    let (place, _) = workplace();
    for line in [
        "--jobs missing.jsonl -o many",
        "--jobs jobs.jsonl",
        "--jobs jobs.jsonl -o bundle",
        "--jobs jobs.jsonl -o many --shard 3/2",
        "--jobs jobs.jsonl -o many --max-batch 0",
        "--max-batch 2",
        "--jobs jobs.jsonl -o many --save-tokens t.safetensors",
    ] {
        place.refused(&format!("eqim-run --engine bundle {line}"));
    }
    insta::assert_snapshot!(place.messages());
}
