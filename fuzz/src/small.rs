//! A very small model, and its files.

use candle_core::Tensor;
use eqim::close::values;
use eqim::config::{GROUPS, GeneratorConfig, Level, TokenizerConfig, Tower};
use eqim::digest::Hash;
use eqim::model::{Stage, parameters_of};
use eqim::weights::Weights;
use eqim::{Config, Result, ResultExt};

use crate::torch;

/// Sizes of the model: one block, and images of two rows of latents.
pub fn config() -> Config {
    let tower = Tower {
        z_channels: 1,
        conv_in: GROUPS,
        res_blocks: 1,
        levels: vec![Level { channels: GROUPS, attention: false }],
    };
    Config {
        generator: GeneratorConfig {
            class_num: 3,
            class_names: ["forest", "water", "sky"].map(String::from).to_vec(),
            buffer: 2,
            embed: 2,
            dim: 8,
            depth: 1,
            heads: 2,
            mlp_dim: 16,
            window: 2,
            flow_dim: 6,
            flow_depth: 1,
            time_dim: 4,
            vae_norm: 0.5,
            steps: 2,
        },
        tokenizer: TokenizerConfig {
            image_channels: 3,
            rows: 2,
            embed: 2,
            len_down_scale: 0,
            groups: GROUPS,
            encoder: tower.clone(),
            decoder: tower,
        },
    }
}

/// Weights of the model.
///
/// # Errors
/// If Candle fails.
pub fn weights() -> Result<Weights> {
    Weights::random(&config(), 1)
}

/// Identifies a model by its configuration and all its weights.
///
/// # Errors
/// If Candle fails.
pub fn identity(config: &impl serde::Serialize, weights: &Weights) -> Result<String> {
    let mut hash = Hash::default();
    hash.add(serde_json::to_string(config).or_run("configuration")?);
    for (name, tensor) in weights.iter() {
        hash.add(name);
        hash.add_values(&values(tensor)?);
    }
    Ok(hash.hex())
}

/// One half of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// The transformer and the flow head.
    Generator,
    /// The encoder and the decoder.
    Tokenizer,
}

impl Half {
    /// Tensors of this half by name.
    ///
    /// # Errors
    /// If Candle fails.
    pub fn tensors(self) -> Result<Vec<(String, Tensor)>> {
        let stages: &[Stage] = match self {
            Self::Generator => &[Stage::Prefill, Stage::Step, Stage::Flow],
            Self::Tokenizer => &[Stage::Encoder, Stage::Decoder],
        };
        let weights = weights()?;
        let names = parameters_of(&config(), stages)?.into_iter().map(|(name, _)| name);
        names.map(|name| Ok((name.clone(), weights.find(&name)?.clone()))).collect()
    }
}

/// The settings that the reference's trainer saves.
fn arguments() -> Vec<u8> {
    let g = config().generator;
    torch::namespace(&[
        ("cond_length", torch::integer(g.window as i64)),
        ("vae_norm", torch::float(g.vae_norm)),
        ("num_sampling_steps", torch::text(&g.steps.to_string())),
    ])
}

/// A checkpoint before it is packed: its pickle, and its storages by index.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The pickled object, without protocol and end.
    pub pickle: Vec<u8>,
    /// Bytes of the storages.
    pub storages: Vec<Vec<u8>>,
}

impl Checkpoint {
    /// A checkpoint as the reference saves it, with one storage per tensor.
    ///
    /// # Errors
    /// If Candle fails.
    pub fn of(half: Half) -> Result<Self> {
        let (mut state, mut storages) = (vec![], vec![]);
        for (name, tensor) in half.tensors()? {
            let values = values(&tensor)?;
            let place = torch::storage("FloatStorage", &storages.len().to_string(), "cpu", values.len());
            let shape = tensor.dims();
            state.push((name, torch::tensor(place, 0, shape, &torch::contiguous(shape))));
            storages.push(torch::bytes(&values));
        }
        let pickle = match half {
            Half::Generator => {
                torch::dict(&[("model", torch::dict(&state)), ("args", arguments()), ("epoch", torch::integer(7))])
            }
            Half::Tokenizer => torch::dict(&[("state_dict", torch::dict(&state))]),
        };
        Ok(Self { pickle, storages })
    }

    /// Like [`Checkpoint::of`], with all tensors in one storage.
    ///
    /// # Errors
    /// If Candle fails.
    pub fn shared(half: Half) -> Result<Self> {
        let (mut state, mut all) = (vec![], vec![]);
        for (name, tensor) in half.tensors()? {
            state.push((name, all.len(), tensor.dims().to_vec()));
            all.extend(values(&tensor)?);
        }
        let place = torch::storage("FloatStorage", "0", "cuda:0", all.len());
        let tensor = |(name, at, shape): (String, usize, Vec<usize>)| {
            let stride = torch::contiguous(&shape);
            (format!("module.{name}"), torch::tensor(place.clone(), at, &shape, &stride))
        };
        let state: Vec<_> = state.into_iter().map(tensor).collect();
        let storages = vec![torch::bytes(&all)];
        Ok(Self { pickle: torch::dict(&[("model_ema", torch::dict(&state)), ("args", arguments())]), storages })
    }

    /// The files of the archive.
    pub fn files(&self) -> torch::Files {
        torch::checkpoint(&self.pickle, &self.storages)
    }
}
