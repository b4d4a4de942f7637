//! Configuration of a model: all sizes and settings that the code needs in addition to the weights.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Configuration of a complete model: the autoregressive generator, and the tokenizer that decodes its tokens to an
/// image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The transformer and its flow-matching head.
    pub generator: GeneratorConfig,
    /// The convolutional encoder and decoder.
    pub tokenizer: TokenizerConfig,
}

/// Sizes of the generator (reference: `generator/equ_modeling.py`, `generator/diffloss.py`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GeneratorConfig {
    /// Number of classes. The label with this value is the unconditional one.
    pub class_num: usize,
    /// Names of the classes, which command lines accept in addition to class numbers. Empty if the classes have no
    /// names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub class_names: Vec<String>,
    /// Number of condition tokens before the image tokens (`buffer_size`).
    pub buffer: usize,
    /// Latent width of a token, `E`.
    pub embed: usize,
    /// Transformer width, `D`.
    pub dim: usize,
    /// Number of transformer blocks.
    pub depth: usize,
    /// Number of attention heads, `H`.
    pub heads: usize,
    /// Hidden width of a block's MLP.
    pub mlp_dim: usize,
    /// Number of earlier tokens that self-attention sees in addition to the current one (`cond_length`).
    pub window: usize,
    /// Width of the flow head, `W`.
    pub flow_dim: usize,
    /// Number of residual blocks of the flow head.
    pub flow_depth: usize,
    /// Width of the sinusoidal time embedding.
    pub time_dim: usize,
    /// Scale from the tokenizer's latents to the generator's tokens: token = latent · `vae_norm`.
    pub vae_norm: f64,
    /// Default number of steps of the flow's ODE per token (`num_sampling_steps`).
    pub steps: usize,
}

/// Sizes of the tokenizer (reference: `tokenizer/modules/diffusionmodules/model.py`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerConfig {
    /// Number of channels of an image.
    pub image_channels: usize,
    /// Number of rows of the latent grid, `R`.
    pub rows: usize,
    /// Latent width of a token, `E`.
    pub embed: usize,
    /// Number of downsamplings, counted from the image, that halve both height and width. All later ones halve only the
    /// height.
    pub len_down_scale: usize,
    /// Number of groups of every group normalization. If a group has only one channel, the channel's mean over the
    /// image is lost.
    #[serde(default = "published_groups")]
    pub groups: usize,
    /// The encoder, from the image to the latent grid.
    pub encoder: Tower,
    /// The decoder, from the latent grid to the image. Its levels are also listed from the image side.
    pub decoder: Tower,
}

/// Sizes of a convolutional encoder or decoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tower {
    /// Number of channels of the latent grid, `Z`.
    pub z_channels: usize,
    /// Number of output channels of the first convolution.
    pub conv_in: usize,
    /// Number of residual blocks per level.
    pub res_blocks: usize,
    /// Resolution levels. The first one has the resolution of the image.
    pub levels: Vec<Level>,
}

/// One resolution level of a [`Tower`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Level {
    /// Number of channels of the level.
    pub channels: usize,
    /// Whether an attention block follows each residual block.
    pub attention: bool,
}

/// Whether `name` can be the name of a class on command lines. There, ',' and ':' are separators, and numbers and
/// `none` are interpreted first.
pub fn is_class_name(name: &str) -> bool {
    let reserved = name.is_empty() || name == "none" || name.parse::<u64>().is_ok();
    !reserved && name.trim() == name && !name.contains([',', ':'])
}

impl GeneratorConfig {
    /// Width of an attention head, `hd`.
    pub fn head_dim(&self) -> usize {
        self.dim / self.heads
    }

    /// The label of unconditional generation.
    pub fn unconditional(&self) -> usize {
        self.class_num
    }

    /// The class with this number or name. `None` for `none`, which means no class.
    ///
    /// # Errors
    /// [`Error::setting`] for any other text.
    pub fn class(&self, text: &str) -> Result<Option<usize>> {
        if text == "none" {
            return Ok(None);
        }
        let mut named = self.class_names.iter().enumerate().filter(|(_, name)| *name == text).map(|(class, _)| class);
        let number = text.parse().ok().filter(|&class: &usize| class < self.class_num);
        let class = number.or_else(|| named.next());
        if let (None, Some(first), Some(second)) = (number, class, named.next()) {
            let problem = format!("is {text}, the name of both {first} and {second}: give the number");
            return Err(Error::setting("class", problem));
        }
        class.map(Some).ok_or_else(|| {
            let names = match &self.class_names[..] {
                [] => String::new(),
                [first, .., last] if self.class_names.len() > MOST_NAMES => format!(" ({first} … {last})"),
                names => format!(" ({})", names.join(", ")),
            };
            Error::setting("class", format!("is {text}, expected 0 to {}{names} or none", self.class_num - 1))
        })
    }

    /// Names the classes by the lines of a text. A byte order mark, the line ends of Windows and empty lines at the end are
    /// ignored. Names can occur more than once: these classes have to be given by their numbers.
    ///
    /// # Errors
    /// [`Error::input`] if there is not one usable name per class.
    pub fn name_classes(&mut self, text: &str) -> Result<()> {
        let text = text.trim_start_matches('\u{feff}').trim_end();
        self.check_number_of_names(text.lines().count())?;
        self.class_names = text.lines().map(|line| line.trim().to_string()).collect();
        self.check_names()
    }

    fn check_number_of_names(&self, found: usize) -> Result<()> {
        if found == self.class_num {
            return Ok(());
        }
        let problem = format!("has {found} names, expected one for each of {} classes", self.class_num);
        Err(Error::input("class_names", problem))
    }

    /// Checks the class names.
    fn check_names(&self) -> Result<()> {
        let (names, bad) = (&self.class_names, |problem| Err(Error::input("class_names", problem)));
        if !names.is_empty() {
            self.check_number_of_names(names.len())?;
        }
        if let Some(name) = names.iter().find(|name| !is_class_name(name)) {
            return bad(format!("has {name:?}, expected names without ',' and ':' other than numbers and none"));
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        self.check_names()?;
        let sizes = [
            ("class_num", self.class_num, WIDEST),
            ("buffer", self.buffer, LONGEST),
            ("embed", self.embed, WIDEST),
            ("dim", self.dim, WIDEST),
            ("depth", self.depth, DEEPEST),
            ("heads", self.heads, WIDEST),
            ("mlp_dim", self.mlp_dim, WIDEST),
            ("window", self.window, LONGEST),
            ("flow_dim", self.flow_dim, WIDEST),
            ("flow_depth", self.flow_depth, DEEPEST),
            ("time_dim", self.time_dim, WIDEST),
            ("steps", self.steps, LONGEST),
        ];
        if self.window == 0 {
            return Err(Error::input(
                "generator configuration",
                "window (cond_length) is 0, which the reference reads as full causal attention; its cache would grow \
                 with the image, so only windows of at least 1 are supported",
            ));
        }
        if let Some((name, size, most)) = sizes.iter().find(|(_, size, most)| size == &0 || size > most) {
            return Err(Error::input("generator configuration", format!("{name} is {size}, expected 1 to {most}")));
        }
        if !self.dim.is_multiple_of(self.heads) || !self.head_dim().is_multiple_of(2) {
            let problem =
                format!("heads is {}, expected to split width {} into heads of even width", self.heads, self.dim);
            return Err(Error::input("generator configuration", problem).with_field("heads"));
        }
        if !self.vae_norm.is_finite() || self.vae_norm <= 0.0 {
            return Err(Error::input(
                "generator configuration",
                format!("vae_norm is {}, expected a positive number", self.vae_norm),
            ));
        }
        if !self.time_dim.is_multiple_of(2) {
            return Err(Error::input(
                "generator configuration",
                format!("time_dim is {}, expected an even number", self.time_dim),
            ));
        }
        Ok(())
    }
}

impl TokenizerConfig {
    /// Height of an image in pixels.
    pub fn image_height(&self) -> usize {
        self.rows << (self.encoder.levels.len() - 1)
    }

    /// Width of a token in pixels.
    pub fn token_width(&self) -> usize {
        1 << self.len_down_scale.min(self.encoder.levels.len() - 1)
    }

    /// Number of pixels of the largest feature map that the decoder attends over, for an image of `tokens` columns.
    pub fn attention_cells(&self, tokens: usize) -> usize {
        let last = self.decoder.levels.len() - 1;
        let attended = self.decoder.levels.iter().position(|level| level.attention).unwrap_or(last);
        let width = self.token_width() >> attended.min(self.len_down_scale);
        (self.rows << (last - attended)) * tokens * width
    }

    /// Factors (height, width) by which the downsampling after `level` shrinks the image.
    pub fn downsampling(&self, level: usize) -> (usize, usize) {
        if level < self.len_down_scale { (2, 2) } else { (2, 1) }
    }

    fn check(&self) -> Result<()> {
        let bad = |problem: String| Err(Error::input("tokenizer configuration", problem));
        if self.groups == 0 {
            return bad("groups is 0, expected at least 1".into());
        }
        // A downsampling has to divide the channels of its level by its factor; an upsampling multiplies them.
        let sampled = self.encoder.levels.len().saturating_sub(1);
        for (index, level) in self.encoder.levels.iter().take(sampled).enumerate() {
            let (height, width) = self.downsampling(index);
            if !level.channels.is_multiple_of(height * width) {
                let (channels, factor) = (level.channels, height * width);
                return bad(format!(
                    "level {index} of the encoder has {channels} channels, which its downsampling cannot divide by {factor}"
                ));
            }
        }
        for (name, tower) in [("encoder", &self.encoder), ("decoder", &self.decoder)] {
            if tower.levels.is_empty() || tower.levels.len() > 16 {
                return bad(format!("the {name} has {} levels, expected 1 to 16", tower.levels.len()));
            }
            if !(1..=DEEPEST).contains(&tower.res_blocks) || !(1..=WIDEST).contains(&tower.z_channels) {
                return bad(format!("the {name} has an empty level or latent grid"));
            }
            let mut channels = tower.levels.iter().map(|level| level.channels).chain([tower.conv_in]);
            let fits = |channels: &usize| channels.is_multiple_of(self.groups) && (1..=WIDEST).contains(channels);
            if let Some(channels) = channels.find(|channels| !fits(channels)) {
                let groups = self.groups;
                return bad(format!("the {name} has a level of {channels} channels, expected a multiple of {groups}"));
            }
        }
        if self.encoder.levels.len() != self.decoder.levels.len() {
            return bad(format!(
                "the encoder has {} levels and the decoder {}, expected as many",
                self.encoder.levels.len(),
                self.decoder.levels.len()
            ));
        }
        if self.image_channels != 3 {
            return bad(format!("images have {} channels, expected 3", self.image_channels));
        }
        if self.rows == 0 || self.embed == 0 || self.rows > LONGEST || self.embed > WIDEST {
            return bad(format!(
                "{} rows and embed {}, expected 1 to {LONGEST} and 1 to {WIDEST}",
                self.rows, self.embed
            ));
        }
        Ok(())
    }
}

// Far larger than any real model. These limits only bound the work that a hostile configuration can request.
const WIDEST: usize = 1 << 20;
const LONGEST: usize = 1 << 16;
const DEEPEST: usize = 1 << 10;

/// Largest number of class names that an error lists.
const MOST_NAMES: usize = 12;

/// Number of groups of every group normalization of the published tokenizer.
pub const GROUPS: usize = 32;

fn published_groups() -> usize {
    GROUPS
}

impl Config {
    /// Checks that the sizes are valid and fit together, so that the interpreters need not check them.
    ///
    /// # Errors
    /// [`Error::input`] naming the first field that does not fit.
    pub fn check(&self) -> Result<()> {
        self.generator.check()?;
        self.tokenizer.check()?;
        if self.generator.embed != self.tokenizer.embed {
            return Err(Error::input(
                "configuration",
                format!(
                    "the generator's tokens have {} values and the tokenizer's {}: they are not of one model",
                    self.generator.embed, self.tokenizer.embed
                ),
            ));
        }
        Ok(())
    }

    /// The configuration without display labels such as class names. It identifies the model.
    pub fn without_labels(&self) -> Self {
        let mut config = self.clone();
        config.generator.class_names.clear();
        config
    }

    /// Whether two configurations describe the same model. Display labels such as class names are not compared.
    pub fn is_same_model(&self, other: &Self) -> bool {
        self.without_labels() == other.without_labels()
    }

    /// Width and height in pixels of an image of `tokens` columns.
    pub fn image_size(&self, tokens: usize) -> (usize, usize) {
        (tokens * self.tokenizer.token_width(), self.tokenizer.image_height())
    }
}

/// A published model size. It provides the settings that a checkpoint's tensors do not contain, and the sizes of models
/// with random weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// 21 M parameters; not published, but the reference's script has it.
    Tiny,
    /// 127 M parameters.
    Small,
    /// 296 M parameters.
    Base,
    /// 644 M parameters.
    Large,
    /// 1203 M parameters.
    Huge,
    /// The large model of the Places checkpoint, 30 classes.
    PlacesLarge,
}

impl Preset {
    /// Number of attention heads.
    pub fn heads(self) -> usize {
        match self {
            Self::Tiny => 4,
            Self::Small => 8,
            Self::Base => 12,
            Self::Large | Self::Huge | Self::PlacesLarge => 16,
        }
    }

    /// The preset for a `--model` name of the reference.
    pub fn from_reference_name(name: &str) -> Option<Self> {
        match name {
            "tiny_model" => Some(Self::Tiny),
            "small_model" => Some(Self::Small),
            "base_model" => Some(Self::Base),
            "large_model" => Some(Self::Large),
            "huge_model" => Some(Self::Huge),
            _ => None,
        }
    }

    /// The published configuration of this size (README of the reference, `configs/second_stage`).
    pub fn config(self) -> Config {
        let (dim, depth, flow_dim) = match self {
            // The width of the flow head is the default of the reference's script.
            Self::Tiny => (256, 8, 1536),
            Self::Small => (512, 16, 960),
            Self::Base => (768, 24, 1024),
            Self::Large | Self::PlacesLarge => (1024, 32, 1280),
            Self::Huge => (1280, 40, 1536),
        };
        let class_num = if self == Self::PlacesLarge { 30 } else { 1000 };
        let generator = GeneratorConfig {
            class_num,
            class_names: vec![],
            buffer: 16,
            embed: 256,
            dim,
            depth,
            heads: self.heads(),
            mlp_dim: 4 * dim,
            window: Self::WINDOW,
            flow_dim,
            flow_depth: 12,
            time_dim: 256,
            vae_norm: Self::VAE_NORM,
            steps: Self::STEPS,
        };
        Config { generator, tokenizer: Self::tokenizer() }
    }

    /// The published window of self-attention.
    pub const WINDOW: usize = 3;
    /// The published scale of latents.
    pub const VAE_NORM: f64 = 0.05493;
    /// The published number of Euler steps.
    pub const STEPS: usize = 100;

    fn tokenizer() -> TokenizerConfig {
        let levels: Vec<Level> = [1, 1, 2, 4, 4]
            .iter()
            .enumerate()
            .map(|(level, mult)| Level { channels: 128 * mult, attention: level == 4 })
            .collect();
        TokenizerConfig {
            image_channels: 3,
            rows: 16,
            embed: 256,
            len_down_scale: 4,
            groups: GROUPS,
            encoder: Tower { z_channels: 256, conv_in: 128, res_blocks: 2, levels: levels.clone() },
            decoder: Tower { z_channels: 256, conv_in: 512, res_blocks: 3, levels },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_class_names_are_checked_in_linear_time() {
        let mut config = Preset::Small.config();
        config.generator.class_num = 1 << 20;
        config.generator.class_names = (0..1 << 20).map(|class| format!("class {class}")).collect();
        config.check().unwrap();
        config.generator.class_names[7] = "class 1048575".into();
        let doubled = config.generator.class("class 1048575").unwrap_err().to_string();
        assert!(doubled.contains("the name of both 7 and 1048575: give the number"), "{doubled}");
    }

    #[test]
    fn a_downsampling_has_to_divide_the_channels_of_its_level() {
        let mut config = Preset::Small.config();
        config.tokenizer.groups = 1;
        config.tokenizer.encoder.levels[1].channels = 126;
        let odd = config.check().unwrap_err().to_string();
        let expected = "tokenizer configuration: level 1 of the encoder has 126 channels, which its downsampling cannot divide by 4";
        assert_eq!(odd, expected);
        // The last level is not sampled down.
        let mut config = Preset::Small.config();
        config.tokenizer.groups = 1;
        config.tokenizer.encoder.levels[4].channels = 126;
        config.check().unwrap();
    }
}
