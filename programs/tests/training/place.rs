//! Photographs, recipes and runs in a temporary folder.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use image::{Rgb, RgbImage};
use serde_json::Value;
use tempfile::TempDir;

/// Recipe of a model for images 32 pixels high, with tokens 4 pixels wide.
pub const MICRO: &str = include_str!("micro.toml");

/// A folder with photographs of two classes, a recipe and the outputs of runs.
pub struct Place(TempDir);

impl Place {
    pub fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::write(place.path("micro.toml"), MICRO).unwrap();
        for (class, colour) in [("dusk", [200, 90, 40]), ("noon", [60, 120, 220])] {
            fs::create_dir_all(place.path("photos").join(class)).unwrap();
            for index in 0..3 {
                picture(48 + 8 * index, 40, colour, index)
                    .save(place.path(&format!("photos/{class}/{index}.png")))
                    .unwrap();
            }
        }
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_eqim-train"));
        command.args(line.split_whitespace()).current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    pub fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// Runs a command line that has to succeed. Returns its output.
    pub fn trains(&self, line: &str) -> String {
        let output = self.run(line);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{line}: {said}");
        said + &String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command line that has to fail with this exit code. Returns its standard error.
    pub fn fails(&self, line: &str, code: i32) -> String {
        let output = self.run(line);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{line}: {said}");
        assert!(!said.contains("panicked"), "{said}");
        said
    }

    pub fn tokenizer(&self, more: &str) -> String {
        format!("tokenizer --images photos --recipe micro.toml {more}")
    }

    pub fn generator(&self, more: &str) -> String {
        format!("generator --images photos --tokenizer t/tokenizer.safetensors --recipe micro.toml {more}")
    }

    pub fn metrics(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub fn recipe(&self, name: &str, from: &str, to: &str) {
        assert!(MICRO.contains(from), "{from}");
        fs::write(self.path(name), MICRO.replace(from, to)).unwrap();
    }
}

/// A picture of a sky above hilly ground.
pub fn picture(width: u32, height: u32, sky: [u8; 3], seed: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let hill = f64::from(height) * (0.6 + 0.2 * (f64::from(x + 7 * seed) / 9.0).sin());
        let shade = (y * 255 / height) as u8;
        if f64::from(y) < hill {
            Rgb(sky.map(|value| value.saturating_sub(shade / 3)))
        } else {
            Rgb([shade / 3, shade / 2, 30])
        }
    })
}
