//! The stages of the model: parts that run separately, each as one graph of a bundle. Defines their inputs, outputs and
//! code.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::transformer::KeyValue;
use super::{flow, tokenizer, transformer};
use crate::ops::Ops;
use crate::{Config, Error, Result};

/// A part of the model that runs separately: one graph of a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The computations that depend only on the class: [`transformer::prefill`].
    Prefill,
    /// The transformer for one token: [`transformer::step`].
    Step,
    /// The flow head's complete ODE for one token: [`flow::sample`].
    Flow,
    /// Decodes tokens to an image: [`tokenizer::decode`].
    Decoder,
    /// Encodes an image to tokens: [`tokenizer::encode`].
    Encoder,
}

/// An input or output of a stage (ONNX `ValueInfoProto`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValueInfo {
    /// Name of the value in the graph.
    pub name: String,
    /// Kind of the value's elements.
    pub kind: ValueKind,
    /// Size of each axis.
    pub shape: Vec<Dimension>,
}

/// Kind of the elements of an input or output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ValueKind {
    /// 64-bit integers.
    Integer,
    /// 32-bit floating-point numbers, for any precision of the graph.
    Float,
    /// Keys or values of attention, in the precision of the graph. Only graphs read them.
    Cache,
}

/// Size of an axis of an input or output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Dimension {
    /// A size that is known when the graph is written (ONNX `dim_value`).
    Fixed(usize),
    /// A size that is known only at run time (ONNX `dim_param`). Axes with the same symbol in a graph have the same
    /// size.
    Symbolic(Symbol),
}

/// Name of a size that is known only at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Symbol {
    /// Number of images in a batch. In the transformer, number of rows in the batch.
    Batch,
    /// Number of rows of the flow head: the conditional ones and, with guidance, the same number of unconditional ones.
    Rows,
    /// Number of evaluations of the velocity.
    Evaluations,
    /// Number of tokens of an image.
    Tokens,
    /// Width of an image in pixels.
    Width,
}

impl Symbol {
    /// All symbols.
    pub const ALL: [Self; 5] = [Self::Batch, Self::Rows, Self::Evaluations, Self::Tokens, Self::Width];

    /// Name of the symbol in graphs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::Rows => "rows",
            Self::Evaluations => "evaluations",
            Self::Tokens => "tokens",
            Self::Width => "width",
        }
    }
}

/// Sizes of all symbols. A stage uses only the symbols of its own axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// [`Symbol::Batch`].
    pub batch: usize,
    /// [`Symbol::Rows`].
    pub rows: usize,
    /// [`Symbol::Evaluations`].
    pub evaluations: usize,
    /// [`Symbol::Tokens`].
    pub tokens: usize,
    /// [`Symbol::Width`].
    pub width: usize,
}

impl Sizes {
    /// A batch of `batch` images without guidance, and 1 for every other size.
    pub fn of_batch(batch: usize) -> Self {
        Self { batch, rows: batch, evaluations: 1, tokens: 1, width: 1 }
    }

    /// The size of a symbol.
    pub fn get(&self, symbol: Symbol) -> usize {
        match symbol {
            Symbol::Batch => self.batch,
            Symbol::Rows => self.rows,
            Symbol::Evaluations => self.evaluations,
            Symbol::Tokens => self.tokens,
            Symbol::Width => self.width,
        }
    }
}

impl Dimension {
    /// Size of the axis for these sizes of the symbols.
    pub fn size(self, sizes: &Sizes) -> usize {
        match self {
            Self::Fixed(size) => size,
            Self::Symbolic(symbol) => sizes.get(symbol),
        }
    }
}

impl ValueInfo {
    /// Shape of the value for these sizes of the symbols.
    pub fn shape(&self, sizes: &Sizes) -> Vec<usize> {
        self.shape.iter().map(|axis| axis.size(sizes)).collect()
    }
}

const BATCH: Dimension = Dimension::Symbolic(Symbol::Batch);

fn value(name: impl Into<String>, kind: ValueKind, shape: Vec<Dimension>) -> ValueInfo {
    ValueInfo { name: name.into(), kind, shape }
}

/// The values `{prefix}.{i}.key` and `{prefix}.{i}.value` of every block.
fn key_values(config: &Config, prefix: &str, length: usize) -> Vec<ValueInfo> {
    use Dimension::Fixed;
    let g = &config.generator;
    let shape = vec![BATCH, Fixed(g.heads), Fixed(length), Fixed(g.head_dim())];
    let names = (0..g.depth).flat_map(|i| ["key", "value"].map(|part| format!("{prefix}.{i}.{part}")));
    names.map(|name| value(name, ValueKind::Cache, shape.clone())).collect()
}

impl Stage {
    /// All stages.
    pub const ALL: [Self; 5] = [Self::Prefill, Self::Step, Self::Flow, Self::Decoder, Self::Encoder];

    /// Name of the stage's graph.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Step => "transformer_step",
            Self::Flow => "flow_sampler",
            Self::Decoder => "decoder",
            Self::Encoder => "encoder",
        }
    }

    /// Inputs of the stage, in order.
    pub fn inputs(self, config: &Config) -> Vec<ValueInfo> {
        use Dimension::{Fixed, Symbolic};
        let g = &config.generator;
        match self {
            Self::Prefill => vec![value("labels", ValueKind::Integer, vec![BATCH])],
            Self::Step => {
                let token = value("token", ValueKind::Float, vec![BATCH, Fixed(g.embed)]);
                let position = value("position", ValueKind::Integer, vec![BATCH]);
                let past = key_values(config, "past_key_values", g.window);
                [vec![token, position], past, key_values(config, "cross", g.buffer)].concat()
            }
            Self::Flow => vec![
                value("z", ValueKind::Float, vec![Symbolic(Symbol::Rows), Fixed(g.dim)]),
                value("noise", ValueKind::Float, vec![BATCH, Fixed(g.embed)]),
                value("guidance", ValueKind::Float, vec![BATCH]),
                value("times", ValueKind::Float, vec![Symbolic(Symbol::Evaluations)]),
                value("updates", ValueKind::Float, vec![Symbolic(Symbol::Evaluations), Fixed(2), Fixed(3)]),
            ],
            Self::Decoder => {
                vec![value("tokens", ValueKind::Float, vec![BATCH, Symbolic(Symbol::Tokens), Fixed(g.embed)])]
            }
            Self::Encoder => vec![image(config)],
        }
    }

    /// Outputs of the stage, in order.
    pub fn outputs(self, config: &Config) -> Vec<ValueInfo> {
        use Dimension::{Fixed, Symbolic};
        let g = &config.generator;
        let z = || value("z", ValueKind::Float, vec![BATCH, Fixed(g.dim)]);
        match self {
            Self::Prefill => [vec![z()], key_values(config, "cross", g.buffer)].concat(),
            Self::Step => [vec![z()], key_values(config, "present", g.window)].concat(),
            Self::Flow => vec![value("token", ValueKind::Float, vec![BATCH, Fixed(g.embed)])],
            Self::Decoder => vec![image(config)],
            Self::Encoder => {
                vec![value("latent", ValueKind::Float, vec![BATCH, Symbolic(Symbol::Tokens), Fixed(g.embed)])]
            }
        }
    }

    /// Runs the stage on `inputs`, in the order of [`Stage::inputs`]. Returns the outputs in the order of
    /// [`Stage::outputs`].
    ///
    /// # Errors
    /// If the number of inputs is wrong; errors of the interpreter.
    pub fn run<O: Ops>(self, o: &mut O, config: &Config, inputs: &[O::Tensor]) -> Result<Vec<O::Tensor>> {
        let expected = self.inputs(config).len();
        if inputs.len() != expected {
            return Err(Error::run(self.name(), format!("{} inputs, expected {expected}", inputs.len())));
        }
        let (g, tokenizer) = (&config.generator, &config.tokenizer);
        match self {
            Self::Prefill => {
                let prefill = transformer::prefill(o, g, &inputs[0])?;
                Ok(flat(prefill.z, prefill.cross))
            }
            Self::Step => {
                let caches: Vec<KeyValue<O::Tensor>> = KeyValue::pairs(&inputs[2..]);
                let (past, cross) = caches.split_at(g.depth);
                let step = transformer::step(o, g, &inputs[0], &inputs[1], past, cross)?;
                Ok(flat(step.z, step.present))
            }
            Self::Flow => {
                let [z, noise, guidance, times, updates] = std::array::from_fn(|index| &inputs[index]);
                Ok(vec![flow::sample(o, g, z, noise, guidance, times, updates)?])
            }
            Self::Decoder => Ok(vec![tokenizer::decode(o, tokenizer, &inputs[0])?]),
            Self::Encoder => Ok(vec![tokenizer::encode(o, tokenizer, &inputs[0])?]),
        }
    }

    /// Name of the stage on command lines.
    pub fn short_name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Step => "step",
            Self::Flow => "flow",
            Self::Decoder => "decoder",
            Self::Encoder => "encoder",
        }
    }
}

impl FromStr for Stage {
    type Err = Error;

    /// Parses a [short name](Stage::short_name). The former names `decode` and `encode` are also accepted.
    fn from_str(name: &str) -> Result<Self> {
        let name = match name {
            "decode" => "decoder",
            "encode" => "encoder",
            name => name,
        };
        let names = || Self::ALL.map(Self::short_name).join(", ");
        let stage = Self::ALL.into_iter().find(|stage| stage.short_name() == name);
        stage.ok_or_else(|| Error::setting("stage", format!("is {name}, expected one of {}", names())))
    }
}

fn image(config: &Config) -> ValueInfo {
    let tokenizer = &config.tokenizer;
    let shape = vec![
        BATCH,
        Dimension::Fixed(tokenizer.image_channels),
        Dimension::Fixed(tokenizer.image_height()),
        Dimension::Symbolic(Symbol::Width),
    ];
    value("image", ValueKind::Float, shape)
}

fn flat<T>(z: T, caches: Vec<KeyValue<T>>) -> Vec<T> {
    let caches = caches.into_iter().flat_map(|KeyValue { key, value }| [key, value]);
    std::iter::once(z).chain(caches).collect()
}
