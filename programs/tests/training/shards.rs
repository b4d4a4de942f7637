//! Trainings on tar shards, and on more photographs than are decoded at the start.

use std::fs::{self, File};
use std::io::Cursor;
use std::path::Path;

use eqim_training::photos::LOOKED_AT;
use image::ImageFormat;
use tar::{Builder, Header};

use super::place::{Place, picture};
use super::same;

/// Writes a shard of members with these names and contents.
fn shard(path: &Path, members: impl IntoIterator<Item = (String, Vec<u8>)>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut builder = Builder::new(File::create(path).unwrap());
    for (name, contents) in members {
        let mut header = Header::new_gnu();
        header.set_size(contents.len() as u64);
        builder.append_data(&mut header, name, contents.as_slice()).unwrap();
    }
    builder.into_inner().unwrap();
}

/// The bytes of a PNG.
fn png(width: u32, height: u32, colour: [u8; 3], index: u32) -> Vec<u8> {
    let mut file = Cursor::new(vec![]);
    picture(width, height, colour, index).write_to(&mut file, ImageFormat::Png).unwrap();
    file.into_inner()
}

#[test]
fn a_shard_trains_as_its_folder() {
    let place = Place::new();
    let names = ["dusk", "noon"].iter().flat_map(|class| (0..3).map(move |index| format!("{class}/{index}.png")));
    let members = names.map(|name| (name.clone(), fs::read(place.path("photos").join(&name)).unwrap()));
    shard(&place.path("shards/0.tar"), members);
    for (images, run) in [("photos", "folder"), ("shards", "shard"), ("shards/0.tar", "one")] {
        let of = |line: String| line.replace("--images photos", &format!("--images {images}"));
        let said = place.trains(&of(place.tokenizer(&format!("-o t-{run}"))));
        assert!(said.contains("6 photographs (0 skipped), classes: dusk, noon"), "{said}");
        let said = place.trains(&of(place.generator(&format!("-o g-{run}"))).replace("t/", "t-folder/"));
        assert!(said.contains("classes: dusk, noon"), "{said}");
    }
    for part in ["t", "g"] {
        for run in ["shard", "one"] {
            let [folder, shard] = ["folder", run].map(|run| place.path(&format!("{part}-{run}/state.safetensors")));
            same(&folder, &shard);
        }
    }
}

/// Two shards with more photographs than are decoded at the start, in the classes 0 to 2. Every hundredth cannot be used.
fn many(place: &Place) {
    let per_shard = LOOKED_AT / 2 + 10;
    for number in 0..2 {
        let member = |index: usize| {
            let photo = match index % 100 {
                20 => b"no picture".to_vec(),
                50 => png(40, 20, [9; 3], 0),
                _ => png(48, 40, [index as u8, 90, 200], index as u32 % 7),
            };
            let class = format!("{}\n", index % 3).into_bytes();
            [(format!("{index:04}.png"), photo), (format!("{index:04}.cls"), class)]
        };
        shard(&place.path(&format!("many/{number}.tar")), (0..per_shard).flat_map(member));
    }
}

#[test]
fn photographs_that_cannot_be_used_are_replaced() {
    let place = Place::new();
    many(&place);
    let of = |line: String| line.replace("--images photos", "--images many");
    // Nearly an epoch of 1020 photographs, of which one is held out.
    let line = of(place.tokenizer("--batch-size 100 -o t"));
    let said = place.trains(&format!("{line} --steps 9"));
    assert!(said.contains("1020 photographs (0 skipped), classes: 0, 1, 2"), "{said}");
    let skipped = |said: &str| said.lines().filter(|line| line.starts_with("skipped, ")).count();
    assert!((14..=21).contains(&skipped(&said)), "{said}");
    assert!(said.contains("so far: many/1.tar/0020.png: ") || said.contains("so far: many/1.tar/0120.png: "), "{said}");
    assert!(said.contains("is 40×20 pixels, expected a height of at least 32"), "{said}");
    // A photograph is replaced by the same one again.
    place.trains(&format!("{} --steps 5", line.replace("-o t", "-o u")));
    place.trains(&format!("{} --steps 9 --resume", line.replace("-o t", "-o u")));
    same(&place.path("t/state.safetensors"), &place.path("u/state.safetensors"));

    let said = place.trains(&of(place.generator("-o g")));
    assert!(said.contains("classes: 0, 1, 2") && skipped(&said) >= 20, "{said}");
    // Its latents are complete: photographs without latents are known.
    let said = place.trains(&of(place.generator("-o g --resume --steps 7")));
    assert!(said.contains("resuming after step 6") && !said.contains("again"), "{said}");
}

#[test]
fn shards_that_cannot_be_used_are_refused() {
    let place = Place::new();
    let refused = |images: &str, problem: &str| {
        let said = place.fails(&place.tokenizer("-o x").replace("--images photos", &format!("--images {images}")), 2);
        assert!(said.contains(problem), "{said}");
    };
    shard(&place.path("mixed/0.tar"), [("1.png".to_string(), png(48, 40, [9; 3], 0))]);
    fs::write(place.path("mixed/2.png"), png(48, 40, [9; 3], 0)).unwrap();
    refused("mixed", "has shards and single pictures, expected one of them: mixed/0.tar and mixed/2.png");
    shard(&place.path("empty/0.tar"), [("notes.txt".to_string(), vec![])]);
    refused("empty", "empty: contains no PNG or JPEG, and no tar shard with one");
    fs::create_dir(place.path("compressed")).unwrap();
    for name in ["0.tar.gz", "1.tgz", "notes.gz"] {
        fs::write(place.path("compressed").join(name), [7; 9]).unwrap();
    }
    let problem = "0.tar.gz: is a compressed shard, expected a .tar: decompress it";
    refused("compressed", &format!("compressed: no picture can be used, 2 skipped, for example: compressed/{problem}"));
    refused("compressed/0.tar.gz", problem);
    fs::write(place.path("bad.tar"), vec![7; 9000]).unwrap();
    refused("bad.tar", "bad.tar: is not a tar file that can be read");
    shard(&place.path("none/0.tar"), [("1.png".to_string(), b"no picture".to_vec())]);
    refused("none", "none: no picture can be used, 1 skipped, for example: none/0.tar/1.png");
    let all = (0..=LOOKED_AT).map(|index| (format!("{index}.png"), b"no picture".to_vec()));
    shard(&place.path("all/0.tar"), all);
    refused("all", "holds out 1 photographs, but only 0 of 1001 can be used");
}
