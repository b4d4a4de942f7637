//! The parts of the model that run by themselves, one graph of a bundle each: their inputs, outputs and code.

use serde::{Deserialize, Serialize};

use super::transformer::KeyValue;
use super::{flow, tokenizer, transformer};
use crate::ops::Ops;
use crate::{Config, Error, Result};

/// A part of the model that runs by itself: one graph of a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// What depends on the class alone: [`transformer::prefill`].
    Prefill,
    /// One token through the transformer: [`transformer::step`].
    Step,
    /// The flow head's whole ODE for one token: [`flow::sample`].
    Flow,
    /// Tokens to an image: [`tokenizer::decode`].
    Decode,
    /// An image to tokens: [`tokenizer::encode`].
    Encode,
}

/// An input or output of a stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// Its name in the graph.
    pub name: String,
    /// What its values are.
    pub kind: Kind,
    /// Its axes.
    pub shape: Vec<Axis>,
}

/// What a port's values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// 64-bit integers.
    Integer,
    /// 32-bit floating-point numbers, whatever the precision inside.
    Float,
    /// Keys or values of attention, in the precision of the graph; only graphs read them.
    Cache,
}

/// Size of an axis of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Axis {
    /// Fixed.
    Is(usize),
    /// Known at run time only; axes of one name in one graph have one size.
    Any(String),
}

impl Axis {
    /// Its size, where `symbol` knows those of names.
    pub fn size(&self, symbol: impl FnOnce(&str) -> usize) -> usize {
        match self {
            Self::Is(size) => *size,
            Self::Any(name) => symbol(name),
        }
    }
}

/// The batch's axis.
pub const BATCH: &str = "batch";

fn port(name: impl Into<String>, kind: Kind, shape: Vec<Axis>) -> Port {
    Port { name: name.into(), kind, shape }
}

fn any(name: &str) -> Axis {
    Axis::Any(name.into())
}

/// `{prefix}.{i}.key` and `{prefix}.{i}.value` of every block.
fn key_values(config: &Config, prefix: &str, length: usize) -> Vec<Port> {
    let g = &config.generator;
    let shape = vec![any(BATCH), Axis::Is(g.heads), Axis::Is(length), Axis::Is(g.head_dim())];
    let names = (0..g.depth).flat_map(|i| ["key", "value"].map(|part| format!("{prefix}.{i}.{part}")));
    names.map(|name| port(name, Kind::Cache, shape.clone())).collect()
}

impl Stage {
    /// All stages, in the order of a run.
    pub const ALL: [Self; 5] = [Self::Prefill, Self::Step, Self::Flow, Self::Decode, Self::Encode];

    /// Name of the stage's graph.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Step => "transformer_step",
            Self::Flow => "flow_sampler",
            Self::Decode => "decoder",
            Self::Encode => "encoder",
        }
    }

    /// Inputs, in order.
    pub fn inputs(self, config: &Config) -> Vec<Port> {
        use Axis::Is;
        let g = &config.generator;
        let batch = || any(BATCH);
        match self {
            Self::Prefill => vec![port("labels", Kind::Integer, vec![batch()])],
            Self::Step => {
                let token = port("token", Kind::Float, vec![batch(), Is(g.embed)]);
                let position = port("position", Kind::Integer, vec![batch()]);
                let past = key_values(config, "past_key_values", g.window);
                [vec![token, position], past, key_values(config, "cross", g.buffer)].concat()
            }
            Self::Flow => vec![
                port("z", Kind::Float, vec![any("rows"), Is(g.dim)]),
                port("noise", Kind::Float, vec![batch(), Is(g.embed)]),
                port("guidance", Kind::Float, vec![batch()]),
                port("times", Kind::Float, vec![any("evaluations")]),
                port("updates", Kind::Float, vec![any("evaluations"), Is(2), Is(3)]),
            ],
            Self::Decode => vec![port("tokens", Kind::Float, vec![batch(), any("tokens"), Is(g.embed)])],
            Self::Encode => vec![image(config)],
        }
    }

    /// Outputs, in order.
    pub fn outputs(self, config: &Config) -> Vec<Port> {
        use Axis::Is;
        let g = &config.generator;
        let z = || port("z", Kind::Float, vec![any(BATCH), Is(g.dim)]);
        match self {
            Self::Prefill => [vec![z()], key_values(config, "cross", g.buffer)].concat(),
            Self::Step => [vec![z()], key_values(config, "present", g.window)].concat(),
            Self::Flow => vec![port("token", Kind::Float, vec![any(BATCH), Is(g.embed)])],
            Self::Decode => vec![image(config)],
            Self::Encode => vec![port("latent", Kind::Float, vec![any(BATCH), any("tokens"), Is(g.embed)])],
        }
    }

    /// Runs the stage on `inputs`, in the order of [`Stage::inputs`]; gives the outputs in the order of
    /// [`Stage::outputs`].
    ///
    /// # Errors
    /// For another number of inputs; those of the interpreter.
    pub fn run<O: Ops>(self, o: &mut O, config: &Config, inputs: &[O::Tensor]) -> Result<Vec<O::Tensor>> {
        let expected = self.inputs(config).len();
        if inputs.len() != expected {
            return Err(Error::run(self.name(), format!("{} inputs, expected {expected}", inputs.len())));
        }
        let g = &config.generator;
        match (self, inputs) {
            (Self::Step, [token, position, caches @ ..]) => {
                let caches: Vec<KeyValue<O::Tensor>> = pairs(caches);
                let (past, cross) = caches.split_at(g.depth);
                let step = transformer::step(o, g, token, position, past, cross)?;
                Ok(flat(step.z, step.present))
            }
            (Self::Flow, [z, noise, guidance, times, updates, ..]) => {
                Ok(vec![flow::sample(o, g, z, noise, guidance, times, updates)?])
            }
            (Self::Decode, [tokens, ..]) => Ok(vec![tokenizer::decode(o, &config.tokenizer, tokens)?]),
            (Self::Encode, [image, ..]) => Ok(vec![tokenizer::encode(o, &config.tokenizer, image)?]),
            (_, [labels, ..]) => {
                let prefill = transformer::prefill(o, g, labels)?;
                Ok(flat(prefill.z, prefill.cross))
            }
            (_, []) => Err(Error::run(self.name(), "no inputs")),
        }
    }
}

fn image(config: &Config) -> Port {
    let tokenizer = &config.tokenizer;
    let shape = vec![any(BATCH), Axis::Is(tokenizer.image_channels), Axis::Is(tokenizer.image_height()), any("width")];
    port("image", Kind::Float, shape)
}

fn pairs<T: Clone>(caches: &[T]) -> Vec<KeyValue<T>> {
    caches.as_chunks().0.iter().map(|[key, value]| KeyValue { key: key.clone(), value: value.clone() }).collect()
}

fn flat<T>(z: T, caches: Vec<KeyValue<T>>) -> Vec<T> {
    let caches = caches.into_iter().flat_map(|KeyValue { key, value }| [key, value]);
    std::iter::once(z).chain(caches).collect()
}
