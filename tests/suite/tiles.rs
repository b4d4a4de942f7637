//! Long images in tiles: as close to exact decoding as documented, without seams, and the same file after an
//! interruption.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use eqim::checkpoint;
use eqim::close;
use eqim::digest::sha256;
use eqim::engine::Engine;
use eqim::engine::candle::CandleEngine;
use eqim::generate::generate;
use eqim::generate::tiles::{TileDecoder, Tiling, decode_tiles};
use eqim::request::solver::Solver;
use eqim::request::{Noise, Request};
use ndarray::{Array2, Array3, Axis, s};

use crate::common::bins::{Workplace, program};
use crate::common::{Fixture, file, fixtures};

fn demo() -> CandleEngine {
    let (config, weights) = checkpoint::load_safetensors(&file("assets/demo/model.safetensors")).unwrap();
    CandleEngine::new(config, weights)
}

fn landscape(engine: &CandleEngine, tokens: usize) -> Array2<f32> {
    let request = Request {
        solver: Solver::Ab2,
        steps: 15,
        noise: Noise::Seed(22),
        ..Request::new(engine.config(), [Some(2)], tokens)
    };
    generate(engine, &request, |_| {}).unwrap().tokens.index_axis_move(Axis(0), 0)
}

fn tiled(engine: &dyn Engine, tiling: Tiling, tokens: &Array2<f32>) -> Array3<f32> {
    let (width, height) = engine.config().image_size(tokens.dim().0);
    let mut image = Array3::zeros((3, height, width));
    let mut done = 0;
    decode_tiles(engine, tiling, tokens.view(), |strip| {
        assert_eq!(strip.x, done);
        done += strip.pixels.dim().2;
        image.slice_mut(s![.., .., strip.x..done]).assign(&strip.pixels);
        Ok(())
    })
    .unwrap();
    assert_eq!(done, width, "columns are missing");
    image.mapv(|value: f32| value.clamp(-1.0, 1.0))
}

/// Mean absolute difference between neighbouring columns, where tiles overlap and elsewhere.
fn gradients(image: &Array3<f32>, shared: impl Fn(usize) -> bool) -> (f32, f32) {
    let step = &image.slice(s![.., .., 1..]) - &image.slice(s![.., .., ..-1]);
    let (mut inside, mut outside) = (vec![], vec![]);
    for (x, column) in step.axis_iter(Axis(2)).enumerate() {
        if shared(x) { &mut inside } else { &mut outside }.push(column.mapv(f32::abs).mean().unwrap());
    }
    let mean = |values: &[f32]| values.iter().sum::<f32>() / values.len() as f32;
    (mean(&inside), mean(&outside))
}

#[test]
fn tiles_are_close_to_the_whole_and_have_no_seams() {
    let engine = demo();
    let tokens = landscape(&engine, 112);
    let whole = engine.decode_tokens(tokens.view().insert_axis(Axis(0))).unwrap().index_axis_move(Axis(0), 0);
    let whole = whole.mapv(|value| value.clamp(-1.0, 1.0));
    let tiling = Tiling::default();
    let found = tiled(&engine, tiling, &tokens);
    let difference = (&found - &whole).mapv(|value| value.abs() * 127.5);
    let (mean, largest) = (difference.mean().unwrap(), close::largest(&difference));
    println!("of 255: mean {mean}, largest {largest}");
    // Measured: 0.46 and 1.8 (docs/long.md), on an image that shows one landscape along its whole width.
    assert!(mean < 0.7 && largest < 3.0, "mean {mean}, largest {largest}");
    let (step, width) = (tiling.tile - tiling.overlap, engine.config().tokenizer.token_width());
    let shared = |x: usize| x / width >= step && x / width % step < tiling.overlap && x / width < 112 - tiling.overlap;
    let ((inside, outside), (exact_inside, exact_outside)) = (gradients(&found, shared), gradients(&whole, shared));
    let ratio = (inside / outside) / (exact_inside / exact_outside);
    println!("steps where tiles meet, against elsewhere: {ratio} of those of the whole image");
    assert!((ratio - 1.0).abs() < 0.03, "{ratio}");
}

#[test]
fn one_tile_is_the_whole() {
    let engine = Fixture::open(fixtures()).engine(eqim::checkpoint::WeightSet::Ema);
    let tokens = Array2::from_shape_fn((6, engine.config().generator.embed), |(n, e)| ((7 * n + e) as f32).sin());
    let whole = engine.decode_tokens(tokens.view().insert_axis(Axis(0))).unwrap().index_axis_move(Axis(0), 0);
    assert_eq!(tiled(&engine, Tiling { tile: 6, overlap: 2 }, &tokens), whole.mapv(|value| value.clamp(-1.0, 1.0)));
}

#[test]
fn a_decoder_that_begins_later_gives_the_same_strips() {
    let engine = Fixture::open(fixtures()).engine(eqim::checkpoint::WeightSet::Ema);
    let tokens = Array2::from_shape_fn((19, engine.config().generator.embed), |(n, e)| ((7 * n + e) as f32).sin());
    let tiling = Tiling { tile: 6, overlap: 2 };
    let mut strips = vec![];
    decode_tiles(&engine, tiling, tokens.view(), |strip| {
        strips.push(strip.pixels);
        Ok(())
    })
    .unwrap();
    assert_eq!(strips.len(), tiling.count(19));
    for first in 0..strips.len() {
        let mut decoder = TileDecoder::from_tile(&engine, tiling, 19, first);
        let rest = tokens.rows().into_iter().skip(tiling.begin(first, 19));
        let found: Vec<_> = rest.filter_map(|token| decoder.push(token).unwrap()).collect();
        assert_eq!(found.len(), strips.len() - first);
        for strip in &found[1..] {
            assert_eq!(strip.pixels, strips[strip.index], "tile {} after {first}", strip.index);
        }
    }
}

const LINE: &str = "--engine bundle --class 1 --seed 3 --cfg 2 --tokens 60 --tile 8 --overlap 2 --steps 100 -o";

/// Starts `eqim-run` with the arguments of `line`, and waits until `tokens.f32` in `partial` has more than `bytes` bytes.
fn start(place: &Workplace, line: &str, partial: &str, bytes: u64) -> Child {
    let mut child = Command::new(program("eqim-run"))
        .args(line.split(' '))
        .current_dir(place.path(""))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let tokens = place.path(partial).join("tokens.f32");
    let start = Instant::now();
    while !std::fs::metadata(&tokens).is_ok_and(|file| file.len() > bytes) && child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing was written");
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A workplace with a bundle, a finished image `whole.png`, and the folder `killed.png.partial` of the same image, whose
/// run was killed after three tiles.
fn interrupted() -> Workplace {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    place.run(&format!("eqim-run {LINE} whole.png")).succeeded();
    kill(start(&place, &format!("{LINE} killed.png"), "killed.png.partial", THREE_TILES - 1));
    let is_unfinished = place.path("killed.png.partial").is_dir() && !place.path("killed.png").exists();
    assert!(is_unfinished, "it was not killed in time");
    place
}

/// Length in bytes of the tokens of the first three tiles of [`LINE`]: 8 + 6 + 6 tokens of 8 values.
const THREE_TILES: u64 = 20 * 8 * 4;

/// Copies the files of a folder to a new folder.
fn copy(place: &Workplace, from: &str, to: &str) {
    std::fs::create_dir(place.path(to)).unwrap();
    for name in place.listing_of(from) {
        std::fs::copy(place.path(from).join(&name), place.path(to).join(&name)).unwrap();
    }
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_file() {
    let place = interrupted();
    let other = format!("eqim-run {} killed.png", LINE.replace("--seed 3", "--seed 4"));
    place.run(&other).failed(2, &["killed.png.partial", "unfinished image of another run"]);
    let finished = place.run(&format!("eqim-run {LINE} killed.png")).succeeded();
    assert!(finished.stderr.contains("resuming after"), "{}", finished.stderr);
    assert!(place.read("whole.png") == place.read("killed.png"), "the files differ");
    assert!(!place.path("killed.png.partial").exists());
}

#[test]
fn a_run_has_one_owner() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    let line = LINE.replace("--tokens 60", "--tokens 600");
    place.run(&format!("eqim-run {line} whole.png")).succeeded();
    let child = start(&place, &format!("{line} two.png"), "two.png.partial", 0);
    let owner = format!("two.png.partial: is in use by process {}: wait until it ends", child.id());
    let other = line.replace("--seed 3", "--seed 4");
    for line in [&line, &other] {
        let second = place.run(&format!("eqim-run {line} two.png")).failed(1, &[&owner]);
        assert!(!second.stderr.contains("resumes"), "{}", second.stderr);
    }
    assert!(!place.path("two.png").exists(), "the first run was too fast");
    kill(child);
    place.run(&format!("eqim-run {line} two.png")).succeeded();
    assert!(place.read("whole.png") == place.read("two.png"), "the files differ");
    assert!(!place.path("two.png.partial").exists());
}

/// A change of a file's bytes.
type Change = fn(Vec<u8>) -> Vec<u8>;

#[test]
fn what_was_changed_is_done_again() {
    let place = interrupted();
    let zeroed: Change = |bytes| vec![0; bytes.len()];
    let longer: Change = |bytes| [&bytes[..], &[7; 64]].concat();
    let shorter: Change = |bytes| bytes[..bytes.len() - 40].into();
    let flipped: Change = |mut bytes| {
        bytes[THREE_TILES as usize / 2] ^= 1;
        bytes
    };
    let empty: Change = |_| vec![];
    let noise: Change = |_| vec![0xa5; 5000];
    let changes = [
        ("pixels.rgb", vec![zeroed, shorter, flipped, empty]),
        ("tokens.f32", vec![zeroed, shorter, flipped, empty, longer]),
        ("tiles.jsonl", vec![zeroed, shorter, flipped, empty, longer, noise]),
    ];
    for (file, changes) in changes {
        for (number, change) in changes.into_iter().map(Some).chain([None]).enumerate() {
            let name = format!("{file}-{number}.png");
            copy(&place, "killed.png.partial", &format!("{name}.partial"));
            let changed = format!("{name}.partial/{file}");
            match change {
                Some(change) => place.write(&changed, change(place.read(&changed))),
                None => std::fs::remove_file(place.path(&changed)).unwrap(),
            }
            place.run(&format!("eqim-run {LINE} {name}")).succeeded();
            assert!(place.read("whole.png") == place.read(&name), "{file}, change {number}: the images differ");
            assert!(!place.path(&format!("{name}.partial")).exists());
        }
    }
    // Tokens that are not finite, with the hash that they have.
    let mut tokens = place.read("killed.png.partial/tokens.f32");
    let whole = sha256(&tokens[..8 * 8 * 4]);
    tokens[5 * 8 * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let journal = String::from_utf8(place.read("killed.png.partial/tiles.jsonl")).unwrap();
    place.write("killed.png.partial/tiles.jsonl", journal.replace(&whole, &sha256(&tokens[..8 * 8 * 4])));
    place.write("killed.png.partial/tokens.f32", tokens);
    let problem = "killed.png.partial/tokens.f32: token 5 is not finite: remove killed.png.partial to begin again";
    place.run(&format!("eqim-run {LINE} killed.png")).failed(2, &[problem]);
}

#[test]
fn a_run_that_was_killed_at_its_end_is_done() {
    let place = interrupted();
    let state = String::from_utf8(place.read("killed.png.partial/run.json")).unwrap();
    let published = format!("{{ \"published\": \"{}\",", sha256(place.read("whole.png")));
    let state = state.replacen('{', &published, 1);
    let image = |name: &str| {
        let name = format!("{name}.png");
        copy(&place, "killed.png.partial", &format!("{name}.partial"));
        place.write(&format!("{name}.partial/run.json"), &state);
        place.write(&name, place.read("whole.png"));
        name
    };
    let removed = |name: &str, files: &[&str]| {
        for file in files {
            std::fs::remove_file(place.path(&format!("{name}.partial/{file}"))).unwrap();
        }
    };
    let ended = |name: &str| {
        place.run(&format!("eqim-run {LINE} {name}")).succeeded();
        assert!(place.read("whole.png") == place.read(name), "{name}: the images differ");
        assert!(!place.path(&format!("{name}.partial")).exists(), "{name}: the folder is left");
    };
    // Killed while files were removed, in their order: the image is not written again.
    let files = ["pixels.rgb", "tokens.f32", "tiles.jsonl", "lock"];
    for count in 0..=files.len() {
        let name = image(&format!("removing-{count}"));
        removed(&name, &files[..count]);
        let before = std::fs::metadata(place.path(&name)).unwrap().modified().unwrap();
        ended(&name);
        assert_eq!(std::fs::metadata(place.path(&name)).unwrap().modified().unwrap(), before, "{name}");
    }
    // Killed before the folder itself was removed, or just after it was made.
    let name = image("folder");
    removed(&name, &["pixels.rgb", "tokens.f32", "tiles.jsonl", "lock", "run.json"]);
    ended(&name);
    let name = image("new");
    removed(&name, &["pixels.rgb", "tokens.f32", "tiles.jsonl", "run.json"]);
    place.write(&format!("{name}.partial/.eqim-abc"), "{");
    ended(&name);
    // The image was changed since.
    let name = image("changed");
    place.write(&name, "");
    ended(&name);
}

#[cfg(unix)]
#[test]
fn links_and_foreign_files_in_the_folder_are_refused() {
    use std::os::unix::fs::symlink;
    let place = interrupted();
    for file in ["tokens.f32", "pixels.rgb", "tiles.jsonl", "lock"] {
        let name = format!("{file}.png");
        copy(&place, "killed.png.partial", &format!("{name}.partial"));
        let link = place.path(&format!("{name}.partial/{file}"));
        std::fs::remove_file(&link).unwrap();
        symlink(place.path("outside"), &link).unwrap();
        let problem = format!("{name}.partial/{file}: is not a file: remove it");
        place.run(&format!("eqim-run {LINE} {name}")).failed(2, &[&problem]);
        assert!(!place.path("outside").exists(), "{file} was written through a link");
    }
    place.write("file.png.partial", "");
    std::fs::create_dir(place.path("folder.png.partial")).unwrap();
    place.write("folder.png.partial/letter.txt", "");
    symlink(place.path("folder.png.partial"), place.path("link.png.partial")).unwrap();
    for name in ["file", "folder", "link"] {
        place.refused(&format!("eqim-run --backend candle {LINE} {name}.png"));
    }
    insta::assert_snapshot!(place.messages());
}

/// Runs `eqim-run` with a limit of the shell on the size of files, in units of 1024 bytes. Returns what it says when it
/// fails.
#[cfg(unix)]
fn limited(place: &Workplace, line: &str, limit: usize) -> String {
    let line = format!("trap '' XFSZ; ulimit -f {limit}; exec {} {line}", program("eqim-run").display());
    let output = Command::new("bash").args(["-c", &line]).current_dir(place.path("")).output().unwrap();
    let problem = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{problem}");
    problem
}

#[cfg(unix)]
#[track_caller]
fn same_folder(place: &Workplace, found: &str, expected: &str) {
    assert_eq!(place.listing_of(found), place.listing_of(expected));
    for name in place.listing_of(expected) {
        assert!(place.read(&format!("{found}/{name}")) == place.read(&format!("{expected}/{name}")), "{name}");
    }
    assert!(!place.path(&format!("{found}.partial")).exists());
}

#[cfg(unix)]
#[test]
fn a_folder_of_tiles_goes_on() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    // Long enough that the file of tokens reaches the limit before any tile does.
    let line = LINE.replace("--tokens 60", "--tokens 150");
    place.run(&format!("eqim-run {line} whole/")).succeeded();
    let problem = limited(&place, &format!("{line} part/"), 4);
    let tiles: Vec<String> = place.listing_of("part.partial");
    let tiles: Vec<&String> = tiles.iter().filter(|name| name.ends_with(".png")).collect();
    assert!(tiles.len() > 3, "no tile was done");
    assert!(problem.contains("the finished part is kept") && !place.path("part").exists(), "{problem}");

    let third = tiles[2];
    for name in ["missing", "cut", "changed", "stray", "moved"] {
        copy(&place, "part.partial", &format!("{name}.partial"));
        let tile = format!("{name}.partial/{third}");
        let bytes = place.read(&tile);
        match name {
            "missing" => std::fs::remove_file(place.path(&tile)).unwrap(),
            "cut" => place.write(&tile, &bytes[..bytes.len() / 2]),
            "changed" => place.write(&tile, [&bytes[..bytes.len() - 20], &[7; 20]].concat()),
            // A run that was killed leaves temporary files.
            "stray" => place.write("stray.partial/.eqim-abc", &bytes[..9]),
            // A run that was killed while it moved the tiles to the folder that it publishes.
            _ => {
                std::fs::create_dir(place.path("moved.partial/result")).unwrap();
                std::fs::rename(place.path(&tile), place.path(&format!("moved.partial/result/{third}"))).unwrap();
                place.write("moved.partial/result/index.json", "{}");
            }
        }
        let finished = place.run(&format!("eqim-run {line} {name}/")).succeeded();
        let is_redone = finished.stderr.contains("tile 2 is not what was written");
        assert_eq!(is_redone, !["stray", "moved"].contains(&name), "{name}: {}", finished.stderr);
        same_folder(&place, name, "whole");
    }
    copy(&place, "part.partial", "link.partial");
    let tile = format!("link.partial/{third}");
    std::fs::remove_file(place.path(&tile)).unwrap();
    std::os::unix::fs::symlink(place.path(&format!("whole/{third}")), place.path(&tile)).unwrap();
    place.run(&format!("eqim-run {line} link/")).failed(2, &[&format!("{tile}: is not a file: remove it")]);
    let finished = place.run(&format!("eqim-run {line} part/")).succeeded();
    assert!(finished.stderr.contains("resuming after"), "{}", finished.stderr);
    same_folder(&place, "part", "whole");
}

/// The tokens cannot be saved after the folder is published.
#[cfg(unix)]
#[test]
fn a_folder_that_is_published_is_not_done_again() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    let line = LINE.replace("--tokens 60", "--tokens 150");
    place.run(&format!("eqim-run --save-tokens whole.safetensors {line} whole/")).succeeded();
    let resumed = format!("--save-tokens part.safetensors {line} part/");
    let problem = limited(&place, &resumed, 8);
    assert!(problem.contains("part.safetensors") && place.path("part/index.json").is_file(), "{problem}");
    // Another image may not take its place.
    let other = resumed.replace("--seed 3", "--seed 4");
    place.run(&format!("eqim-run {other}")).failed(2, &["part.partial", "unfinished image of another run"]);
    // A folder that was changed since is not the one that was published.
    copy(&place, "part", "changed");
    copy(&place, "part.partial", "changed.partial");
    place.write("changed/0000000000.png", "");
    place.run(&format!("eqim-run {line} changed/")).failed(2, &["--output changed/: exists: remove it first"]);
    let before = std::fs::metadata(place.path("part/index.json")).unwrap().modified().unwrap();
    place.run(&format!("eqim-run {resumed}")).succeeded();
    assert_eq!(std::fs::metadata(place.path("part/index.json")).unwrap().modified().unwrap(), before);
    assert!(place.read("part.safetensors") == place.read("whole.safetensors"), "the tokens differ");
    same_folder(&place, "part", "whole");
    // A run that was killed after everything else was removed.
    std::fs::create_dir(place.path("part.partial")).unwrap();
    place.run(&format!("eqim-run {resumed}")).failed(2, &["--output part/: exists: remove it first"]);
    assert!(!place.path("part.partial").exists());
}

/// A limit of the shell on the size of files imitates a full disk.
#[cfg(unix)]
#[test]
fn a_disk_that_is_full_keeps_what_is_done() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    place.run(&format!("eqim-run {LINE} whole.png")).succeeded();
    let problem = limited(&place, &format!("{LINE} full.png"), 1);
    assert!(problem.contains("full.png.partial") && problem.contains("cannot be written"), "{problem}");
    assert!(problem.contains("the finished part is kept"), "{problem}");
    assert!(place.path("full.png.partial").is_dir() && !place.path("full.png").exists());
    place.run(&format!("eqim-run {LINE} full.png")).succeeded();
    assert!(place.read("whole.png") == place.read("full.png"), "the files differ");
}

#[cfg(target_os = "linux")]
#[test]
fn memory_does_not_grow_with_the_width() {
    let place = Workplace::with_bundle(&Fixture::open(fixtures()));
    let peak = |tokens: usize| {
        let line = format!(
            "eqim-run --engine bundle --tokens {tokens} --tile 16 --steps 1 --threads 1 --json -o {tokens}.png"
        );
        let report: serde_json::Value = serde_json::from_str(&place.run(&line).succeeded().stdout).unwrap();
        let width = image::image_dimensions(place.path(&format!("{tokens}.png"))).unwrap().0;
        assert_eq!(report["width"], width);
        report["peak_bytes"].as_f64().unwrap()
    };
    let (short, long) = (peak(1500), peak(6000));
    println!("peak of 1500 tokens {short}, of 6000 {long}");
    assert!(short > 0.0 && long < 1.1 * short, "{short}, {long}");
}
