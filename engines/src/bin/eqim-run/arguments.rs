//! The flags of `eqim-run`, checked as far as they can be without a model.

use std::path::PathBuf;

use clap::Parser;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use eqim::picture::Side;
use eqim::request::solver::Solver;
use eqim::request::{MOST_STEPS, MOST_TOKENS, Schedule};
use eqim::{Error, Result};
use eqim_cli::flags::{solvers, within};
use eqim_engines::Options;

use eqim_engines::Backend;

const EXAMPLES: &str = "\
Examples:
  eqim-run --engine bundle --class 3 -o image.png
  eqim-run --engine bundle --class 3,0,none --seed 7 --cfg 4 --width 512 -o image.png
  eqim-run --engine bundle --prefix photo.jpg --tokens 48 -o longer.png
  eqim-run --engine bundle --classes 1:0-40,4:32- --tokens 80 -o changing.png
  eqim-run --engine bundle --jobs jobs.jsonl --max-batch 8 -o images

The second writes image-0.png, image-1.png and image-2.png; the third carries a photo on to its right; in the fourth class 1
fades into class 4 over tokens 32 to 39.";

/// Generate images with a bundle that eqim-export wrote.
///
/// An image is made column by column: every token is a column of pixels (16 wide in the published models).
/// Progress and warnings go to standard error, the report to standard output.
#[derive(Clone, Debug, Parser)]
#[command(name = "eqim-run", version, after_help = EXAMPLES, allow_negative_numbers = true)]
pub struct Arguments {
    /// Folder of the exported model, as written by `eqim-export onnx`
    #[arg(long, value_name = "BUNDLE")]
    pub engine: PathBuf,

    /// Classes by number or name, separated by commas, one image each; `none` is an image of no class
    #[arg(long = "class", value_name = "CLASSES", value_delimiter = ',', default_value = "none", value_parser = class)]
    pub classes: Vec<String>,

    /// Classes along the way of one image instead, as CLASS:BEGIN-END of tokens, the last END left out: forest:0-40,water:40-.
    /// Where two share tokens, forest:0-40,water:32-, the first fades into the second
    #[arg(long = "classes", value_name = "CLASS:BEGIN-END,…", conflicts_with = "classes", value_parser = Spans::parse)]
    pub spans: Option<Spans>,

    /// Number that the noise is drawn from, the same noise as after torch.manual_seed
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = seed)]
    pub seed: u64,

    /// Length of the images in tokens, those of --prefix included [default: 16]
    #[arg(long, value_name = "N", value_parser = tokens)]
    pub tokens: Option<usize>,

    /// Length of the images in pixels, instead of --tokens; a multiple of a token's width
    #[arg(long, value_name = "PIXELS", value_parser = width, conflicts_with = "tokens")]
    pub width: Option<usize>,

    /// Classifier-free guidance: how strongly an image follows its class; 1 is none, and twice as fast
    #[arg(long, value_name = "SCALE", default_value_t = 1.0, value_parser = cfg)]
    pub cfg: f32,

    /// How guidance grows: from the first token to the last, or the same at every token
    #[arg(long, value_name = "HOW", default_value = "linear", value_parser = schedules())]
    pub cfg_schedule: Schedule,

    /// What integrates a token's ODE: others than euler need fewer evaluations of the flow head for the same distance
    #[arg(long, value_name = "SOLVER", default_value_t, value_parser = solvers())]
    pub solver: Solver,

    /// Steps that each token is denoised in [default: the model's]
    #[arg(long, value_name = "N", value_parser = steps)]
    pub steps: Option<usize>,

    /// Beginning to continue: a PNG or JPEG, or tokens that --save-tokens wrote; one is used for all classes
    #[arg(long, value_name = "FILE")]
    pub prefix: Option<PathBuf>,

    /// Where the beginning is continued. The model goes from left to right: to the left it continues the mirrored picture, and the
    /// result is mirrored back
    #[arg(long, value_name = "SIDE", default_value = "right", value_parser = sides())]
    pub direction: Side,

    /// Keep the columns of the picture of --prefix as they are, up to an edge of two tokens where they fade into the model's
    #[arg(long)]
    pub keep_prefix_pixels: bool,

    /// Noise of the generated tokens instead of a seed's: `noise` [images, tokens, E] of a .safetensors
    #[arg(long, value_name = "FILE", conflicts_with = "seed")]
    pub noise: Option<PathBuf>,

    /// Decode in tiles of so many tokens while generating, in memory that does not grow with the width; `none` decodes
    /// the image as a whole, exactly [default: none up to 256 tokens, 64 beyond]
    #[arg(long, value_name = "TOKENS", value_parser = tile)]
    pub tile: Option<Tile>,

    /// Tokens that neighbouring tiles share and fade over, at most half a tile [default: a quarter of a tile]
    #[arg(long, value_name = "TOKENS", value_parser = tokens_of_overlap)]
    pub overlap: Option<usize>,

    /// Also write `tokens` and `noise` to this .safetensors
    #[arg(long, value_name = "FILE")]
    pub save_tokens: Option<PathBuf>,

    /// Also write what each token means to this new folder: the image after each, in the places of random ones, first those
    /// generated, then those that the encoder makes of the picture of --prefix, else of the image itself; as frames and
    /// animated PNGs, and each token's time and norm as JSON
    #[arg(long, value_name = "FOLDER")]
    pub trace: Option<PathBuf>,

    /// Image to write; several are numbered: image-0.png, image-1.png. A name that ends in / is a folder of tiles with an
    /// index.json, for images wider than programs open. With --jobs, the folder of all images [default: image.png]
    #[arg(short, long, value_name = "PNG or FOLDER/")]
    pub output: Option<PathBuf>,

    /// Make an image for every line of this file instead, each a JSON object: `{"id": "a", "class": 3, "seed": 7, "tokens": 32}`;
    /// also classes, width, cfg, cfg_schedule, solver, steps, prefix, direction, keep_prefix_pixels. What a line leaves out is
    /// as the flags say. Images that are there already are left as they are
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["noise", "save_tokens", "json", "trace"], requires = "output")]
    pub jobs: Option<PathBuf>,

    /// Most jobs at once
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = batch, requires = "jobs")]
    pub max_batch: usize,

    /// Do the I-th of N parts of the jobs, I from 1: for machines that share them
    #[arg(long, value_name = "I/N", value_parser = Shard::parse, requires = "jobs")]
    pub shard: Option<Shard>,

    /// What runs the model
    #[arg(long, value_enum, value_name = "BACKEND", default_value_t)]
    pub backend: Backend,

    /// Threads of ONNX Runtime [default: every core]
    #[arg(long, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
    /// Capture the transformer's step as a CUDA graph
    #[arg(long)]
    pub cuda_graph: bool,

    /// Report as JSON on standard output, and nothing else there
    #[arg(long)]
    pub json: bool,
}

impl Arguments {
    /// How many images a run makes.
    pub fn images(&self) -> usize {
        if self.spans.is_some() { 1 } else { self.classes.len() }
    }

    /// How the bundle is run.
    ///
    /// # Errors
    /// [`Error::Input`] for flags that do not go together.
    pub fn options(&self) -> Result<Options> {
        let &Self { backend, threads, cuda_graph, .. } = self;
        if cuda_graph && backend != Backend::Trt {
            return Err(Error::input("--cuda-graph", "needs --backend trt: only a GPU captures graphs"));
        }
        Ok(Options { backend, threads, cuda_graph })
    }
}

/// One of the parts in which machines share the jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 1.
    number: usize,
    of: usize,
}

impl Shard {
    /// `I/N`, for clap.
    ///
    /// # Errors
    /// A sentence that says what is expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').and_then(|(number, of)| Some((number.parse().ok()?, of.parse().ok()?)));
        match parts {
            Some((number, of)) if 1 <= number && number <= of => Ok(Self { number, of }),
            _ => Err("expected I/N with I from 1 to N: 1/4 is the first of four parts".into()),
        }
    }

    /// Whether the part holds the job of an index, from 0.
    pub fn holds(self, index: usize) -> bool {
        index % self.of == self.number - 1
    }
}

/// What `--tile` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// The image as a whole.
    Whole,
    /// Tiles of so many tokens.
    Tokens(usize),
}

fn tile(text: &str) -> Result<Tile, String> {
    match text {
        "none" => Ok(Tile::Whole),
        number => within(number, 4..=MOST_TOKENS).map(Tile::Tokens).map_err(|error| error + ", or none"),
    }
}

fn tokens_of_overlap(text: &str) -> Result<usize, String> {
    within(text, 1..=MOST_TOKENS)
}

fn class(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("expected classes by number or name, or `none`, separated by commas".into()),
        class => Ok(class.into()),
    }
}

/// What `--classes` says: classes as they are written, and their tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spans(pub Vec<(String, usize, Option<usize>)>);

impl Spans {
    /// `CLASS:BEGIN-END,…`, for clap.
    ///
    /// # Errors
    /// A sentence that says what is expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let span = |part: &str| {
            let (class, tokens) = part.trim().rsplit_once(':')?;
            let (begin, end) = tokens.split_once('-')?;
            let end = if end.is_empty() { None } else { Some(end.parse().ok()?) };
            Some((class.trim().to_string(), begin.parse().ok()?, end)).filter(|(class, ..)| !class.is_empty())
        };
        let spans: Option<_> = text.split(',').map(span).collect();
        spans.map(Self).ok_or_else(|| "expected CLASS:BEGIN-END,… as in forest:0-40,water:40-".into())
    }
}

fn tokens(text: &str) -> Result<usize, String> {
    within(text, 2..=MOST_TOKENS)
}

fn width(text: &str) -> Result<usize, String> {
    within(text, 1..=usize::MAX >> 1).map_err(|_| "expected a positive number of pixels".into())
}

fn cfg(text: &str) -> Result<f32, String> {
    within(text, 0.0..=f32::MAX).map_err(|_| "expected a finite number of at least 0".into())
}

fn seed(text: &str) -> Result<u64, String> {
    within(text, 0..=u64::MAX)
}

fn steps(text: &str) -> Result<usize, String> {
    within(text, 1..=MOST_STEPS)
}

fn batch(text: &str) -> Result<usize, String> {
    within(text, 1..=4096)
}

fn threads(text: &str) -> Result<usize, String> {
    within(text, 1..=1024)
}

fn sides() -> impl TypedValueParser<Value = Side> {
    PossibleValuesParser::new(["left", "right"]).map(|name| if name == "left" { Side::Left } else { Side::Right })
}

fn schedules() -> impl TypedValueParser<Value = Schedule> {
    let name = |name: String| if name == "constant" { Schedule::Constant } else { Schedule::Linear };
    PossibleValuesParser::new(["linear", "constant"]).map(name)
}

/// Tokens of an image `width` pixels wide.
pub fn tokens_of_width(width: usize, token_width: usize) -> Result<usize, String> {
    let (below, least) = (width / token_width, 2);
    if below >= least && width.is_multiple_of(token_width) {
        return Ok(below);
    }
    let nearest = if below < least {
        format!("the least is {}", least * token_width)
    } else {
        format!("the nearest are {} and {}", below * token_width, (below + 1) * token_width)
    };
    Err(format!("is {width}, expected a multiple of {token_width}, the width of a token: {nearest}"))
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
        assert_eq!(parse(&[]).unwrap().classes, ["none"]);
        assert_eq!(parse(&["--class", "3,0,none"]).unwrap().classes, ["3", "0", "none"]);
        assert_eq!(parse(&["--class", "3, sea ice"]).unwrap().classes, ["3", "sea ice"]);
        for bad in ["", "3,", ","] {
            let error = parse(&["--class", bad]).unwrap_err();
            assert!(error.contains("--class") && error.contains("by number or name"), "{bad}: {error}");
        }
    }

    #[test]
    fn classes_along_the_way() {
        let spans = parse(&["--classes", "forest:0-40, sea ice:32-"]).unwrap().spans.unwrap();
        assert_eq!(spans.0, [("forest".into(), 0, Some(40)), ("sea ice".into(), 32, None)]);
        for bad in ["", "forest", "forest:", "forest:0", ":0-4", "forest:a-4", "forest:0-4,", "forest:0-4-8", "0-4"] {
            let error = parse(&["--classes", bad]).unwrap_err();
            assert!(error.contains("'--classes") && error.contains("CLASS:BEGIN-END"), "{bad}: {error}");
        }
        assert!(parse(&["--classes", "1:0-", "--class", "1"]).is_err());
    }

    #[test]
    fn numbers_out_of_range_name_their_flag() {
        let bad = [
            ("--tokens", "0"),
            ("--tokens", "1"),
            ("--tokens", "-3"),
            ("--tokens", "10000001"),
            ("--tokens", "99999999999999999999999"),
            ("--width", "0"),
            ("--cfg", "NaN"),
            ("--cfg", "inf"),
            ("--cfg", "1e39"),
            ("--cfg", "-1"),
            ("--steps", "0"),
            ("--threads", "0"),
            ("--seed", "-1"),
            ("--seed", "18446744073709551616"),
            ("--cfg-schedule", "cosine"),
            ("--solver", "rk4"),
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
    fn widths() {
        assert_eq!(tokens_of_width(32, 16), Ok(2));
        assert_eq!(tokens_of_width(512, 16), Ok(32));
        assert!(tokens_of_width(100, 16).unwrap_err().ends_with("the nearest are 96 and 112"));
        assert!(tokens_of_width(16, 16).unwrap_err().ends_with("the least is 32"));
        assert!(tokens_of_width(33, 16).unwrap_err().ends_with("32 and 48"));
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
