//! Infers a model's configuration from the names and shapes of its tensors.

use std::collections::BTreeMap;

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

/// Infers the generator's configuration. `hints` come from the user, `stored` from the checkpoint.
///
/// # Errors
/// [`Error::input`] naming the tensor that is missing or has the wrong shape; [`Error::setting`] naming the setting
/// that is unknown or does not fit the tensors.
pub fn generator(shapes: &Shapes, hints: &Hints, stored: &Hints) -> Result<GeneratorConfig> {
    let preset = hints.preset.or(stored.preset);
    let unknown = |field: &'static str, what: &str| {
        let problem = format!(
            "is unknown: neither the tensors nor `args` contain {what}; set it, or choose the preset of a published size"
        );
        Error::setting(field, problem)
    };
    let heads = hints.heads.or(preset.map(Preset::heads));
    let window = hints.window.or(stored.window).or(preset.map(|_| Preset::WINDOW));
    let vae_norm = hints.vae_norm.or(stored.vae_norm).or(preset.map(|_| Preset::VAE_NORM));
    let steps = hints.steps.or(stored.steps).or(preset.map(|_| Preset::STEPS));
    let config = GeneratorConfig {
        class_num: size(shapes, "class_emb.weight", 2, 0)?,
        class_names: vec![],
        buffer: size(shapes, "encoder_pos_embed_learned", 3, 1)?,
        embed: size(shapes, "z_proj.weight", 2, 1)?,
        dim: size(shapes, "z_proj.weight", 2, 0)?,
        depth: count(shapes, |i| format!("encoder_blocks.{i}.attn.qkv.weight")),
        heads: heads.ok_or_else(|| unknown("heads", "how many attention heads it has"))?,
        mlp_dim: size(shapes, "encoder_blocks.0.mlp.fc1.weight", 2, 0)?,
        window: window.ok_or_else(|| unknown("window", "the window of self-attention"))?,
        flow_dim: size(shapes, "diffloss.net.input_proj.weight", 2, 0)?,
        flow_depth: count(shapes, |j| format!("diffloss.net.res_blocks.{j}.in_ln.weight")),
        time_dim: size(shapes, "diffloss.net.time_embed.mlp.0.weight", 2, 1)?,
        vae_norm: vae_norm.ok_or_else(|| unknown("vae_norm", "the scale of its latents"))?,
        steps: steps.ok_or_else(|| unknown("steps", "the number of sampling steps"))?,
    };
    preset.map_or(Ok(()), |preset| fits(&config, preset))?;
    Ok(config)
}

/// Checks that the tensors have the sizes of the preset. With the wrong preset, the model would give wrong results
/// without an error.
pub(super) fn fits(config: &GeneratorConfig, preset: Preset) -> Result<()> {
    let published = preset.config().generator;
    let sizes = [
        ("width", config.dim, published.dim),
        ("number of blocks", config.depth, published.depth),
        ("flow head's width", config.flow_dim, published.flow_dim),
    ];
    match sizes.iter().find(|(_, found, expected)| found != expected) {
        Some((what, found, expected)) => {
            let problem = format!(
                "is {preset:?}, which has a {what} of {expected}, and the tensors have {found}: give the preset that the \
                 checkpoint has, or none and its attention heads"
            );
            Err(Error::setting("preset", problem))
        }
        None => Ok(()),
    }
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
