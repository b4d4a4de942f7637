//! `eqim-run --jobs`: many images from one jobs file.

use std::process::Command;

use eqim::digest::sha256;
use eqim::lock::Lock;
use image::RgbImage;
use serde_json::Value;

use crate::common::bins::{Workplace, program};
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

/// Ids of the jobs that a run did, sorted.
fn done(place: &Workplace, line: &str) -> Vec<String> {
    let run = place.run(line).succeeded();
    let mut ids: Vec<String> = lines(&run.stdout).iter().map(|line| line["id"].as_str().unwrap().into()).collect();
    ids.sort();
    ids
}

#[test]
fn a_job_is_done_only_with_its_image_and_all_that_made_it() {
    let (place, _) = workplace();
    let line = "eqim-run --engine bundle --cfg 3 --jobs jobs.jsonl -o many";
    assert_eq!(done(&place, line).len(), 5);
    // What a run that was killed has left is removed, even if nothing else is to be done.
    std::fs::create_dir(place.path("many/.eqim-left")).unwrap();
    assert!(done(&place, line).is_empty());
    assert!(!place.path("many/.eqim-left").exists());
    let record: Value = serde_json::from_slice(&place.read("many/d.json")).unwrap();
    assert_eq!(record["prefix_sha256"], sha256(place.read("prefix.png")));
    assert_eq!(record["image"]["sha256"], sha256(place.read("many/d.png")));
    assert_eq!(record["image"]["bytes"], place.read("many/d.png").len());
    // The image has lost its bytes, or one of them is another.
    place.write("many/a.png", "");
    let mut bytes = place.read("many/b.png");
    *bytes.last_mut().unwrap() ^= 1;
    place.write("many/b.png", bytes);
    // A record of an older version, which has no hash of the image.
    let mut record: Value = serde_json::from_slice(&place.read("many/c.json")).unwrap();
    record.as_object_mut().unwrap().remove("image");
    place.write("many/c.json", record.to_string());
    assert_eq!(done(&place, line), ["a", "b", "c"]);
    // Another picture under the name of the prefix.
    let picture = image(&place, "prefix.png");
    RgbImage::from_pixel(picture.width(), picture.height(), image::Rgb([9, 90, 200]))
        .save(place.path("prefix.png"))
        .unwrap();
    assert_eq!(done(&place, line), ["d"]);
    assert!(done(&place, line).is_empty());
}

#[test]
fn the_record_of_an_older_image_is_removed_first() {
    let (place, jobs) = workplace();
    let line = "eqim-run --engine bundle --jobs jobs.jsonl -o many";
    assert_eq!(done(&place, line).len(), 5);
    // The new image cannot be written, as if the run had been killed.
    let before = place.read("many/a.png");
    std::fs::remove_file(place.path("many/a.png")).unwrap();
    std::fs::create_dir(place.path("many/a.png")).unwrap();
    place.write("jobs.jsonl", jobs.replace("\"seed\": 3", "\"seed\": 30"));
    place.run(line).failed(1, &["1 jobs failed"]);
    assert!(!place.path("many/a.json").exists(), "the record of the other seed is left");
    std::fs::remove_dir(place.path("many/a.png")).unwrap();
    place.write("many/a.png", before);
    assert_eq!(done(&place, line), ["a"]);
}

#[test]
fn a_prefix_that_jobs_share_is_read_once() {
    let (place, _) = workplace();
    let mut jobs: Vec<String> = (0..7)
        .map(|seed| format!(r#"{{"id": "{seed}", "seed": {seed}, "tokens": 5, "prefix": "prefix.png"}}"#))
        .collect();
    // A job that is too short for the prefix, and one whose picture cannot be read.
    jobs[3] = jobs[3].replace("\"tokens\": 5", "\"tokens\": 2");
    place.write("text.png", "a picture");
    jobs[5] = jobs[5].replace("prefix.png", "text.png");
    place.write("jobs.jsonl", jobs.join("\n"));
    let run = place.run("eqim-run --engine bundle --jobs jobs.jsonl --max-batch 2 -o many");
    let all = lines(&run.stdout);
    let mut errors: Vec<&str> = all.iter().filter_map(|line| line["error"].as_str()).collect();
    errors.sort_unstable();
    assert!(errors[0].starts_with("jobs.jsonl line 4: prefix prefix.png: has 2 tokens and the image 2"), "{errors:?}");
    assert!(errors[1].starts_with("jobs.jsonl line 6: prefix text.png: "), "{errors:?}");
    let reads = run.stderr.matches("prefix prefix.png: ").count();
    run.failed(1, &["2 jobs failed"]);
    assert_eq!(reads, 2, "once before the picture that cannot be read and once after it");
    assert_eq!(place.listing_of("many").len(), 10);
}

#[test]
fn files_of_jobs_as_windows_writes_them() {
    let (place, _) = workplace();
    place.write("jobs.jsonl", "\u{feff}{\"id\": 7, \"class\": 1}\r\n\r\n{\"class\": 2}\r\n\r\n");
    assert_eq!(done(&place, "eqim-run --engine bundle --jobs jobs.jsonl -o many"), ["3", "7"]);
    let utf16: Vec<u8> = "\u{feff}{\"id\": 7}\r\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    place.write("utf16.jsonl", utf16);
    place.write("array.jsonl", "[{\"id\": \"a\"},\n {\"id\": \"b\"}]");
    place.write("latin1.jsonl", b"{}\n{\"id\": \"\xe4\"}");
    for file in ["utf16.jsonl", "array.jsonl", "latin1.jsonl", "bundle"] {
        place.refused(&format!("eqim-run --engine bundle --jobs {file} -o other"));
    }
    if cfg!(unix) {
        place.refused("eqim-run --engine bundle --jobs /dev/zero -o other");
    }
    insta::assert_snapshot!(place.messages());
}

#[cfg(unix)]
#[test]
fn jobs_come_through_a_pipe() {
    let (place, _) = workplace();
    let line = format!("exec {} --engine bundle --jobs <(cat jobs.jsonl) -o many", program("eqim-run").display());
    let output = Command::new("bash").args(["-c", &line]).current_dir(place.path("")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(lines(&String::from_utf8(output.stdout).unwrap()).len(), 5);
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

/// Another process that makes an image keeps it, and the next run does what is left.
#[test]
fn an_image_is_made_by_one_process() {
    let (place, _) = workplace();
    std::fs::create_dir(place.path("many")).unwrap();
    let lock = Lock::beside(&place.path("many/b.png")).unwrap();
    let line = "eqim-run --engine bundle --jobs jobs.jsonl -o many";
    let run = place.run(line);
    let failed: Vec<Value> = lines(&run.stdout).into_iter().filter(|line| line["file"].is_null()).collect();
    let error = failed[0]["error"].as_str().unwrap();
    assert_eq!((failed.len(), failed[0]["id"].as_str()), (1, Some("b")));
    assert!(
        error.ends_with(&format!("b.png: is in use by process {}: wait until it ends", std::process::id())),
        "{error}"
    );
    run.failed(1, &["1 jobs failed"]);
    drop(lock);
    assert_eq!(done(&place, line), ["b"]);
    let files = place.listing_of("many");
    assert_eq!(files.len(), 10, "an image and a record of each: {files:?}");
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
