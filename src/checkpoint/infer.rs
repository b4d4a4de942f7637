//! Infers a model's configuration from the names and shapes of its tensors.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::{GROUPS, GeneratorConfig, Level, Preset, TokenizerConfig, Tower};
use crate::{Error, Result};

/// Settings that a checkpoint's tensors do not contain. Explicit values take precedence over the checkpoint's own
/// values, and these over the values of the preset.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hints {
    /// Published size of the model.
    pub preset: Option<Preset>,
    /// Number of attention heads.
    pub heads: Option<usize>,
    /// Window of self-attention in tokens.
    pub window: Option<usize>,
    /// Scale of the latents.
    pub vae_norm: Option<f64>,
    /// Default number of steps of the flow's ODE per token.
    pub steps: Option<usize>,
}

/// Where a value of a configuration comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// The names and shapes of the tensors.
    Shapes,
    /// The arguments of the training, which the checkpoint contains.
    Args,
    /// A published size.
    Preset,
    /// The user.
    Flag,
    /// The configuration in a file of eqim.
    Metadata,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shapes => "shapes",
            Self::Args => "args",
            Self::Preset => "preset",
            Self::Flag => "flag",
            Self::Metadata => "metadata",
        })
    }
}

/// A value of a configuration that was inferred, and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inferred {
    /// Name of the value.
    pub name: String,
    /// The value as text.
    pub value: String,
    /// Where the value comes from.
    pub origin: Origin,
}

impl Inferred {
    /// A value with its name.
    pub fn new(name: &str, value: impl fmt::Display, origin: Origin) -> Self {
        Self { name: name.into(), value: value.to_string(), origin }
    }
}

/// Shapes of tensors by name.
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// Size of axis `axis` of the tensor `name`, which must have `rank` axes.
fn size(shapes: &Shapes, name: &str, rank: usize, axis: usize) -> Result<usize> {
    let shape = shapes.get(name).ok_or_else(|| Error::input(format!("tensor {name}"), "is missing"))?;
    if shape.len() != rank {
        return Err(Error::input(format!("tensor {name}"), format!("has shape {shape:?}, expected {rank} axes")));
    }
    Ok(shape[axis])
}

/// Number of consecutive names `name(0)`, `name(1)`, … that exist.
fn count(shapes: &Shapes, name: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|&i| shapes.contains_key(&name(i))).count()
}

/// The first of a flag's, the checkpoint's and a preset's value, and which it is.
fn choose<T>(
    field: &'static str,
    what: &str,
    flag: Option<T>,
    args: Option<T>,
    preset: Option<T>,
) -> Result<(T, Origin)> {
    let unknown = || {
        let problem = format!(
            "is unknown: neither the tensors nor `args` contain {what}; set it, or choose the preset of a published size"
        );
        Error::setting(field, problem)
    };
    let found = [(flag, Origin::Flag), (args, Origin::Args), (preset, Origin::Preset)];
    found.into_iter().find_map(|(value, origin)| Some((value?, origin))).ok_or_else(unknown)
}

/// Infers the generator's configuration, and tells where its values come from. `hints` come from the user, `stored` from
/// the checkpoint.
///
/// # Errors
/// [`Error::input`] naming the tensor that is missing or has the wrong shape; [`Error::setting`] naming the setting
/// that is unknown or does not fit the tensors.
pub fn generator(shapes: &Shapes, hints: &Hints, stored: &Hints) -> Result<(GeneratorConfig, Vec<Inferred>)> {
    // A file that is not a generator's lacks tensors. This is said before a setting is asked for.
    let sizes = GeneratorConfig {
        class_num: size(shapes, "class_emb.weight", 2, 0)?,
        class_names: vec![],
        buffer: size(shapes, "encoder_pos_embed_learned", 3, 1)?,
        embed: size(shapes, "z_proj.weight", 2, 1)?,
        dim: size(shapes, "z_proj.weight", 2, 0)?,
        depth: count(shapes, |i| format!("encoder_blocks.{i}.attn.qkv.weight")),
        heads: 0,
        mlp_dim: size(shapes, "encoder_blocks.0.mlp.fc1.weight", 2, 0)?,
        window: 0,
        flow_dim: size(shapes, "diffloss.net.input_proj.weight", 2, 0)?,
        flow_depth: count(shapes, |j| format!("diffloss.net.res_blocks.{j}.in_ln.weight")),
        time_dim: size(shapes, "diffloss.net.time_embed.mlp.0.weight", 2, 1)?,
        vae_norm: 0.0,
        steps: 0,
    };
    let preset = hints.preset.or(stored.preset);
    let heads_of = |hints: &Hints| hints.heads.or(hints.preset.map(Preset::heads));
    // An explicit preset has priority over the checkpoint's.
    let (heads, heads_from) = match (hints.heads, hints.preset) {
        (None, Some(preset)) => (preset.heads(), Origin::Preset),
        _ => choose("heads", "how many attention heads it has", hints.heads, heads_of(stored), None)?,
    };
    let (window, window_from) =
        choose("window", "the window of self-attention", hints.window, stored.window, preset.map(|_| Preset::WINDOW))?;
    let (vae_norm, vae_norm_from) = choose(
        "vae_norm",
        "the scale of its latents",
        hints.vae_norm,
        stored.vae_norm,
        preset.map(|_| Preset::VAE_NORM),
    )?;
    let (steps, steps_from) =
        choose("steps", "the number of sampling steps", hints.steps, stored.steps, preset.map(|_| Preset::STEPS))?;
    let config = GeneratorConfig { heads, window, vae_norm, steps, ..sizes };
    if hints.heads.is_none() || hints.preset.is_some() {
        preset.map_or(Ok(()), |preset| fits(&config, preset))?;
    }
    let origins = origins(&config, [heads_from, window_from, vae_norm_from, steps_from], Origin::Shapes);
    Ok((config, origins))
}

/// All values of a generator's configuration: the settings heads, window, `vae_norm` and steps, then its sizes.
pub(super) fn origins(
    config: &GeneratorConfig,
    [heads, window, vae_norm, steps]: [Origin; 4],
    sizes: Origin,
) -> Vec<Inferred> {
    let shapes = |name, value: usize| Inferred::new(name, value, sizes);
    vec![
        Inferred::new("heads", config.heads, heads),
        Inferred::new("window", config.window, window),
        Inferred::new("vae_norm", config.vae_norm, vae_norm),
        Inferred::new("steps", config.steps, steps),
        shapes("classes", config.class_num),
        shapes("condition tokens", config.buffer),
        shapes("values of a token", config.embed),
        shapes("width", config.dim),
        shapes("blocks", config.depth),
        shapes("MLP width", config.mlp_dim),
        shapes("flow head's width", config.flow_dim),
        shapes("flow head's blocks", config.flow_depth),
        shapes("time embedding", config.time_dim),
    ]
}

/// Checks that the tensors have the width and depth of the preset. With the wrong preset, the number of heads would be
/// wrong, and the model would give wrong results without an error. The flow head may have any width.
pub(super) fn fits(config: &GeneratorConfig, preset: Preset) -> Result<()> {
    let published = preset.config().generator;
    let sizes = [("width", config.dim, published.dim), ("number of blocks", config.depth, published.depth)];
    match sizes.iter().find(|(_, found, expected)| found != expected) {
        Some((what, found, expected)) => {
            let problem = format!(
                "is {preset:?}, which has a {what} of {expected}, and the tensors have {found}: give the preset that the \
                 checkpoint has, or its attention heads"
            );
            Err(Error::setting("preset", problem))
        }
        None => Ok(()),
    }
}

/// Values of a tokenizer's configuration, for the report. The number of groups is that of all published tokenizers.
pub(super) fn tokenizer_origins(config: &TokenizerConfig) -> Vec<Inferred> {
    let channels: Vec<usize> = config.decoder.levels.iter().map(|level| level.channels).collect();
    vec![
        Inferred::new("image height", config.image_height(), Origin::Shapes),
        Inferred::new("token width", config.token_width(), Origin::Shapes),
        Inferred::new("tokenizer's channels", format!("{channels:?}"), Origin::Shapes),
        Inferred::new("normalization groups", config.groups, Origin::Preset),
    ]
}

/// Infers the tokenizer's configuration.
///
/// # Errors
/// [`Error::input`] naming the tensor that is missing or has the wrong shape.
pub fn tokenizer(shapes: &Shapes) -> Result<TokenizerConfig> {
    let levels = count(shapes, |l| format!("encoder.down.{l}.block.0.conv1.weight"));
    let mut len_down_scale = 0;
    for level in 0..levels.saturating_sub(1) {
        let name = format!("encoder.down.{level}.downsample.conv.conv.weight");
        let (output, input) = (size(shapes, &name, 4, 0)?, size(shapes, &name, 4, 1)?);
        match (input == 4 * output, input == 2 * output) {
            (true, _) if len_down_scale == level => len_down_scale += 1,
            (_, true) => {}
            _ => {
                let problem =
                    format!("has shape {:?}, which halves neither the height nor both height and width", shapes[&name]);
                return Err(Error::input(format!("tensor {name}"), problem));
            }
        }
    }
    let z_channels = size(shapes, "encoder.conv_out.weight", 4, 0)?;
    let columns = size(shapes, "encoder.encoder1d.weight", 3, 0)?;
    if z_channels == 0 || !columns.is_multiple_of(z_channels) {
        let problem = format!("has {columns} channels for rows of {z_channels}");
        return Err(Error::input("tensor encoder.encoder1d.weight", problem));
    }
    Ok(TokenizerConfig {
        image_channels: size(shapes, "encoder.conv_in.weight", 4, 1)?,
        rows: columns / z_channels,
        embed: size(shapes, "quant_layer.weight", 3, 0)?,
        len_down_scale,
        groups: GROUPS,
        encoder: tower(shapes, "encoder", "down", z_channels)?,
        decoder: tower(shapes, "decoder", "up", size(shapes, "decoder.conv_in.weight", 4, 1)?)?,
    })
}

fn tower(shapes: &Shapes, part: &str, direction: &str, z_channels: usize) -> Result<Tower> {
    let block = |level: usize, block: usize| format!("{part}.{direction}.{level}.block.{block}.conv1.weight");
    let levels = (0..count(shapes, |level| block(level, 0)))
        .map(|level| {
            let attention = shapes.contains_key(&format!("{part}.{direction}.{level}.attn.0.norm.weight"));
            Ok(Level { channels: size(shapes, &block(level, 0), 4, 0)?, attention })
        })
        .collect::<Result<_>>()?;
    Ok(Tower {
        z_channels,
        conv_in: size(shapes, &format!("{part}.conv_in.weight"), 4, 0)?,
        res_blocks: count(shapes, |index| block(0, index)),
        levels,
    })
}
