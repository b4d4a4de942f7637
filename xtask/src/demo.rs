//! From checkpoint to picture: the export and one run, on the test fixture.

use std::env::{self, consts::EXE_SUFFIX};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::run;
use crate::setup;

const EXPORT: &str = "onnx --generator tests/fixtures/generator.pth \
     --tokenizer tests/fixtures/tokenizer.ckpt --heads 2 -o demo/bundle";
const RUN: &str = "--engine demo/bundle --class 3 --seed 1 --tokens 64 --cfg 3 -o demo/demo.png";

/// Builds the programs, exports the fixture's checkpoints and draws one picture.
pub fn demo(root: &Path) -> Result<()> {
    println!("building eqim-export and eqim-run");
    run(Command::new("cargo")
        .args("build --release -p eqim-export -p eqim-engines --bins".split_whitespace())
        .args(setup::features())
        .current_dir(root))?;

    println!("exporting the test fixture to demo/bundle");
    fs::create_dir_all(root.join("demo")).context("the folder demo cannot be made")?;
    run_built("eqim-export", EXPORT, root)?;

    println!("drawing a picture with demo/bundle");
    run_built("eqim-run", RUN, root)?;

    println!("the picture is {}", root.join("demo/demo.png").display());
    println!(
        "its weights are the random test weights of the golden fixture: \
         the picture is only a texture, not a photograph, until trained weights ship"
    );
    Ok(())
}

/// Runs a program of this workspace in the workspace's root.
fn run_built(program: &str, args: &str, root: &Path) -> Result<()> {
    // Cargo puts all release programs, this one too, in one folder.
    let xtask = env::current_exe().context("the folder of the built programs is unknown")?;
    let program = xtask.with_file_name(format!("{program}{EXE_SUFFIX}"));
    run(Command::new(program).args(args.split_whitespace()).current_dir(root))
}
