//! Checkpoints: `.pth` and `.ckpt` files of the reference, and `.safetensors` files of eqim. All are read into a
//! [`Config`] and [`Weights`].

mod infer;
mod pickle;
pub mod tensors;
mod torch;

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::Path;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

pub use infer::{Hints, Shapes, generator as infer_generator, tokenizer as infer_tokenizer};
use tensors::{TensorFile, Values};
use torch::TorchFile;

use crate::config::{GeneratorConfig, Preset, TokenizerConfig};
use crate::model::Stage;
use crate::weights::Weights;
use crate::{Config, Error, Result, ResultExt, files};

/// Selects one of the two sets of weights in a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightSet {
    /// The exponential moving average of the weights. The reference samples with it.
    #[default]
    Ema,
    /// The trained weights without averaging.
    Raw,
}

/// Key of the configuration, as JSON, in the metadata of eqim's `.safetensors` files. It is the only key, so that the
/// bytes of a file depend only on its contents.
pub const CONFIG_KEY: &str = "eqim";

/// Configuration in a `.safetensors` file of eqim. The file holds the tensors of the generator, of the tokenizer or of
/// both.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredConfig {
    /// Configuration of the generator, if the file holds its tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generator: Option<GeneratorConfig>,
    /// Configuration of the tokenizer, if the file holds its tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<TokenizerConfig>,
}

/// Writes tensors with the configuration of their model. `path` is replaced only once the file is complete.
///
/// # Errors
/// [`Error::run`] if the file cannot be written.
pub fn write(path: &Path, config: &StoredConfig, stored: &[(&str, Tensor)]) -> Result<()> {
    let values: Vec<(&str, Values)> =
        stored.iter().map(|(name, tensor)| (*name, Values::Tensor(tensor.clone()))).collect();
    write_values(path, config, &values)
}

/// Writes like [`write()`], but also accepts values of other types ([`Values::Raw`]).
///
/// # Errors
/// [`Error::run`] if the file cannot be written.
pub fn write_values(path: &Path, config: &StoredConfig, stored: &[(&str, Values)]) -> Result<()> {
    let config = serde_json::to_string(config).or_run(path.display())?;
    tensors::write_values(path, stored, HashMap::from([(CONFIG_KEY.to_string(), config)]))
}

/// First components of the tokenizer's tensor names. All other tensors belong to the generator.
const TOKENIZER_PARTS: [&str; 4] = ["encoder", "decoder", "quant_layer", "post_quant_layer"];
/// Name prefixes of the tensors of a tokenizer checkpoint that only training uses.
const TRAINING_ONLY: [&str; 3] = ["ema_", "loss.", "semantic_decoder."];

/// Loads a complete model from a generator checkpoint and a tokenizer checkpoint, each in any format, and checks it.
///
/// # Errors
/// [`Error::input`] naming the file and the tensor or value that is missing, unexpected, of the wrong shape or not
/// finite.
pub fn load(generator: &Path, tokenizer: &Path, set: WeightSet, hints: &Hints) -> Result<(Config, Weights)> {
    let mut weights = Weights::default();
    let config = Config {
        generator: load_generator(generator, set, hints, &mut weights)?,
        tokenizer: load_tokenizer(tokenizer, set, &mut weights)?,
    };
    let source = format!("{} with {}", generator.display(), tokenizer.display());
    config.check().map_err(|error| error.about(&source))?;
    weights.check(&config, &source)?;
    Ok((config, weights))
}

/// Loads a tokenizer without a generator, from a checkpoint in any format, and checks it.
///
/// # Errors
/// Same as [`load`].
pub fn load_tokenizer_alone(path: &Path, set: WeightSet) -> Result<(TokenizerConfig, Weights)> {
    let mut weights = Weights::default();
    let tokenizer = load_tokenizer(path, set, &mut weights)?;
    // The check needs both configurations, so this adds a generator configuration that fits the tokenizer.
    let generator = GeneratorConfig { embed: tokenizer.embed, ..Preset::Small.config().generator };
    let config = Config { generator, tokenizer };
    config.check()?;
    weights.check_stages(&config, &[Stage::Encoder, Stage::Decoder], &path.display().to_string())?;
    Ok((config.tokenizer, weights))
}

/// Loads a complete model from one `.safetensors` file that holds both configurations.
///
/// # Errors
/// Same as [`load`].
pub fn load_safetensors(path: &Path) -> Result<(Config, Weights)> {
    load(path, path, WeightSet::default(), &Hints::default())
}

/// The configuration of a complete model in the metadata of a `.safetensors` file.
///
/// # Errors
/// [`Error::input`] if the metadata does not hold a valid configuration of the generator and of the tokenizer.
pub fn stored_config(file: &TensorFile) -> Result<Config> {
    let StoredConfig { generator, tokenizer } = stored(file)?;
    Ok(Config { generator: part(file, generator, "generator")?, tokenizer: part(file, tokenizer, "tokenizer")? })
}

fn stored(file: &TensorFile) -> Result<StoredConfig> {
    let bad = |problem: String| Error::input(file.path().display(), problem);
    let none = || bad(format!("has no `{CONFIG_KEY}` in its metadata, so eqim did not write it"));
    let text = file.text(CONFIG_KEY).ok_or_else(none)?;
    serde_json::from_str(text).or_input(format!("{}: `{CONFIG_KEY}` in its metadata", file.path().display()))
}

fn part<T>(file: &TensorFile, config: Option<T>, name: &str) -> Result<T> {
    let none = || Error::input(file.path().display(), format!("`{CONFIG_KEY}` in its metadata describes no {name}"));
    config.ok_or_else(none)
}

fn is_zip(path: &Path) -> Result<bool> {
    let mut magic = [0; 4];
    let read = files::open(path)?.read(&mut magic).or_input(path.display())?;
    match &magic[..read] {
        b"PK\x03\x04" => Ok(true),
        _ if read < magic.len() => Err(Error::input(path.display(), "is too short for a checkpoint")),
        [0x80, 2..=5, ..] => Err(Error::input(
            path.display(),
            "is a PyTorch checkpoint of the format before 1.6: load it with torch.load and write it with torch.save",
        )),
        _ => Ok(false),
    }
}

fn load_generator(path: &Path, set: WeightSet, hints: &Hints, weights: &mut Weights) -> Result<GeneratorConfig> {
    if !is_zip(path)? {
        only_set(path, set)?;
        let mut file = TensorFile::open(path)?;
        let config = part(&file, stored(&file)?.generator, "generator")?;
        let fits = hints.preset.map_or(Ok(()), |preset| infer::fits(&config, preset));
        fits.map_err(|error| error.about(path.display()))?;
        read_part(&mut file, weights, |name| !is_tokenizer_part(name))?;
        return Ok(with_hints(config, hints));
    }
    let mut file = TorchFile::open(path)?;
    let (key, other) = match set {
        WeightSet::Ema => ("model_ema", "raw"),
        WeightSet::Raw => ("model", "ema"),
    };
    let model = file.item(key).ok_or_else(|| {
        let keys = file.keys().join(", ");
        file.bad(format!(
            "has no `{key}`, expected the checkpoint of a generator (keys found: {keys}); or choose the {other} weights"
        ))
        .with_field("weights")
    })?;
    let tensors = file.state_dict(model)?;
    let shape = |(name, &id): (&String, &_)| Ok((name.clone(), file.shape(name, id)?));
    let shapes = tensors.iter().map(shape).collect::<Result<Shapes>>()?;
    let stored = stored_hints(&file);
    let config = infer::generator(&shapes, hints, &stored).map_err(|error| error.about(path.display()))?;
    for (name, id) in tensors {
        weights.insert(name.clone(), &file.tensor(&name, id)?)?;
    }
    Ok(config)
}

fn load_tokenizer(path: &Path, set: WeightSet, weights: &mut Weights) -> Result<TokenizerConfig> {
    if !is_zip(path)? {
        only_set(path, set)?;
        let mut file = TensorFile::open(path)?;
        let config = part(&file, stored(&file)?.tokenizer, "tokenizer")?;
        read_part(&mut file, weights, is_tokenizer_part)?;
        return Ok(config);
    }
    let mut file = TorchFile::open(path)?;
    let state = file.item("state_dict").ok_or_else(|| {
        let keys = file.keys().join(", ");
        file.bad(format!("has no `state_dict`, expected the checkpoint of a tokenizer (keys found: {keys})"))
    })?;
    let tensors = file.state_dict(state)?;
    let used = |name: &&String| !TRAINING_ONLY.iter().any(|prefix| name.starts_with(prefix));
    let mut taken = BTreeMap::new();
    for name in tensors.keys().filter(used) {
        let source = match set {
            WeightSet::Raw => name.clone(),
            WeightSet::Ema => ema_name(name),
        };
        let id = tensors.get(&source).ok_or_else(|| {
            let problem = "is missing: choose the raw weights, which need no averages";
            file.bad(format!("tensor {source}, the average of {name}, {problem}")).with_field("weights")
        })?;
        taken.insert(name.clone(), (source, *id));
    }
    let shape = |(name, (source, id)): (&String, &(String, _))| Ok((name.clone(), file.shape(source, *id)?));
    let shapes = taken.iter().map(shape).collect::<Result<Shapes>>()?;
    let config = infer::tokenizer(&shapes).map_err(|error| error.about(path.display()))?;
    for (name, (source, id)) in taken {
        weights.insert(name, &file.tensor(&source, id)?)?;
    }
    Ok(config)
}

/// Rejects the raw weights: a `.safetensors` file of eqim holds only one set of weights.
fn only_set(path: &Path, set: WeightSet) -> Result<()> {
    match set {
        WeightSet::Ema => Ok(()),
        WeightSet::Raw => {
            let problem = "has one set of weights: only .pth and .ckpt files have raw weights";
            Err(Error::input(path.display(), problem).with_field("weights"))
        }
    }
}

/// Name under which Lightning stores the moving average of `name`: `ema_<part>.<the rest without dots>`.
fn ema_name(name: &str) -> String {
    let (part, rest) = name.split_once('.').unwrap_or((name, ""));
    format!("ema_{part}.{}", rest.replace('.', ""))
}

fn is_tokenizer_part(name: &str) -> bool {
    name.split('.').next().is_some_and(|part| TOKENIZER_PARTS.contains(&part))
}

fn read_part(file: &mut TensorFile, weights: &mut Weights, part: impl Fn(&str) -> bool) -> Result<()> {
    let names: Vec<String> = file.tensors().into_keys().filter(|name| part(name)).collect();
    for name in names {
        let tensor: Tensor = file.read(&name)?;
        weights.insert(name, &tensor)?;
    }
    Ok(())
}

fn with_hints(mut config: GeneratorConfig, hints: &Hints) -> GeneratorConfig {
    config.heads = hints.heads.unwrap_or(config.heads);
    config.window = hints.window.unwrap_or(config.window);
    config.vae_norm = hints.vae_norm.unwrap_or(config.vae_norm);
    config.steps = hints.steps.unwrap_or(config.steps);
    config
}

/// The hints in the `args` of the trainer, which the checkpoint contains.
fn stored_hints(file: &TorchFile) -> Hints {
    let Some(args) = file.item("args") else { return Hints::default() };
    let pickle = file.pickle();
    let number = |key| pickle.number(pickle.item(args, key)?);
    let count = |key| number(key).filter(|n: &f64| n.fract() == 0.0 && (0.0..1e9).contains(n)).map(|n| n as usize);
    let model = pickle.item(args, "model").and_then(|id| pickle.text(id));
    Hints {
        preset: model.and_then(Preset::from_reference_name),
        heads: None,
        window: count("cond_length"),
        vae_norm: number("vae_norm"),
        steps: count("num_sampling_steps"),
    }
}
