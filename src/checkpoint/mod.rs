//! Checkpoints: `.pth` and `.ckpt` files of the reference, and `.safetensors` files of eqim. All are read into a
//! [`Config`] and [`Weights`].

pub mod adapter;
mod container;
mod half;
mod infer;
mod names;
mod numpy;
mod pickle;
mod shards;
mod source;
mod storage_type;
mod stored;
pub mod tensors;
mod torch;

use std::collections::BTreeMap;
use std::path::Path;

pub use half::{Part, WeightSet, WeightSets, parts};
pub use infer::{Hints, Inferred, Origin, Shapes, generator as infer_generator, tokenizer as infer_tokenizer};
use source::Source;
pub use stored::{CONFIG_KEY, StoredConfig, stored_config, write, write_values};

use crate::config::{GeneratorConfig, Preset, TokenizerConfig};
use crate::model::check_finite;
use crate::weights::Weights;
use crate::{Config, Result};

/// Name of the table of the classes of a generator, `[class_num, D]`.
pub const CLASS_TABLE: &str = "class_emb.weight";

/// A model that was loaded, and what was decided on the way.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Configuration of the model.
    pub config: Config,
    /// Weights of the model.
    pub weights: Weights,
    /// Where the values of the configuration come from.
    pub inferred: Vec<Inferred>,
    /// Which weights were taken, in one line.
    pub taken: String,
    /// Tensors that are not the model's and were passed over, as the reference does.
    pub passed_over: Vec<String>,
}

/// Loads a complete model from a generator checkpoint and a tokenizer checkpoint, each in any format, and checks it.
///
/// # Errors
/// [`crate::Error::input`] naming the file and the tensor or value that is missing, unexpected, of the wrong shape or not
/// finite.
pub fn load(
    generator: &Path,
    tokenizer: &Path,
    sets: impl Into<WeightSets>,
    hints: &Hints,
) -> Result<(Config, Weights)> {
    let loaded = load_described(generator, tokenizer, sets.into(), hints)?;
    Ok((loaded.config, loaded.weights))
}

/// Loads like [`load`], and describes what was decided.
///
/// # Errors
/// Same as [`load`].
pub fn load_described(generator: &Path, tokenizer: &Path, sets: WeightSets, hints: &Hints) -> Result<Loaded> {
    let source = format!("{} with {}", generator.display(), tokenizer.display());
    let mut generator = half::generator(generator, sets.generator, hints)?;
    let mut tokenizer = half::tokenizer(tokenizer, sets.tokenizer)?;
    let config = Config { generator: generator.config.clone(), tokenizer: tokenizer.config.clone() };
    config.check().map_err(|error| error.about(&source))?;
    generator.check(&config)?;
    tokenizer.check(&config)?;
    let inferred = [std::mem::take(&mut generator.inferred), infer::tokenizer_origins(&config.tokenizer)].concat();
    let taken = format!("{}; {}", generator.taken, tokenizer.taken);
    let passed_over = std::mem::take(&mut tokenizer.notes);
    let mut weights = Weights::default();
    generator.read(&mut weights)?;
    tokenizer.read(&mut weights)?;
    Ok(Loaded { config, weights, inferred, taken, passed_over })
}

/// Loads the weights of halves of a model from one checkpoint, and checks them.
///
/// # Errors
/// Same as [`load`].
pub fn load_parts(path: &Path, parts: &[Part], set: Option<WeightSet>, hints: &Hints) -> Result<Weights> {
    let mut weights = Weights::default();
    if parts.contains(&Part::Generator) {
        (_, weights) = load_generator_alone(path, set, hints)?;
    }
    if parts.contains(&Part::Tokenizer) {
        let (_, tokenizer) = load_tokenizer_alone(path, set)?;
        tokenizer.iter().try_for_each(|(name, tensor)| weights.insert(name.into(), tensor))?;
    }
    Ok(weights)
}

/// Loads a generator without a tokenizer, from a checkpoint in any format, and checks it.
///
/// # Errors
/// Same as [`load`].
pub fn load_generator_alone(path: &Path, set: Option<WeightSet>, hints: &Hints) -> Result<(GeneratorConfig, Weights)> {
    let mut half = half::generator(path, set, hints)?;
    // The check needs both configurations, so this adds one of a tokenizer that fits the generator.
    let tokenizer = TokenizerConfig { embed: half.config.embed, ..Preset::Small.config().tokenizer };
    let config = Config { generator: half.config.clone(), tokenizer };
    config.check().map_err(|error| error.about(path.display()))?;
    half.check(&config)?;
    let mut weights = Weights::default();
    half.read(&mut weights)?;
    Ok((config.generator, weights))
}

/// Loads a tokenizer without a generator, from a checkpoint in any format, and checks it.
///
/// # Errors
/// Same as [`load`].
pub fn load_tokenizer_alone(path: &Path, set: Option<WeightSet>) -> Result<(TokenizerConfig, Weights)> {
    let mut half = half::tokenizer(path, set)?;
    // The check needs both configurations, so this adds a generator configuration that fits the tokenizer.
    let generator = GeneratorConfig { embed: half.config.embed, ..Preset::Small.config().generator };
    let config = Config { generator, tokenizer: half.config.clone() };
    config.check().map_err(|error| error.about(path.display()))?;
    half.check(&config)?;
    let mut weights = Weights::default();
    half.read(&mut weights)?;
    Ok((config.tokenizer, weights))
}

/// Loads the tensors of these names and shapes from the state dict of a `.pth` or `.safetensors` file that has the tensor
/// `anchor`. Other tensors are passed over.
///
/// # Errors
/// [`crate::Error::input`] naming the file and the tensor that is missing, of the wrong shape or not finite.
pub fn load_state_dict(path: &Path, anchor: &str, parameters: &[(String, Vec<usize>)]) -> Result<Weights> {
    let mut source = Source::open(path)?;
    let Some(state) = source.state_dicts(anchor).into_iter().next() else {
        return Err(source.bad(format!("tensor {anchor} is missing (found: {})", source.contents())));
    };
    let named = state.by_name().map_err(|error| error.about(path.display()))?;
    let mut wanted = BTreeMap::new();
    for (name, shape) in parameters {
        let entry = named.get(&name[..]).ok_or_else(|| source.bad(format!("tensor {name} {shape:?} is missing")))?;
        let located = source.locate(entry)?;
        if &located.shape != shape {
            return Err(source.bad(format!("tensor {name} has shape {:?}, expected {shape:?}", located.shape)));
        }
        wanted.insert(name.clone(), located);
    }
    let mut weights = Weights::default();
    source.read(wanted, |name, tensor| {
        weights.insert(name.clone(), tensor)?;
        check_finite(&name, weights.find(&name)?).map_err(|error| error.about(path.display()))
    })?;
    Ok(weights)
}

/// Whether a `.pth` or `.safetensors` file has a state dict with the tensor `anchor`.
///
/// # Errors
/// [`crate::Error::input`] if the file cannot be read.
pub fn has_tensor(path: &Path, anchor: &str) -> Result<bool> {
    Ok(!Source::open(path)?.state_dicts(anchor).is_empty())
}

/// Loads a complete model from one `.safetensors` file that holds both configurations.
///
/// # Errors
/// Same as [`load`].
pub fn load_safetensors(path: &Path) -> Result<(Config, Weights)> {
    load(path, path, WeightSets::default(), &Hints::default())
}
