//! Settings of an image: the flags of `eqim-run` and `eqim-bench`, the fields of a line in a jobs file, and the record
//! of a run.
//!
//! Every setting is defined only here. A field that is `None` takes the value of the settings that these are
//! [laid over](Settings::over), and finally the default or the value of the model.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::condition::{ClassSchedule, ClassSpan};
use super::solver::Solver;
use super::{GuidanceSchedule, MOST_TOKENS, Noise, Request};
use crate::picture::Side;
use crate::{Config, Error, Result};

/// Default length of an image in tokens. In the published models, the image is then square.
pub const DEFAULT_TOKENS: usize = 16;

/// How tokens are sampled.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
#[serde(default)]
pub struct SamplingSettings {
    /// Seed of the noise, as in torch.manual_seed [default: 0]
    #[cfg_attr(feature = "clap", arg(long, value_name = "N"))]
    pub seed: Option<u64>,

    /// Scale of classifier-free guidance: how strongly an image follows its class. 1 turns guidance off and is twice as
    /// fast
    #[cfg_attr(feature = "clap", arg(long, value_name = "SCALE"))]
    pub cfg: Option<f32>,

    /// How guidance grows along the image [default: linear]
    #[cfg_attr(feature = "clap", arg(long, value_enum, value_name = "HOW"))]
    pub cfg_schedule: Option<GuidanceSchedule>,

    /// Solver of the ODE of a token. Solvers other than euler need fewer evaluations of the flow head for the same
    /// accuracy [default: euler]
    #[cfg_attr(feature = "clap", arg(long, value_enum, value_name = "SOLVER"))]
    pub solver: Option<Solver>,

    /// Steps of the solver per token [default: the model's]
    #[cfg_attr(feature = "clap", arg(long, value_name = "N"))]
    pub steps: Option<usize>,
}

/// Contents of an image, and how its tokens are sampled.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
#[serde(default)]
pub struct Settings {
    /// Classes by number or name, separated by commas, one image per class; `none` is an image without a class
    /// [default: none]
    #[cfg_attr(feature = "clap", arg(long, value_name = "CLASSES", value_delimiter = ','))]
    #[serde(with = "one_or_many")]
    pub class: Vec<ClassName>,

    /// Classes along the tokens of one image, as CLASS:BEGIN-END, where the last END can be omitted:
    /// forest:0-40,water:40-. Where two classes share tokens, as in forest:0-40,water:32-, the first fades into the
    /// second
    #[cfg_attr(feature = "clap", arg(long, value_name = "CLASS:BEGIN-END,…", conflicts_with = "class"))]
    pub classes: Option<ClassCourse>,

    /// Length of the images in tokens, the prefix included [default: 16]
    #[cfg_attr(feature = "clap", arg(long, value_name = "N"))]
    pub tokens: Option<usize>,

    /// Length of the images in pixels instead of tokens; must be a multiple of the width of a token
    #[cfg_attr(feature = "clap", arg(long, value_name = "PIXELS", conflicts_with = "tokens"))]
    pub width: Option<usize>,

    #[allow(missing_docs)]
    #[cfg_attr(feature = "clap", command(flatten))]
    #[serde(flatten)]
    pub sampling: SamplingSettings,

    /// Beginning to continue: a PNG or JPEG, or tokens that --save-tokens wrote. All classes use the same beginning
    #[cfg_attr(feature = "clap", arg(long, value_name = "FILE"))]
    pub prefix: Option<PathBuf>,

    /// Side on which the beginning is continued. The model generates from left to right. To the left, it continues the
    /// mirrored picture, and the result is mirrored back [default: right]
    #[cfg_attr(feature = "clap", arg(long, value_enum, value_name = "SIDE"))]
    pub direction: Option<Side>,

    /// Keep the pixels of the prefix picture, except for an edge of two tokens where they fade into the generated
    /// columns
    #[cfg_attr(feature = "clap", arg(long, num_args = 0, default_missing_value = "true"))]
    pub keep_prefix_pixels: Option<bool>,

    /// Decode in tiles of N tokens during generation, with memory that does not grow with the width. `none` decodes the
    /// image as a whole, which is exact [default: none up to 256 tokens, 64 beyond]
    #[cfg_attr(feature = "clap", arg(long, value_name = "N"))]
    pub tile: Option<TileSize>,

    /// Number of tokens that neighbouring tiles share and fade over, at most half a tile [default: a quarter of a tile]
    #[cfg_attr(feature = "clap", arg(long, value_name = "N"))]
    pub overlap: Option<usize>,
}

/// A class as a user writes it: its number, its name, or `none`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ClassName {
    /// Number of the class, from 0.
    Number(usize),
    /// Name of a class of the model, or `none`.
    Name(String),
}

impl ClassName {
    /// The number of a class, or `none`.
    pub fn of(class: Option<usize>) -> Self {
        class.map_or_else(|| Self::Name("none".into()), Self::Number)
    }
}

impl FromStr for ClassName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.trim() {
            "" => Err(Error::setting("class", "is empty, expected classes by number or name, or none")),
            text => Ok(text.parse().map_or_else(|_| Self::Name(text.into()), Self::Number)),
        }
    }
}

impl fmt::Display for ClassName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// Classes along the tokens of an image, as a user writes them: `CLASS:BEGIN-END,…`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ClassCourse(pub Vec<(ClassName, usize, Option<usize>)>);

impl ClassCourse {
    /// Spans of classes, by the numbers of the classes.
    pub fn of(spans: &[ClassSpan]) -> Self {
        Self(spans.iter().map(|span| (ClassName::of(span.class), span.begin, span.end)).collect())
    }
}

impl FromStr for ClassCourse {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let span = |part: &str| {
            let (class, tokens) = part.trim().rsplit_once(':')?;
            let (begin, end) = tokens.split_once('-')?;
            let end = if end.is_empty() { None } else { Some(end.parse().ok()?) };
            Some((class.parse().ok()?, begin.parse().ok()?, end))
        };
        let spans: Option<_> = text.split(',').map(span).collect();
        let bad = || {
            Error::setting("classes", format!("is {text:?}, expected CLASS:BEGIN-END,… as in forest:0-40,water:40-"))
        };
        spans.map(Self).ok_or_else(bad)
    }
}

impl fmt::Display for ClassCourse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (class, begin, end)) in self.0.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            write!(f, "{comma}{class}:{begin}-")?;
            end.iter().try_for_each(|end| write!(f, "{end}"))?;
        }
        Ok(())
    }
}

impl From<ClassCourse> for String {
    fn from(course: ClassCourse) -> Self {
        course.to_string()
    }
}

impl TryFrom<String> for ClassCourse {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

/// Number of tokens per tile, or none for the image as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Value", try_from = "Value")]
pub enum TileSize {
    /// The image as a whole.
    Whole,
    /// Tiles of this number of tokens.
    Tokens(usize),
}

impl FromStr for TileSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || {
            Error::setting("tile", format!("is {text}, expected a number of tokens from 4 to {MOST_TOKENS}, or none"))
        };
        match text {
            "none" => Ok(Self::Whole),
            number => {
                let tokens = number.parse().ok().filter(|tokens| (4..=MOST_TOKENS).contains(tokens));
                tokens.map(Self::Tokens).ok_or_else(bad)
            }
        }
    }
}

impl From<TileSize> for Value {
    fn from(tile: TileSize) -> Self {
        match tile {
            TileSize::Whole => "none".into(),
            TileSize::Tokens(tokens) => tokens.into(),
        }
    }
}

impl TryFrom<Value> for TileSize {
    type Error = Error;

    fn try_from(value: Value) -> Result<Self> {
        value.as_str().map_or_else(|| value.to_string(), String::from).parse()
    }
}

/// Serializes a list. A list with one element can be written as that element, and an empty list as null.
mod one_or_many {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::ClassName;

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        None(()),
        One(ClassName),
        Many(Vec<ClassName>),
    }

    pub fn serialize<S: Serializer>(list: &[ClassName], serializer: S) -> Result<S::Ok, S::Error> {
        match list {
            [] => serializer.serialize_none(),
            [one] => one.serialize(serializer),
            many => many.serialize(serializer),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ClassName>, D::Error> {
        Ok(match OneOrMany::deserialize(deserializer)? {
            OneOrMany::None(()) => vec![],
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        })
    }
}

impl SamplingSettings {
    /// These settings, with missing values from `base`.
    pub fn over(self, base: &Self) -> Self {
        Self {
            seed: self.seed.or(base.seed),
            cfg: self.cfg.or(base.cfg),
            cfg_schedule: self.cfg_schedule.or(base.cfg_schedule),
            solver: self.solver.or(base.solver),
            steps: self.steps.or(base.steps),
        }
    }

    /// The request with the sampling of these settings.
    pub fn apply(&self, request: Request) -> Request {
        Request {
            cfg: self.cfg.unwrap_or(request.cfg),
            cfg_schedule: self.cfg_schedule.unwrap_or(request.cfg_schedule),
            solver: self.solver.unwrap_or(request.solver),
            steps: self.steps.unwrap_or(request.steps),
            noise: self.seed.map_or(request.noise, Noise::Seed),
            ..request
        }
    }
}

impl Settings {
    /// These settings, with missing values from `base`. Some settings exclude each other, for example a length in
    /// tokens and one in pixels. If these settings contain one of them, none of them is taken from `base`.
    pub fn over(self, base: &Self) -> Self {
        let (has_class, has_length) =
            (!self.class.is_empty() || self.classes.is_some(), self.tokens.is_some() || self.width.is_some());
        Self {
            class: if has_class { self.class } else { base.class.clone() },
            classes: if has_class { self.classes } else { base.classes.clone() },
            tokens: if has_length { self.tokens } else { base.tokens },
            width: if has_length { self.width } else { base.width },
            sampling: self.sampling.over(&base.sampling),
            prefix: self.prefix.or_else(|| base.prefix.clone()),
            direction: self.direction.or(base.direction),
            keep_prefix_pixels: self.keep_prefix_pixels.or(base.keep_prefix_pixels),
            tile: self.tile.or(base.tile),
            overlap: self.overlap.or(base.overlap),
        }
    }

    /// Reads settings from a JSON object.
    ///
    /// # Errors
    /// [`Error::input`] naming the field that is not a setting or whose value does not fit.
    pub fn from_json(object: Map<String, Value>) -> Result<Self> {
        let known = Self::names();
        for (name, value) in &object {
            if !known.contains(name) {
                return Err(Error::input(name, format!("is not a setting, expected one of {}", known.join(", "))));
            }
            // Each field is read separately, so that the error can name it.
            let alone = Map::from_iter([(name.clone(), value.clone())]);
            if let Err(error) = serde_json::from_value::<Self>(alone.into()) {
                return Err(Error::input_caused(format!("{name} is {value}"), error));
            }
        }
        let settings: Self =
            serde_json::from_value(object.into()).map_err(|error| Error::input_caused("settings", error))?;
        settings.check_exclusive()?;
        Ok(settings)
    }

    /// Names of all settings.
    pub fn names() -> Vec<String> {
        match serde_json::to_value(Self::default()) {
            Ok(Value::Object(fields)) => fields.into_iter().map(|(name, _)| name).collect(),
            _ => vec![],
        }
    }

    fn check_exclusive(&self) -> Result<()> {
        if !self.class.is_empty() && self.classes.is_some() {
            return Err(Error::setting("class", "and classes are given, expected one of them"));
        }
        if self.tokens.is_some() && self.width.is_some() {
            return Err(Error::setting("tokens", "and width are given, expected one of them"));
        }
        Ok(())
    }

    /// The request for a model. The caller must add a prefix or given noise, because these are read from files.
    ///
    /// # Errors
    /// [`Error::setting`] for a setting that does not fit the model.
    pub fn request(&self, config: &Config) -> Result<Request> {
        let classes = self.class_schedules(config)?;
        let tokens = self.length(config)?;
        if tokens > MOST_TOKENS / classes.len() {
            let images = classes.len();
            let problem = format!("asks for {images} × {tokens} tokens, expected at most {MOST_TOKENS} in a run");
            return Err(Error::setting(if self.width.is_some() { "width" } else { "tokens" }, problem));
        }
        let request = self.sampling.apply(Request::new(config, classes, tokens));
        request.check(config)?;
        Ok(request)
    }

    /// The class of each image.
    fn class_schedules(&self, config: &Config) -> Result<Vec<ClassSchedule>> {
        let class = |name: &ClassName| config.generator.class(&name.to_string());
        let Some(ClassCourse(spans)) = &self.classes else {
            if self.class.is_empty() {
                return Ok(vec![None.into()]);
            }
            return self.class.iter().map(|name| Ok(class(name)?.into())).collect();
        };
        let span = |(name, begin, end): &(ClassName, usize, Option<usize>)| {
            let class = class(name).map_err(|error| error.about("classes").with_field("classes"))?;
            Ok(ClassSpan { class, begin: *begin, end: *end })
        };
        Ok(vec![ClassSchedule::Spans(spans.iter().map(span).collect::<Result<_>>()?)])
    }

    /// Length of an image in tokens.
    fn length(&self, config: &Config) -> Result<usize> {
        match self.width {
            Some(width) => tokens_of_width(width, config.tokenizer.token_width()),
            None => Ok(self.tokens.unwrap_or(DEFAULT_TOKENS)),
        }
    }

    /// All settings of one image of a request that was made from these settings. Missing values are filled in, and
    /// classes are given by number.
    pub fn resolved(&self, request: &Request, row: usize) -> Self {
        let (class, classes) = match &request.classes[row] {
            ClassSchedule::Constant(class) => (vec![ClassName::of(*class)], None),
            ClassSchedule::Spans(spans) => (vec![], Some(ClassCourse::of(spans))),
        };
        let seed = match request.noise {
            Noise::Seed(seed) => Some(seed),
            Noise::Given(_) => None,
        };
        Self {
            class,
            classes,
            tokens: Some(request.tokens),
            width: None,
            sampling: SamplingSettings {
                seed,
                cfg: Some(request.cfg),
                cfg_schedule: Some(request.cfg_schedule),
                solver: Some(request.solver),
                steps: Some(request.steps),
            },
            prefix: self.prefix.clone(),
            direction: Some(self.direction.unwrap_or_default()),
            keep_prefix_pixels: Some(self.keep_prefix_pixels.unwrap_or_default()),
            tile: self.tile,
            overlap: self.overlap,
        }
    }
}

/// Number of tokens of an image that is `width` pixels wide.
fn tokens_of_width(width: usize, token_width: usize) -> Result<usize> {
    let (below, least) = (width / token_width, 2);
    if below >= least && width.is_multiple_of(token_width) {
        return Ok(below);
    }
    let nearest = if below < least {
        format!("the smallest is {}", least * token_width)
    } else if below >= MOST_TOKENS {
        format!("the largest is {}", MOST_TOKENS * token_width)
    } else {
        format!("the nearest are {} and {}", below * token_width, (below + 1) * token_width)
    };
    let problem = format!("is {width}, expected a multiple of {token_width}, the width of a token: {nearest}");
    Err(Error::setting("width", problem))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Preset;

    fn read(text: &str) -> Result<Settings> {
        Settings::from_json(serde_json::from_str(text).unwrap())
    }

    #[test]
    fn settings_are_read_as_they_are_written() {
        let text = r#"{"class": ["sea ice", 3], "tokens": 40, "seed": 7, "cfg": 2.5, "cfg_schedule": "constant", "solver": "ab2",
            "steps": 15, "prefix": "a.png", "direction": "left", "keep_prefix_pixels": true, "tile": 64, "overlap": 8}"#;
        let settings = read(text).unwrap();
        assert_eq!(settings.class, [ClassName::Name("sea ice".into()), ClassName::Number(3)]);
        assert_eq!((settings.tile, settings.sampling.solver), (Some(TileSize::Tokens(64)), Some(Solver::Ab2)));
        let written = serde_json::to_string(&settings).unwrap();
        assert_eq!(read(&written).unwrap(), settings, "{written}");
        for text in [
            r#"{"class": "none"}"#,
            r#"{"class": 3}"#,
            r#"{"classes": "forest:0-40,3:32-"}"#,
            r#"{"tile": "none"}"#,
            "{}",
        ] {
            let settings = read(text).unwrap();
            assert_eq!(read(&serde_json::to_string(&settings).unwrap()).unwrap(), settings, "{text}");
        }
    }

    #[test]
    fn errors_name_the_field_and_the_value() {
        for (text, expected) in [
            (r#"{"cfg": "strong"}"#, "cfg is \"strong\": invalid type"),
            (r#"{"tokens": -3}"#, "tokens is -3: invalid value"),
            (r#"{"solver": "rk4"}"#, "solver is \"rk4\": unknown variant"),
            (r#"{"classes": "forest"}"#, "classes is \"forest\": classes is \"forest\", expected CLASS:BEGIN-END"),
            (r#"{"tile": 2}"#, "tile is 2: tile is 2, expected a number of tokens from 4"),
            (r#"{"guidance": 2}"#, "guidance: is not a setting, expected one of cfg, cfg_schedule, class, classes"),
            (r#"{"class": 1, "classes": "1:0-"}"#, "class and classes are given"),
            (r#"{"tokens": 4, "width": 64}"#, "tokens and width are given"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{text}: {error}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn settings_lie_over_others() {
        let base = read(r#"{"class": 1, "width": 64, "cfg": 3, "seed": 5, "direction": "left"}"#).unwrap();
        let over = read(r#"{"classes": "2:0-", "tokens": 8, "seed": 6}"#).unwrap().over(&base);
        assert!(over.class.is_empty() && over.width.is_none());
        assert_eq!((over.tokens, over.sampling.seed, over.sampling.cfg), (Some(8), Some(6), Some(3.0)));
        assert_eq!(over.direction, Some(Side::Left));
        assert_eq!(Settings::default().over(&base), base);
    }

    #[test]
    fn requests_are_made_and_refused() {
        let config = Preset::Small.config();
        let request = |text: &str| read(text).unwrap().request(&config);
        let made = request(r#"{"class": [3, "none"], "cfg": 2}"#).unwrap();
        assert_eq!((made.classes.len(), made.tokens, made.steps, made.cfg), (2, 16, 100, 2.0));
        for (text, expected) in [
            (r#"{"class": 1000}"#, "class is 1000, expected 0 to 999 or none"),
            (r#"{"class": "sea"}"#, "class is sea, expected 0 to 999 or none"),
            (r#"{"classes": "sea:0-"}"#, "classes: class is sea"),
            (r#"{"tokens": 1}"#, "tokens is 1, expected at least 2"),
            (r#"{"tokens": 1000001}"#, "tokens asks for 1 × 1000001 tokens"),
            (
                r#"{"width": 100}"#,
                "width is 100, expected a multiple of 16, the width of a token: the nearest are 96 and 112",
            ),
            (r#"{"width": 16}"#, "width is 16, expected a multiple of 16, the width of a token: the smallest is 32"),
            (
                r#"{"width": 18446744073709551615}"#,
                "width is 18446744073709551615, expected a multiple of 16, the width of a token: the largest is 16000000",
            ),
            (r#"{"cfg": -1}"#, "cfg is -1, expected a number of at least 0"),
            (r#"{"steps": 0}"#, "steps is 0, expected 1 to 100000"),
        ] {
            let error = request(text).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{text}: {error}");
            assert!(error.field().is_some() && error.exit_code() == 2);
        }
    }

    #[test]
    fn resolved_settings_make_the_same_request() {
        let config = Preset::Small.config();
        for text in [r#"{"class": [5, "none"], "width": 64, "cfg": 3}"#, r#"{"classes": "1:0-4,none:4-", "tokens": 9}"#]
        {
            let settings = read(text).unwrap();
            let request = settings.request(&config).unwrap();
            for row in 0..request.classes.len() {
                let again = settings.resolved(&request, row).request(&config).unwrap();
                assert_eq!(again.classes[0], request.classes[row], "{text}");
                assert_eq!((again.tokens, again.cfg, again.steps), (request.tokens, request.cfg, request.steps));
            }
        }
    }
}
