//! The two halves of a model, the generator and the tokenizer: which tensors of a file are theirs.

use std::collections::BTreeMap;
use std::path::Path;

use super::infer::{self, Hints, Inferred, Origin, Shapes};
use super::names::{averages, canonical, is_trained};
use super::numpy;
use super::pickle::{Id, Value};
use super::source::{Entry, Located, Source, StateDict};
use super::stored::{self, StoredConfig};
use super::tensors::TensorFile;
use super::torch::TorchFile;
use crate::config::{GeneratorConfig, Preset, TokenizerConfig};
use crate::model::{Stage, check_finite, parameters_of};
use crate::weights::Weights;
use crate::{Config, Error, Result, limits};

/// A tensor that every generator has, and one that every tokenizer has.
const GENERATOR_ANCHOR: &str = "z_proj.weight";
const TOKENIZER_ANCHOR: &str = "encoder.conv_in.weight";
/// First components of the tokenizer's tensor names.
const TOKENIZER_PARTS: [&str; 4] = ["encoder", "decoder", "quant_layer", "post_quant_layer"];
/// Name prefixes of the tensors of a tokenizer checkpoint that only training uses.
const TRAINING_ONLY: [&str; 3] = ["ema_", "loss.", "semantic_decoder."];
/// Stages with the tensors of each half.
const GENERATOR_STAGES: [Stage; 3] = [Stage::Prefill, Stage::Step, Stage::Flow];
const TOKENIZER_STAGES: [Stage; 2] = [Stage::Encoder, Stage::Decoder];

/// A half of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The generator.
    Generator,
    /// The tokenizer.
    Tokenizer,
}

/// Selects one of the two sets of weights in a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightSet {
    /// The exponential moving average of the weights. The reference samples with it.
    #[default]
    Ema,
    /// The trained weights without averaging.
    Raw,
}

/// The weights to take of each half of a model. `None` takes what the reference samples with: the moving average of the
/// generator, or its trained weights if it has none; for the tokenizer, the moving average of each tensor that has one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightSets {
    /// Weights of the generator.
    pub generator: Option<WeightSet>,
    /// Weights of the tokenizer.
    pub tokenizer: Option<WeightSet>,
}

impl From<WeightSet> for WeightSets {
    fn from(set: WeightSet) -> Self {
        Self { generator: Some(set), tokenizer: Some(set) }
    }
}

/// One half of a model before its tensors are read.
pub struct Half<C> {
    source: Source,
    /// Sizes and settings of this half.
    pub config: C,
    /// The tensors of this half by the model's names.
    tensors: BTreeMap<String, Located>,
    stages: &'static [Stage],
    /// Where the values of the configuration come from.
    pub inferred: Vec<Inferred>,
    /// Which weights were taken.
    pub taken: String,
    /// What was passed over.
    pub notes: Vec<String>,
    /// Whether the reference passes over tensors that are not the model's.
    lenient: bool,
}

impl<C> Half<C> {
    /// Compares names and shapes with the model's, and their size with the memory, before any value is read. Buffers that
    /// the model has not are passed over if the reference does so.
    ///
    /// # Errors
    /// [`Error::input`] naming the tensor that is missing, unexpected or of the wrong shape, or the size of the weights.
    pub fn check(&mut self, config: &Config) -> Result<()> {
        let mut extra = self.tensors.clone();
        let parameters = parameters_of(config, self.stages)?;
        let shapes = parameters.iter().map(|(_, shape)| &shape[..]);
        limits::check_memory(&self.source.path().display().to_string(), "its weights", shapes, limits::memory())?;
        for (name, shape) in parameters {
            match extra.remove(&name) {
                None => return Err(self.source.bad(format!("tensor {name} {shape:?} is missing"))),
                Some(found) if found.shape != shape => {
                    let problem = format!("tensor {name} has shape {:?}, expected {shape:?}", found.shape);
                    return Err(self.source.bad(problem));
                }
                Some(_) => {}
            }
        }
        if let Some(name) = extra.keys().find(|name| !self.lenient || is_tokenizer_part(name) && is_trained(name)) {
            let problem = format!("tensor {name} is not part of this model ({} such tensors)", extra.len());
            return Err(self.source.bad(problem));
        }
        for name in extra.into_keys() {
            self.tensors.remove(&name);
            self.notes.push(name);
        }
        Ok(())
    }

    /// Reads the tensors.
    ///
    /// # Errors
    /// [`Error::input`] naming the tensor that cannot be read or has a value that is not finite.
    pub fn read(mut self, weights: &mut Weights) -> Result<()> {
        let path = self.source.path().display().to_string();
        self.source.read(self.tensors, |name, tensor| {
            weights.insert(name.clone(), tensor)?;
            check_finite(&name, weights.find(&name)?).map_err(|error| error.about(&path))
        })
    }
}

/// Whether a tensor belongs to a tokenizer.
pub fn is_tokenizer_part(name: &str) -> bool {
    name.split('.').next().is_some_and(|part| TOKENIZER_PARTS.contains(&part))
}

/// The halves that a file has.
///
/// # Errors
/// [`Error::input`] if it cannot be read or has none.
pub fn parts(path: &Path) -> Result<Vec<Part>> {
    let source = Source::open(path)?;
    let anchors = [(Part::Generator, GENERATOR_ANCHOR), (Part::Tokenizer, TOKENIZER_ANCHOR)];
    let names = source.names();
    let has = |anchor: &str| names.iter().any(|entry| entry.stored == anchor) || !source.state_dicts(anchor).is_empty();
    let found: Vec<Part> = anchors.into_iter().filter(|(_, anchor)| has(anchor)).map(|(part, _)| part).collect();
    if found.is_empty() {
        let problem = format!(
            "is no checkpoint of a generator, which has a tensor {GENERATOR_ANCHOR}, or of a tokenizer, which has \
             {TOKENIZER_ANCHOR} (found: {})",
            source.contents()
        );
        return Err(source.bad(problem));
    }
    Ok(found)
}

/// Opens a file of weights for its generator.
///
/// # Errors
/// [`Error::input`] naming the tensor or value that is missing or cannot be read; [`Error::setting`] naming the setting
/// that is unknown or does not fit.
pub fn generator(path: &Path, want: Option<WeightSet>, hints: &Hints) -> Result<Half<GeneratorConfig>> {
    const FIELD: &str = "generator_weights";
    let source = Source::open(path)?;
    if let Some((file, stored)) = of_eqim(&source)? {
        only_set(&source, want, FIELD)?;
        let config = stored::part(file, stored.generator, "generator")?;
        let fits = hints.preset.map_or(Ok(()), |preset| infer::fits(&config, preset));
        fits.map_err(|error| error.about(path.display()))?;
        let tensors = all_of(&source, |name| !is_tokenizer_part(name))?;
        let (config, inferred) = with_hints(config, hints);
        let taken = format!("the generator of {}", path.display());
        return Ok(Half {
            source,
            config,
            tensors,
            stages: &GENERATOR_STAGES,
            inferred,
            taken,
            notes: vec![],
            lenient: false,
        });
    }
    let state = generator_state(&source, want)?;
    let with_tokenizer = state.entries.iter().any(|entry| entry.name == TOKENIZER_ANCHOR);
    let mut tensors = BTreeMap::new();
    for (name, entry) in state.by_name().map_err(|error| error.about(path.display()))? {
        if !(with_tokenizer && is_tokenizer_entry(name)) {
            tensors.insert(name.to_string(), source.locate(entry)?);
        }
    }
    let arguments = match &source {
        Source::Torch(file) => arguments(file, &state.parents, hints)?,
        Source::Tensors(_) => Hints::default(),
    };
    let inferred = infer::generator(&shapes(&tensors), hints, &arguments);
    let (config, inferred) = inferred.map_err(|error| error.about(path.display()))?;
    let place = if state.path.is_empty() { "the only weights".into() } else { state.path };
    let taken = format!("{place} of {}", path.display());
    Ok(Half { source, config, tensors, stages: &GENERATOR_STAGES, inferred, taken, notes: vec![], lenient: false })
}

/// Opens a file of weights for its tokenizer.
///
/// # Errors
/// [`Error::input`] naming the tensor that is missing or cannot be read.
pub fn tokenizer(path: &Path, want: Option<WeightSet>) -> Result<Half<TokenizerConfig>> {
    const FIELD: &str = "tokenizer_weights";
    let source = Source::open(path)?;
    let half = |source, config, tensors, taken, notes, lenient| Half {
        source,
        config,
        tensors,
        stages: &TOKENIZER_STAGES,
        inferred: vec![],
        taken,
        notes,
        lenient,
    };
    if let Some((file, stored)) = of_eqim(&source)? {
        only_set(&source, want, FIELD)?;
        let config = stored::part(file, stored.tokenizer, "tokenizer")?;
        let tensors = all_of(&source, is_tokenizer_part)?;
        return Ok(half(source, config, tensors, format!("the tokenizer of {}", path.display()), vec![], false));
    }
    let state = tokenizer_state(&source)?;
    let named = state.by_name().map_err(|error| error.about(path.display()))?;
    let stored_names: BTreeMap<String, &Entry> = averages_by_name(&state);
    let (mut tensors, mut notes, mut averaged) = (BTreeMap::new(), vec![], 0);
    for (name, entry) in named {
        if TRAINING_ONLY.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        let average = averages(&entry.stored).iter().find_map(|name| stored_names.get(name).copied());
        let trained = is_tokenizer_part(name) && is_trained(name);
        let taken = match (want, average) {
            (Some(WeightSet::Raw), _) => entry,
            (_, Some(average)) => {
                averaged += 1;
                average
            }
            (Some(WeightSet::Ema), None) if trained => {
                let problem =
                    format!("tensor {name} has no moving average: without this setting, it is taken as it is");
                return Err(source.bad(problem).with_field(FIELD));
            }
            _ => entry,
        };
        match source.locate(taken) {
            Ok(located) => drop(tensors.insert(name.to_string(), located)),
            Err(error) if trained => return Err(error),
            Err(_) => notes.push(name.to_string()),
        }
    }
    let config = infer::tokenizer(&shapes(&tensors)).map_err(|error| error.about(path.display()))?;
    let taken = match (averaged, tensors.len()) {
        (0, all) => format!("{all} raw tensors of {}", path.display()),
        (some, all) if some == all => format!("the EMA of all {all} tensors of {}", path.display()),
        (some, all) => format!("the EMA of {some} tensors and {} raw tensors of {}", all - some, path.display()),
    };
    Ok(half(source, config, tensors, taken, notes, true))
}

/// The state dict of a generator: the average if there is one, else the trained weights, unless `want` says otherwise.
fn generator_state(source: &Source, want: Option<WeightSet>) -> Result<StateDict> {
    const FIELD: &str = "generator_weights";
    source.refuse_whole_module()?;
    let (averages, trained): (Vec<_>, Vec<_>) =
        source.state_dicts(GENERATOR_ANCHOR).into_iter().partition(StateDict::is_average);
    let listed = || source.root_list("model_ema", "model").transpose();
    let average = || match listed().or_else(|| source.root_dict("model_ema").transpose()) {
        Some(state) => state.map(Some),
        None => only(source, averages),
    };
    let raw = || match source.root_dict("model").transpose() {
        Some(state) => state.map(Some),
        None => only(source, trained),
    };
    let found = match want {
        Some(WeightSet::Ema) => average()?,
        Some(WeightSet::Raw) => raw()?,
        None => average()?.map_or_else(raw, |state| Ok(Some(state)))?,
    };
    found.ok_or_else(|| {
        let wanted = match want {
            Some(WeightSet::Ema) => "moving average of a generator",
            _ => "weights of a generator",
        };
        let error = missing(source, wanted, GENERATOR_ANCHOR, ("tokenizer", TOKENIZER_ANCHOR));
        if want.is_some() { error.with_field(FIELD) } else { error }
    })
}

fn tokenizer_state(source: &Source) -> Result<StateDict> {
    source.refuse_whole_module()?;
    // A generator is not taken for a tokenizer, whatever its key is.
    let states = source.state_dicts(TOKENIZER_ANCHOR);
    let found = match states.iter().find(|state| state.path == "state_dict") {
        Some(state) => Some(state.clone()),
        None => match source.root_dict("state_dict")? {
            Some(state) if states.is_empty() => Some(state),
            _ => only(source, states)?,
        },
    };
    found.ok_or_else(|| missing(source, "weights of a tokenizer", TOKENIZER_ANCHOR, ("generator", GENERATOR_ANCHOR)))
}

/// The only one of several state dicts.
fn only(source: &Source, mut states: Vec<StateDict>) -> Result<Option<StateDict>> {
    if states.len() > 1 {
        let paths: Vec<&str> = states.iter().map(|state| &state.path[..]).collect();
        let problem =
            format!("has several state dicts, expected one: {}; save the one to use by itself", paths.join(", "));
        return Err(source.bad(problem));
    }
    Ok(states.pop())
}

fn missing(source: &Source, wanted: &str, anchor: &str, (other, other_anchor): (&str, &str)) -> Error {
    let swapped = match source.state_dicts(other_anchor)[..] {
        [] => String::new(),
        _ => format!("; it is the checkpoint of a {other}"),
    };
    source.bad(format!("has no {wanted}, which have a tensor {anchor} (found: {}){swapped}", source.contents()))
}

/// Whether an entry of a file with both halves is the tokenizer's.
fn is_tokenizer_entry(name: &str) -> bool {
    is_tokenizer_part(name) || TRAINING_ONLY.iter().any(|prefix| name.starts_with(prefix))
}

/// The moving averages of a tokenizer: their names have no dots after the part, and are unique.
fn averages_by_name(state: &StateDict) -> BTreeMap<String, &Entry> {
    let averages = state.entries.iter().filter(|entry| entry.name.starts_with("ema_"));
    averages.map(|entry| (canonical(&entry.stored), entry)).collect()
}

fn shapes(tensors: &BTreeMap<String, Located>) -> Shapes {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shape.clone())).collect()
}

/// The tensors of a file of eqim.
fn all_of(source: &Source, wanted: impl Fn(&str) -> bool) -> Result<BTreeMap<String, Located>> {
    let names = source.names();
    let entries = names.into_iter().filter(|entry| wanted(&entry.stored));
    entries.map(|entry| Ok((entry.stored.clone(), source.locate(&entry)?))).collect()
}

/// The file of eqim that the source is, with its configuration.
fn of_eqim(source: &Source) -> Result<Option<(&TensorFile, StoredConfig)>> {
    let Source::Tensors(shards) = source else { return Ok(None) };
    let Some(file) = shards.only() else { return Ok(None) };
    Ok(stored::stored(file)?.map(|config| (file, config)))
}

/// Rejects the raw weights: a `.safetensors` file of eqim holds only one set of weights.
fn only_set(source: &Source, want: Option<WeightSet>, field: &'static str) -> Result<()> {
    match want {
        Some(WeightSet::Raw) => {
            let problem = "has one set of weights: only .pth and .ckpt files have raw weights";
            Err(source.bad(problem).with_field(field))
        }
        Some(WeightSet::Ema) | None => Ok(()),
    }
}

fn with_hints(mut config: GeneratorConfig, hints: &Hints) -> (GeneratorConfig, Vec<Inferred>) {
    config.heads = hints.heads.unwrap_or(config.heads);
    config.window = hints.window.unwrap_or(config.window);
    config.vae_norm = hints.vae_norm.unwrap_or(config.vae_norm);
    config.steps = hints.steps.unwrap_or(config.steps);
    let from = |set: bool| if set { Origin::Flag } else { Origin::Metadata };
    let origins = [
        from(hints.heads.is_some()),
        from(hints.window.is_some()),
        from(hints.vae_norm.is_some()),
        from(hints.steps.is_some()),
    ];
    let inferred = infer::origins(&config, origins, Origin::Metadata);
    (config, inferred)
}

/// The settings in the `args` of the trainer, in the dictionary of the state dict or in one around it. A setting that
/// `hints` has is not looked at.
///
/// # Errors
/// [`Error::input`] for a value that is not understood: a preset must not take its place.
fn arguments(file: &TorchFile, parents: &[Id], hints: &Hints) -> Result<Hints> {
    let pickle = file.pickle();
    let present = |&id: &Id| !matches!(pickle.get(id), Value::None);
    let Some(args) = parents.iter().find_map(|&parent| pickle.item(parent, "args").filter(present)) else {
        return Ok(Hints::default());
    };
    let plain = match pickle.call(args) {
        Some((class, _)) => matches!(class, "argparse.Namespace" | "types.SimpleNamespace"),
        None => pickle.entries(args).is_some(),
    };
    let number = |key: &str, field: &'static str, set: bool, whole: bool| -> Result<Option<f64>> {
        let misread = |what: String| {
            let problem = format!("{what}, which is not understood: set {field}");
            Err(file.bad(problem).with_field(field))
        };
        match pickle.item(args, key).filter(present) {
            _ if set => Ok(None),
            None if plain => Ok(None),
            None => misread(format!("`args` is {}", pickle.describe(args))),
            Some(id) => {
                let number = pickle.number(id).or_else(|| numpy::scalar(pickle, id));
                let fits = |number: &f64| !whole || number.fract() == 0.0 && (0.0..1e9).contains(number);
                match number.filter(fits) {
                    Some(number) => Ok(Some(number)),
                    None => misread(format!("`args.{key}` is {}", pickle.describe(id))),
                }
            }
        }
    };
    let count = |key, field, set| Ok::<_, Error>(number(key, field, set, true)?.map(|number| number as usize));
    let model = pickle.item(args, "model").and_then(|id| pickle.text(id));
    Ok(Hints {
        preset: model.and_then(Preset::from_reference_name),
        heads: None,
        window: count("cond_length", "window", hints.window.is_some())?,
        vae_norm: number("vae_norm", "vae_norm", hints.vae_norm.is_some(), false)?,
        steps: count("num_sampling_steps", "steps", hints.steps.is_some())?,
    })
}
