//! `cargo xtask demo`: exports the demo model and generates pictures with it. Their seeds were chosen before the model was
//! trained.

use std::env::{self, consts::EXE_SUFFIX};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::run;
use crate::setup;

const EXPORT: &str =
    "onnx --generator assets/demo/model.safetensors --tokenizer assets/demo/model.safetensors -o demo/bundle";

/// The pictures: description, file name and options of eqim-run.
const PICTURES: [(&str, &str, &str); 4] = [
    ("a 256×256 image", "image.png", "--class sky --seed 1 --tokens 16"),
    ("a 256×2048 image", "long.png", "--class mountain --seed 1 --tokens 128"),
    (
        "an outpainted photograph",
        "outpainted.png",
        "--class mountain --seed 1 --tokens 80 --prefix assets/photos/mountain/aitzgorri_by_aitzol_berasategi.jpg",
    ),
    ("a forest that becomes water", "changing.png", "--classes forest:0-40,water:24- --seed 1 --tokens 80"),
];

/// Classes of the model, in the columns of the sheet of samples.
const CLASSES: usize = 7;
/// Seeds of the samples, in the rows of the sheet.
const SEEDS: [u64; 3] = [1, 2, 3];

/// Builds the programs, exports the demo model and generates pictures with it.
pub fn demo(root: &Path) -> Result<()> {
    println!("building the programs and the examples");
    // The tests build them in the same way: Cargo compiles no dependency twice.
    run(Command::new("cargo")
        .args("build --release --workspace --bins --examples".split_whitespace())
        .args(setup::features())
        .current_dir(root))?;

    println!("exporting assets/demo/model.safetensors to demo/bundle");
    fs::create_dir_all(root.join("demo")).context("the folder demo cannot be made")?;
    run_built("eqim-export", EXPORT, root)?;

    for (what, file, how) in PICTURES {
        println!("generating {what}");
        run_built("eqim-run", &format!("--engine demo/bundle {how} -o demo/{file}"), root)?;
    }
    println!("generating {} images of every class", SEEDS.len());
    samples(root)?;
    let sheet = ("images of every class", "samples.png");
    for (what, file) in PICTURES.map(|(what, file, _)| (what, file)).into_iter().chain([sheet]) {
        println!("{what}: {}", root.join("demo").join(file).display());
    }
    println!("to serve the model over HTTP: target/release/eqim-serve --engine demo/bundle");
    Ok(())
}

/// Generates an image of every class with every seed, and puts them side by side in `demo/samples.png`.
fn samples(root: &Path) -> Result<()> {
    let folder = root.join("demo/samples");
    fs::create_dir_all(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    let classes: Vec<String> = (0..CLASSES).map(|class| class.to_string()).collect();
    let mut files = vec![];
    for seed in SEEDS {
        let output = format!("-o demo/samples/{seed}.png");
        let line = format!("--engine demo/bundle --class {} --seed {seed} --tokens 16 {output}", classes.join(","));
        run_built("eqim-run", &line, root)?;
        files.extend(classes.iter().map(|class| format!("demo/samples/{seed}-{class}.png")));
    }
    run_built("examples/contact_sheet", &format!("demo/samples.png {CLASSES} {}", files.join(" ")), root)
}

/// The folder of the built programs.
pub fn programs() -> Result<PathBuf> {
    // Cargo puts all release programs, including this one, in one folder.
    let xtask = env::current_exe().context("the folder of the built programs is unknown")?;
    Ok(xtask.with_file_name(""))
}

/// Runs a program of this workspace in the workspace's root.
fn run_built(program: &str, args: &str, root: &Path) -> Result<()> {
    let program = programs()?.join(format!("{program}{EXE_SUFFIX}"));
    run(Command::new(program).args(args.split_whitespace()).current_dir(root))
}
