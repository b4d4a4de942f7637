//! The flags of `eqim-run`, with all checks that do not need a model.

use std::path::PathBuf;

use clap::Parser;
use eqim::request::settings::Settings;
use eqim_cli::flags::within;
use eqim_engines::Options;

const EXAMPLES: &str = "\
Examples:
  eqim-run --engine bundle --class 3 -o image.png
  eqim-run --engine bundle --class 3,0,none --seed 7 --cfg 4 --width 512 -o image.png
  eqim-run --engine bundle --prefix photo.jpg --tokens 48 -o longer.png
  eqim-run --engine bundle --classes 1:0-40,4:32- --tokens 80 -o changing.png
  eqim-run --engine bundle --jobs jobs.jsonl --max-batch 8 -o images

The second command writes image-0.png, image-1.png and image-2.png. The third continues a photo to the right. In the fourth,
class 1 fades into class 4 over tokens 32 to 39.";

/// Generate images with a bundle that eqim-export wrote.
///
/// An image is generated column by column. Each token is a column of pixels (16 pixels wide in the published models).
/// Progress and warnings go to standard error, the report goes to standard output.
#[derive(Clone, Debug, Parser)]
#[command(name = "eqim-run", version, after_help = EXAMPLES, allow_negative_numbers = true)]
#[command(mut_arg("cfg", |arg| arg.default_value("1")))]
pub struct Arguments {
    /// Folder of the exported model, as written by `eqim-export onnx`
    #[arg(long, value_name = "BUNDLE")]
    pub engine: PathBuf,

    /// Settings of the images and of their sampling.
    #[command(flatten)]
    pub settings: Settings,

    /// Read the noise of the generated tokens from this .safetensors instead of drawing it from a seed: tensor `noise`
    /// [images, tokens, E]
    #[arg(long, value_name = "FILE", conflicts_with = "seed")]
    pub noise: Option<PathBuf>,

    /// Also write the tensors `tokens` and `noise` to this .safetensors
    #[arg(long, value_name = "FILE")]
    pub save_tokens: Option<PathBuf>,

    /// Also write a trace of the tokens to this new folder: the image after each token, as frames and animated PNGs,
    /// and the time and norm of each token as JSON. Tokens replace random tokens from left to right: in one series the
    /// generated tokens, in a second series the tokens that the encoder computes from the picture of --prefix, or else
    /// from the generated image
    #[arg(long, value_name = "FOLDER")]
    pub trace: Option<PathBuf>,

    /// Image to write. Several images are numbered: image-0.png, image-1.png. A name that ends in / is a folder of
    /// tiles with an index.json, for images that are too wide for most programs. With --jobs, the folder of all images
    /// [default: image.png]
    #[arg(short, long, value_name = "PNG or FOLDER/")]
    pub output: Option<PathBuf>,

    /// Generate one image per line of this file. Each line is a JSON object: `{"id": "a", "class": 3, "seed": 7,
    /// "tokens": 32}`. Other keys: classes, width, cfg, cfg_schedule, solver, steps, prefix, direction,
    /// keep_prefix_pixels, tile, overlap. The flags set the values of omitted keys. Images that already exist with the
    /// same settings are not generated again
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["noise", "save_tokens", "json", "trace"], requires = "output")]
    pub jobs: Option<PathBuf>,

    /// Maximum number of jobs in a batch
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = batch, requires = "jobs")]
    pub max_batch: usize,

    /// Run part I of N of the jobs, with I from 1, to share the jobs between machines
    #[arg(long, value_name = "I/N", value_parser = Shard::parse, requires = "jobs")]
    pub shard: Option<Shard>,

    /// How to run the bundle.
    #[command(flatten)]
    pub options: Options,

    /// Print the report as JSON, and nothing else, to standard output
    #[arg(long)]
    pub json: bool,
}

impl Arguments {
    /// Number of images that a run generates.
    pub fn images(&self) -> usize {
        if self.settings.classes.is_some() { 1 } else { self.settings.class.len().max(1) }
    }
}

/// One part of the jobs, for one of several machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Number of this part, from 1.
    number: usize,
    of: usize,
}

impl Shard {
    /// Parses `I/N`, for clap.
    ///
    /// # Errors
    /// A message that describes the expected form.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').and_then(|(number, of)| Some((number.parse().ok()?, of.parse().ok()?)));
        match parts {
            Some((number, of)) if 1 <= number && number <= of => Ok(Self { number, of }),
            _ => Err("expected I/N with I from 1 to N: 1/4 is the first of four parts".into()),
        }
    }

    /// Whether this part contains the job with this index, from 0.
    pub fn holds(self, index: usize) -> bool {
        index % self.of == self.number - 1
    }
}

fn batch(text: &str) -> Result<usize, String> {
    within(text, 1..=4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Arguments, String> {
        let arguments = ["eqim-run", "--engine", "bundle"].iter().chain(arguments);
        Arguments::try_parse_from(arguments).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_are_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn classes() {
        let names = |arguments: &[&str]| -> Vec<String> {
            parse(arguments).unwrap().settings.class.iter().map(ToString::to_string).collect()
        };
        assert!(names(&[]).is_empty());
        assert_eq!(names(&["--class", "3,0,none"]), ["3", "0", "none"]);
        assert_eq!(names(&["--class", "3, sea ice"]), ["3", "sea ice"]);
        for bad in ["", "3,", ","] {
            let error = parse(&["--class", bad]).unwrap_err();
            assert!(error.contains("--class") && error.contains("by number or name"), "{bad}: {error}");
        }
    }

    #[test]
    fn classes_along_the_way() {
        let course = parse(&["--classes", "forest:0-40, sea ice:32-"]).unwrap().settings.classes.unwrap();
        assert_eq!(course.to_string(), "forest:0-40,sea ice:32-");
        for bad in ["", "forest", "forest:", "forest:0", ":0-4", "forest:a-4", "forest:0-4,", "forest:0-4-8", "0-4"] {
            let error = parse(&["--classes", bad]).unwrap_err();
            assert!(error.contains("'--classes") && error.contains("CLASS:BEGIN-END"), "{bad}: {error}");
        }
        assert!(parse(&["--classes", "1:0-", "--class", "1"]).is_err());
    }

    #[test]
    fn values_that_cannot_be_read_name_their_flag() {
        let bad = [
            ("--tokens", "-3"),
            ("--tokens", "99999999999999999999999"),
            ("--cfg", "strong"),
            ("--threads", "0"),
            ("--seed", "-1"),
            ("--seed", "18446744073709551616"),
            ("--cfg-schedule", "cosine"),
            ("--solver", "rk4"),
            ("--tile", "3"),
        ];
        for (flag, value) in bad {
            let error = parse(&[flag, value]).unwrap_err();
            assert!(error.contains(&format!("'{value}' for '{flag}")), "{error}");
        }
    }

    #[test]
    fn what_excludes_each_other() {
        assert!(parse(&["--tokens", "4", "--width", "64"]).is_err());
        assert!(parse(&["--noise", "a", "--seed", "1"]).is_err());
        assert!(parse(&["--noise", "a"]).is_ok());
    }

    #[test]
    fn shards_share_all_jobs() {
        let shards = ["1/3", "2/3", "3/3"].map(|text| Shard::parse(text).unwrap());
        assert!((0..10).all(|index| shards.iter().filter(|shard| shard.holds(index)).count() == 1));
        for bad in ["0/3", "4/3", "1", "1/0", "a/b", "1/2/3", "-1/2", ""] {
            assert!(Shard::parse(bad).is_err(), "{bad}");
        }
    }
}
