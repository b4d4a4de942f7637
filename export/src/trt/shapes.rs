//! Optimization profiles: the ranges of the input shapes that an engine supports.

use std::collections::BTreeMap;

use eqim::model::{Dimension, Stage, Symbol, ValueInfo};
use eqim::{Config, Error, Result};
use eqim_engines::trt::Profile;

/// Maximum batch size and image length of the engines, and input shapes that the user gave.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Maximum number of images per batch. A guided batch has twice as many rows.
    pub max_batch: usize,
    /// Maximum number of tokens per image.
    pub max_tokens: usize,
    /// Minimum shapes, which replace the derived ones.
    pub min: Shapes,
    /// Optimum shapes, for which TensorRT chooses the kernels.
    pub opt: Shapes,
    /// Maximum shapes.
    pub max: Shapes,
}

/// Shapes by input, in the format of trtexec: `tokens:1x16x16,z:2x1024`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shapes(BTreeMap<String, Vec<i64>>);

impl std::str::FromStr for Shapes {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let one = |part: &str| {
            let bad = || Error::input(format!("{part:?}"), "is not a shape, expected NAME:1x16x8");
            let (name, sizes) = part.rsplit_once(':').ok_or_else(bad)?;
            let sizes = sizes.split('x').map(str::parse).collect::<Result<Vec<i64>, _>>().map_err(|_| bad())?;
            if name.is_empty() || sizes.iter().any(|&size| size < 1) {
                return Err(bad());
            }
            Ok((name.to_string(), sizes))
        };
        Ok(Self(text.split(',').map(one).collect::<Result<_>>()?))
    }
}

/// Minimum number of tokens per image.
const LEAST: usize = 2;

impl Limits {
    /// Checks the limits, and that every given shape belongs to an input with dynamic axes and fits it.
    ///
    /// # Errors
    /// [`Error::input`] with the name of the setting that is wrong.
    pub fn check(&self, config: &Config) -> Result<()> {
        if self.max_batch == 0 {
            return Err(Error::setting("max_batch", "is 0, expected at least 1"));
        }
        if self.max_tokens < LEAST {
            let problem =
                format!("is {}, expected at least {LEAST}: the decoder pads by mirroring the edges", self.max_tokens);
            return Err(Error::setting("max_tokens", problem));
        }
        let dynamic = |name: &String| {
            let mut inputs = Stage::ALL.iter().flat_map(|stage| stage.inputs(config));
            inputs.any(|info| info.name == *name && is_dynamic(&info))
        };
        for (field, shapes) in [("minShapes", &self.min), ("optShapes", &self.opt), ("maxShapes", &self.max)] {
            if let Some(name) = shapes.0.keys().find(|name| !dynamic(name)) {
                let problem = format!("names {name}, which is not an input of a stage: see eqim-export inspect");
                return Err(Error::setting(field, problem));
            }
        }
        Stage::ALL.iter().try_for_each(|stage| self.profiles(*stage, config).map(|_| ()))
    }

    /// Profiles of a stage's inputs with dynamic axes.
    ///
    /// # Errors
    /// [`Error::input`] with the name of the setting whose shape does not fit, or does not fit that of another input.
    pub fn profiles(&self, stage: Stage, config: &Config) -> Result<BTreeMap<String, Profile>> {
        let inputs: Vec<ValueInfo> = stage.inputs(config).into_iter().filter(is_dynamic).collect();
        let profiles = inputs.iter().map(|info| Ok((info.name.clone(), self.profile(stage, config, info)?)));
        let profiles: BTreeMap<String, Profile> = profiles.collect::<Result<_>>()?;
        agree("minShapes", &inputs, |name| &profiles[name].min)?;
        agree("optShapes", &inputs, |name| &profiles[name].opt)?;
        agree("maxShapes", &inputs, |name| &profiles[name].max)?;
        Ok(profiles)
    }

    fn profile(&self, stage: Stage, config: &Config, info: &ValueInfo) -> Result<Profile> {
        let sizes = |which: usize| -> Vec<i64> {
            let size = |axis: &Dimension| match *axis {
                Dimension::Fixed(size) => size as i64,
                Dimension::Symbolic(symbol) => self.range(stage, config, symbol)[which] as i64,
            };
            info.shape.iter().map(size).collect()
        };
        let given = |field, shapes: &Shapes, derived: Vec<i64>| match shapes.0.get(&info.name) {
            None => Ok(derived),
            Some(shape) => fits(field, info, shape).map(|()| shape.clone()),
        };
        let min = given("minShapes", &self.min, sizes(0))?;
        let opt = given("optShapes", &self.opt, sizes(1))?;
        let max = given("maxShapes", &self.max, sizes(2))?;
        let grows = |less: &[i64], more: &[i64]| less.iter().zip(more).all(|(less, more)| less <= more);
        if !grows(&min, &opt) || !grows(&opt, &max) {
            let problem = format!(
                "of {} have to grow from min {min:?} to opt {opt:?} to max {max:?}: set all that differ",
                info.name
            );
            return Err(Error::input("shapes", problem));
        }
        Ok(Profile { min, opt, max })
    }

    /// Minimum, optimum and maximum size of a dynamic axis.
    fn range(&self, stage: Stage, config: &Config, symbol: Symbol) -> [usize; 3] {
        let (batch, tokens) = (self.max_batch, self.max_tokens);
        let length = [LEAST, 16.min(tokens), tokens];
        let rows = [1, 2, 2 * batch];
        let steps = config.generator.steps;
        match (stage, symbol) {
            (Stage::Prefill | Stage::Step, Symbol::Batch) | (_, Symbol::Rows) => rows,
            (Stage::Flow | Stage::Decoder | Stage::Encoder, Symbol::Batch) => [1, 1, batch],
            (_, Symbol::Tokens) => length,
            (_, Symbol::Width) => length.map(|tokens| config.image_size(tokens).0),
            (_, Symbol::Evaluations) => [1, steps, steps],
        }
    }
}

/// Checks that axes with the same symbol have the same size in all inputs of a stage: otherwise, TensorRT would fail
/// after minutes.
fn agree<'a>(field: &'static str, inputs: &'a [ValueInfo], shape: impl Fn(&str) -> &'a [i64]) -> Result<()> {
    let mut sizes = BTreeMap::new();
    for info in inputs {
        for (axis, &size) in info.shape.iter().zip(shape(&info.name)) {
            let Dimension::Symbolic(symbol) = axis else { continue };
            let &mut (other, expected) = sizes.entry(symbol.name()).or_insert((&info.name, size));
            if size != expected {
                let (symbol, name) = (symbol.name(), &info.name);
                let problem = format!(
                    "leaves {other} with a size of {expected} and {name} with one of {size}, but both are the number of \
                     {symbol}: give both inputs the same size"
                );
                return Err(Error::setting(field, problem));
            }
        }
    }
    Ok(())
}

fn is_dynamic(info: &ValueInfo) -> bool {
    info.shape.iter().any(|axis| matches!(axis, Dimension::Symbolic(_)))
}

/// Checks that a shape has the input's fixed sizes, and enough tokens.
fn fits(field: &'static str, info: &ValueInfo, shape: &[i64]) -> Result<()> {
    let too_few =
        |(axis, size): (&Dimension, &i64)| *axis == Dimension::Symbolic(Symbol::Tokens) && *size < LEAST as i64;
    if info.shape.iter().zip(shape).any(too_few) {
        return Err(Error::setting(field, format!("gives {} fewer than {LEAST} tokens", info.name)));
    }
    let same = |(axis, size): (&Dimension, &i64)| match axis {
        Dimension::Fixed(fixed) => *fixed as i64 == *size,
        Dimension::Symbolic(_) => true,
    };
    if shape.len() == info.shape.len() && info.shape.iter().zip(shape).all(same) {
        return Ok(());
    }
    let words = info.shape.iter().map(|axis| match axis {
        Dimension::Fixed(size) => size.to_string(),
        Dimension::Symbolic(symbol) => symbol.name().to_string(),
    });
    let expected: Vec<String> = words.collect();
    let shape: Vec<String> = shape.iter().map(i64::to_string).collect();
    Err(Error::setting(
        field,
        format!("gives {} the shape {}, expected {}", info.name, shape.join("x"), expected.join("x")),
    ))
}

#[cfg(test)]
mod tests {
    use eqim::config::Preset;

    use super::*;

    fn limits() -> Limits {
        Limits { max_batch: 4, max_tokens: 64, min: Shapes::default(), opt: Shapes::default(), max: Shapes::default() }
    }

    #[test]
    fn guided_rows_are_twice_the_batch() -> Result<()> {
        let config = Preset::Small.config();
        let step = limits().profiles(Stage::Step, &config)?;
        assert_eq!(step["token"].max[0], 8);
        assert_eq!(step["past_key_values.0.key"].max[0], 8);
        let flow = limits().profiles(Stage::Flow, &config)?;
        assert_eq!((flow["z"].max[0], flow["noise"].max[0]), (8, 4));
        assert_eq!(flow["times"].max, [config.generator.steps as i64]);
        let decoder = limits().profiles(Stage::Decoder, &config)?;
        assert_eq!(decoder["tokens"].min, [1, 2, config.generator.embed as i64]);
        assert_eq!(decoder["tokens"].max, [4, 64, config.generator.embed as i64]);
        Ok(())
    }

    #[test]
    fn given_shapes_replace_derived_ones() -> Result<()> {
        let config = Preset::Small.config();
        let embed = config.generator.embed;
        let given: Shapes = format!("times:1000,updates:1000x2x3,tokens:16x128x{embed}").parse()?;
        let limits = Limits { max: given, ..limits() };
        limits.check(&config)?;
        assert_eq!(limits.profiles(Stage::Flow, &config)?["times"].max, [1000]);
        assert_eq!(limits.profiles(Stage::Decoder, &config)?["tokens"].max, [16, 128, embed as i64]);
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let config = Preset::Small.config();
        let refused = |min: &str, words: &str| {
            let error = Limits { min: min.parse().unwrap(), ..limits() }.check(&config).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        refused("nothing:1x2", "names nothing");
        refused("tokens:1x2", "batchxtokensx");
        refused("times:5000", "have to grow");
        refused(&format!("tokens:1x1x{}", config.generator.embed), "gives tokens fewer than 2 tokens");
        refused("times:7", "minShapes leaves times with a size of 7 and updates with one of 1");
        for text in ["tokens", "tokens:", "tokens:0", "tokens:ax2", ":1x2", "tokens:1x2,,"] {
            assert!(text.parse::<Shapes>().is_err(), "{text}");
        }
    }
}
