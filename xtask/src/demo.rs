//! `cargo xtask demo`: exports the demo model and draws pictures with it.

use std::env::{self, consts::EXE_SUFFIX};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::run;
use crate::setup;

const EXPORT: &str = "onnx --generator assets/demo/model.safetensors --tokenizer assets/demo/model.safetensors \
                      --class-names assets/demo/classes.txt -o demo/bundle";

/// The pictures: description, file name and options of eqim-run.
const PICTURES: [(&str, &str, &str); 4] = [
    ("a 256×256 image", "image.png", "--class 3 --seed 23 --tokens 16"),
    ("a 256×2048 image", "long.png", "--class 2 --seed 22 --tokens 128"),
    (
        "an outpainted photograph",
        "outpainted.png",
        "--class 2 --seed 1 --tokens 80 --prefix assets/photos/mountain/aitzgorri_by_aitzol_berasategi.jpg",
    ),
    ("a forest that becomes water", "changing.png", "--classes forest:0-40,water:24- --seed 5 --tokens 80 --cfg 3"),
];

/// Builds the programs, exports the demo model and draws pictures with it.
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
    for (what, file, _) in PICTURES {
        println!("{what}: {}", root.join("demo").join(file).display());
    }
    println!("to serve the model over HTTP: target/release/eqim-serve --engine demo/bundle");
    Ok(())
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
