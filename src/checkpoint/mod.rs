//! Checkpoints: the reference's `.pth` and `.ckpt`, and our own `.safetensors`, all become a [`Config`] and [`Weights`].

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

/// Which of a checkpoint's two sets of weights to take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightSet {
    /// The exponential moving average, which the reference samples with.
    #[default]
    Ema,
    /// The weights that were trained.
    Raw,
}

/// Key of the configuration, as JSON, in the metadata of our `.safetensors`. There is no other key, so that a file's
/// bytes depend on its contents alone.
pub const CONFIG_KEY: &str = "eqim";

/// What our `.safetensors` says of the model whose tensors it holds, one half or both.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredConfig {
    /// The generator's, where the file holds its tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generator: Option<GeneratorConfig>,
    /// The tokenizer's, where the file holds its tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<TokenizerConfig>,
}

/// Writes tensors with the configuration of the model they are of, replacing `path` when all of it is written.
///
/// # Errors
/// [`Error::run`] when it cannot be written.
pub fn write(path: &Path, config: &StoredConfig, stored: &[(&str, Tensor)]) -> Result<()> {
    let values: Vec<(&str, Values)> =
        stored.iter().map(|(name, tensor)| (*name, Values::Tensor(tensor.clone()))).collect();
    write_values(path, config, &values)
}

/// Writes as [`write()`] does, values of other types among them.
///
/// # Errors
/// [`Error::run`] when it cannot be written.
pub fn write_values(path: &Path, config: &StoredConfig, stored: &[(&str, Values)]) -> Result<()> {
    let config = serde_json::to_string(config).or_run(path.display())?;
    tensors::write_values(path, stored, HashMap::from([(CONFIG_KEY.to_string(), config)]))
}

/// First components of the tokenizer's tensor names; everything else is the generator's.
const TOKENIZER_PARTS: [&str; 4] = ["encoder", "decoder", "quant_layer", "post_quant_layer"];
/// Tensors of a tokenizer checkpoint that only training uses.
const TRAINING_ONLY: [&str; 3] = ["ema_", "loss.", "semantic_decoder."];

/// Loads a complete model from a checkpoint of the generator and one of the tokenizer, in any format, and checks it.
///
/// # Errors
/// [`Error::input`] naming the file and the tensor or value that is missing, extra, misshapen or not finite.
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
/// As [`load`].
pub fn load_tokenizer_alone(path: &Path, set: WeightSet) -> Result<(TokenizerConfig, Weights)> {
    let mut weights = Weights::default();
    let tokenizer = load_tokenizer(path, set, &mut weights)?;
    // A generator that fits, for what is checked in both.
    let generator = GeneratorConfig { embed: tokenizer.embed, ..Preset::Small.config().generator };
    let config = Config { generator, tokenizer };
    config.check()?;
    weights.check_stages(&config, &[Stage::Encoder, Stage::Decoder], &path.display().to_string())?;
    Ok((config.tokenizer, weights))
}

/// Loads a complete model from one `.safetensors` that holds both configurations.
///
/// # Errors
/// As [`load`].
pub fn load_safetensors(path: &Path) -> Result<(Config, Weights)> {
    load(path, path, WeightSet::default(), &Hints::default())
}

/// The configuration that a `.safetensors` of a whole model has in its metadata.
///
/// # Errors
/// [`Error::input`] when it has none.
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

/// Our own files hold one set of weights; the other cannot be had from them.
fn only_set(path: &Path, set: WeightSet) -> Result<()> {
    match set {
        WeightSet::Ema => Ok(()),
        WeightSet::Raw => {
            let problem = "has one set of weights: only .pth and .ckpt files have raw weights";
            Err(Error::input(path.display(), problem).with_field("weights"))
        }
    }
}

/// Name under which Lightning keeps the average of `name`: `ema_<part>.<the rest without dots>`.
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

/// What the trainer's `args` say.
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
