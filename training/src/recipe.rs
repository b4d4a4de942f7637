//! Settings of a training run: presets, and TOML files that change them.

use std::path::Path;

use candle_core::DType;
use clap::ValueEnum;
use eqim::config::{GeneratorConfig, Level, Preset, TokenizerConfig, Tower};
use eqim::limits::{bytes, gigabytes};
use eqim::{Config, Error, Result, ResultExt, files};
use serde::{Deserialize, Serialize};
use toml::Table;

use crate::ranks::Ranks;

/// The preset that a recipe starts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Base {
    /// A small model that trains in an hour on two CPU cores.
    #[default]
    Demo,
    /// The published model with 127 M parameters.
    Small,
    /// The published model with 296 M parameters.
    Base,
    /// The published model with 644 M parameters.
    Large,
    /// The published model with 1203 M parameters.
    Huge,
}

impl Base {
    /// The published size; `None` for the demo.
    pub fn size(self) -> Option<Preset> {
        match self {
            Self::Demo => None,
            Self::Small => Some(Preset::Small),
            Self::Base => Some(Preset::Base),
            Self::Large => Some(Preset::Large),
            Self::Huge => Some(Preset::Huge),
        }
    }
}

/// Settings for the training of the tokenizer and of the generator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Settings of the tokenizer.
    pub tokenizer: TokenizerRecipe,
    /// Settings of the generator.
    pub generator: GeneratorRecipe,
}

/// Learning rate schedule after the linear warm-up (reference: `util/lr_sched.py`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// The learning rate stays constant.
    Constant,
    /// The learning rate falls to zero along half a cosine until the last step.
    Cosine,
}

/// Settings that the tokenizer and the generator have in common. Names in parentheses are from the reference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingPlan {
    /// Number of optimizer steps.
    pub steps: usize,
    /// Crops (tokenizer) or rows of tokens (generator) per step (`batch_size`).
    pub batch_size: usize,
    /// Number of passes in which the gradients of a step are computed (`accum_iter`). More passes need less memory. On a
    /// CPU the results are the same, and a pass has at least 8 rows of tokens; on a GPU sums are rounded in another order.
    pub accumulate: usize,
    /// Width of a crop in tokens (`token_num`).
    pub tokens: usize,
    /// Before cropping, pictures are scaled to between 1 and this many times the image height of the model.
    pub largest_scale: f64,
    /// Whether crops are mirrored horizontally with a probability of 0.5.
    pub flip: bool,
    /// Learning rate after warm-up for a batch of 256 (`blr`), scaled in proportion to the batch size.
    pub base_learning_rate: f64,
    /// Number of steps of the linear warm-up.
    pub warmup_steps: usize,
    /// Learning rate schedule after the warm-up.
    pub schedule: Schedule,
    /// Decay rates of the optimizer moments.
    pub betas: [f64; 2],
    /// Largest norm of the gradients (`grad_clip`); 0 turns clipping off.
    pub clip: f64,
    /// Decay rate of the moving average of the weights (`ema_rate`).
    pub ema: f64,
    /// Whether each of several ranks has the moments and averages of a part of the weights only, which needs less memory.
    pub shard_optimizer: bool,
    /// Seconds within which every rank has to answer the others.
    pub timeout: u64,
    /// Whether products with weights are computed in BF16, for GPUs. Weights and moments stay in FP32.
    pub bf16: bool,
    /// Number of photographs held out for validation.
    pub validation: usize,
    /// Random seed.
    pub seed: u64,
    /// Steps between two lines of metrics.
    pub log_every: usize,
    /// Steps between two checkpoints.
    pub checkpoint_every: usize,
    /// Steps between two sample pictures; each comes with a validation.
    pub sample_every: usize,
}

/// Settings of the training of the tokenizer (reference: `configs/first_stage/tokenizer_config.yaml`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerRecipe {
    /// Sizes of the model.
    pub model: TokenizerConfig,
    /// Common settings, such as steps, batch size and learning rate.
    pub plan: TrainingPlan,
    /// Standard deviation of the posterior (`std`).
    pub posterior_std: f64,
    /// Weight of the KL divergence of the posterior from the standard normal distribution (`kl_weight`).
    pub kl_weight: f64,
    /// Weight of the mean absolute error of the pixels (`pixelloss_weight`).
    pub pixel_weight: f64,
    /// Weight of the multi-scale structural loss, which needs no pretrained network.
    pub structure_weight: f64,
    /// Weight of the perceptual distance, used if the weights of its network are given (`perceptual_weight`).
    pub perceptual_weight: f64,
    /// Weight of the patch discriminator (`disc_weight`); 0 trains no discriminator.
    pub discriminator_weight: f64,
    /// Channels of the first layer of the discriminator (`ndf`).
    pub discriminator_channels: usize,
    /// First step with the discriminator (`disc_start`).
    pub discriminator_start: usize,
    /// Weight of the squared error of the predicted semantic features, used if the weights of their network are given
    /// (`semantic_loss_w`).
    pub semantic_weight: f64,
    /// First step with the semantic loss (`semantic_iter_start`).
    pub semantic_start: usize,
    /// Whether only the decoder is trained, starting from a given tokenizer (`stage2`).
    pub decoder_only: bool,
}

/// Settings of the training of the generator (reference: `scripts/train_generator.py`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GeneratorRecipe {
    /// Sizes of the model. The classes are taken from the photographs, the width of the latents from the tokenizer, and
    /// the scale of the latents from the encoded photographs.
    pub model: GeneratorConfig,
    /// Common settings, such as steps, batch size and learning rate.
    pub plan: TrainingPlan,
    /// Number of views of every photograph whose latents are cached.
    pub views: usize,
    /// Rank of the adapters of the attention and MLP weights of a generator that starts from a checkpoint (Hu et al.,
    /// LoRA, ICLR 2022); with 0, the weights themselves are trained.
    pub lora_rank: usize,
    /// Weight decay of all matrices outside the flow head.
    pub weight_decay: f64,
    /// Probability that a class label is dropped, for classifier-free guidance.
    pub label_drop_prob: f64,
    /// Dropout rate of the attention weights.
    pub attn_dropout: f64,
    /// Dropout rate of the projections.
    pub proj_dropout: f64,
    /// The position of the first token is drawn from 0 to this, excluded.
    pub shift_num: usize,
    /// Samples of noise and time per token.
    pub diffusion_batch_mul: usize,
    /// Images per validation whose Fréchet distance to the held-out photographs is measured, if a network for it is given.
    pub evaluation_images: usize,
}

impl TrainingPlan {
    /// Data type of products with weights.
    pub fn products(&self) -> DType {
        if self.bf16 { DType::BF16 } else { DType::F32 }
    }

    /// The learning rate of `step`, counted from 0.
    pub fn learning_rate(&self, step: usize) -> f64 {
        let peak = self.base_learning_rate * self.batch_size as f64 / 256.0;
        if step < self.warmup_steps {
            return peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        match self.schedule {
            Schedule::Constant => peak,
            Schedule::Cosine => {
                let left = self.steps.saturating_sub(self.warmup_steps).max(1);
                let done = (step - self.warmup_steps) as f64 / left as f64;
                peak * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
            }
        }
    }

    /// The settings that must be equal for a run to be resumed. The passes of a step, the work of the ranks and the
    /// intervals of metrics, checkpoints and samples may differ, and so may the number of steps if the learning rate does
    /// not depend on it.
    pub fn identity(&self) -> Self {
        let steps = if self.schedule == Schedule::Constant { 0 } else { self.steps };
        let same = Self { steps, accumulate: 1, shard_optimizer: false, timeout: 0, ..self.clone() };
        Self { log_every: 0, checkpoint_every: 0, sample_every: 0, ..same }
    }

    /// Rows of a pass on a GPU, at most `most`.
    pub(crate) fn rows(&self, most: usize) -> usize {
        self.batch_size.div_ceil(self.accumulate).min(most)
    }

    fn check(&self, part: &str) -> Result<()> {
        let bad = |name: &str, problem: String| Err(Error::input(format!("{part}.plan.{name}"), problem));
        // Crops are mirrored at their edges, so they have at least two tokens.
        let counts = [
            ("steps", self.steps, 1, MOST_STEPS),
            ("batch_size", self.batch_size, 1, MOST),
            ("accumulate", self.accumulate, 1, self.batch_size),
            ("tokens", self.tokens, 2, MOST),
            ("warmup_steps", self.warmup_steps, 0, MOST_STEPS),
            ("log_every", self.log_every, 1, usize::MAX),
            ("checkpoint_every", self.checkpoint_every, 1, usize::MAX),
            ("sample_every", self.sample_every, 1, usize::MAX),
            ("timeout", self.timeout as usize, 1, MOST_STEPS),
        ];
        for (name, count, least, most) in counts {
            in_range(&format!("{part}.plan.{name}"), count, least, most)?;
        }
        if !(1.0..=16.0).contains(&self.largest_scale) {
            return bad("largest_scale", format!("is {}, expected 1 to 16", self.largest_scale));
        }
        let rates = [("ema", self.ema), ("betas", self.betas[0]), ("betas", self.betas[1])];
        if let Some((name, rate)) = rates.iter().find(|(_, rate)| !(0.0..1.0).contains(rate)) {
            return bad(name, format!("is {rate}, expected a number from 0 to below 1"));
        }
        positive(&format!("{part}.plan.base_learning_rate"), self.base_learning_rate)?;
        not_negative(&format!("{part}.plan.clip"), self.clip)
    }
}

// Far larger than in any real training. These limits only bound the work that a recipe can request.
const MOST: usize = 1 << 16;
const MOST_STEPS: usize = i32::MAX as usize;

fn in_range(name: &str, count: usize, least: usize, most: usize) -> Result<()> {
    match (least..=most).contains(&count) {
        true => Ok(()),
        false if most == usize::MAX => Err(Error::input(name, format!("is {count}, expected at least {least}"))),
        false => Err(Error::input(name, format!("is {count}, expected {least} to {most}"))),
    }
}

/// Checks that a training fits in `most` bytes of memory: its parameters with their moments and averages, and
/// `plan.batch_size` rows with as many numbers as the product of `row`. `part` is the table of the recipe.
///
/// # Errors
/// [`Error::input`] naming the key that is too large.
pub fn check_memory(
    part: &str,
    plan: &TrainingPlan,
    parameters: &[(String, Vec<usize>)],
    row: &[usize],
    most: u64,
) -> Result<()> {
    /// Value, two moments, average.
    const COPIES: u64 = 4;
    let expected = || format!("expected at most {}, the memory of this process", gigabytes(most));
    let learned = parameters.iter().fold(0u64, |sum, (_, shape)| sum.saturating_add(bytes(shape)));
    let learned = learned.saturating_mul(COPIES);
    if let Some((name, shape)) = parameters.iter().max_by_key(|(_, shape)| bytes(shape)).filter(|_| learned > most) {
        let problem = format!(
            "its parameters with their moments and averages take {}, {}; the largest is {name} {shape:?}",
            gigabytes(learned),
            expected(),
        );
        return Err(Error::input(format!("{part}.model"), problem));
    }
    let batch = bytes(row).saturating_mul(plan.batch_size as u64);
    if batch > most {
        let problem = format!("is {}, a batch takes {}, {}", plan.batch_size, gigabytes(batch), expected());
        return Err(Error::input(format!("{part}.plan.batch_size"), problem));
    }
    Ok(())
}

/// Checks that each of the ranks has a shard of every batch, if a shard has `rows` rows.
///
/// # Errors
/// [`Error::input`] naming the size of the batch.
pub fn check_ranks(part: &str, plan: &TrainingPlan, rows: usize, ranks: &Ranks) -> Result<()> {
    let (batch, size) = (plan.batch_size, ranks.size());
    match batch.div_ceil(rows) < size {
        true => {
            let least = (size - 1) * rows + 1;
            let problem = format!("is {batch}, expected at least {least} for {size} ranks, in shards of {rows}");
            Err(Error::input(format!("{part}.plan.batch_size"), problem))
        }
        false => Ok(()),
    }
}

fn positive(name: &str, value: f64) -> Result<()> {
    let fits = value.is_finite() && value > 0.0;
    if fits { Ok(()) } else { Err(Error::input(name, format!("is {value}, expected a positive number"))) }
}

fn not_negative(name: &str, value: f64) -> Result<()> {
    let fits = value.is_finite() && value >= 0.0;
    if fits { Ok(()) } else { Err(Error::input(name, format!("is {value}, expected a number of at least 0"))) }
}

fn probability(name: &str, value: f64) -> Result<()> {
    let fits = (0.0..1.0).contains(&value);
    if fits { Ok(()) } else { Err(Error::input(name, format!("is {value}, expected a number from 0 to below 1"))) }
}

impl Recipe {
    /// The recipe of a preset. For the published sizes, it is the recipe of the reference.
    pub fn new(base: Base) -> Self {
        let Some(preset) = base.size() else {
            return demo();
        };
        let Config { generator, tokenizer } = preset.config();
        let plan = TrainingPlan {
            steps: 2_000_000,
            batch_size: 256,
            accumulate: 1,
            tokens: 16,
            largest_scale: 1.0,
            flip: true,
            base_learning_rate: 1e-4,
            warmup_steps: 500_000,
            schedule: Schedule::Constant,
            betas: [0.9, 0.95],
            clip: 3.0,
            ema: 0.9999,
            shard_optimizer: false,
            timeout: 600,
            bf16: false,
            validation: 0,
            seed: 1,
            log_every: 100,
            checkpoint_every: 5000,
            sample_every: 5000,
        };
        let tokenizer_plan = TrainingPlan {
            steps: 1_000_000,
            batch_size: 12,
            // 1.92e-4 for this batch size.
            base_learning_rate: 1.92e-4 * 256.0 / 12.0,
            warmup_steps: 3000,
            betas: [0.5, 0.9],
            clip: 0.0,
            ema: 0.99,
            ..plan.clone()
        };
        Self {
            tokenizer: TokenizerRecipe {
                model: tokenizer,
                plan: tokenizer_plan,
                posterior_std: 2.5,
                kl_weight: 0.01,
                pixel_weight: 1.0,
                structure_weight: 1.0,
                perceptual_weight: 1.0,
                discriminator_weight: 0.5,
                discriminator_channels: 64,
                discriminator_start: 5001,
                semantic_weight: 5.0,
                semantic_start: 20001,
                decoder_only: false,
            },
            generator: GeneratorRecipe {
                model: generator,
                plan,
                views: 8,
                lora_rank: 0,
                weight_decay: 0.02,
                label_drop_prob: 0.1,
                attn_dropout: 0.1,
                proj_dropout: 0.1,
                shift_num: 16,
                diffusion_batch_mul: 4,
                evaluation_images: 32,
            },
        }
    }

    /// A preset changed by a TOML file with the tables and keys of [`Recipe`].
    ///
    /// # Errors
    /// [`Error::input`] naming the file and the key that is unknown or cannot be used.
    pub fn read(base: Base, path: &Path) -> Result<Self> {
        let bad = |problem: &dyn std::fmt::Display| Error::input(path.display(), problem);
        let bytes = files::read(path)?;
        let text = std::str::from_utf8(&bytes).map_err(|error| bad(&error))?;
        let changes: Table = text.parse().map_err(|error| bad(&error))?;
        let mut table = Table::try_from(Self::new(base)).map_err(|error| bad(&error))?;
        merge(&mut table, changes);
        let recipe: Self = table.try_into().map_err(|error| bad(&error))?;
        recipe.check().map_err(|error| bad(&error))?;
        Ok(recipe)
    }

    /// Checks the ranges of the values.
    ///
    /// # Errors
    /// [`Error::input`] naming the key whose value is out of range.
    pub fn check(&self) -> Result<()> {
        let (t, g) = (&self.tokenizer, &self.generator);
        t.plan.check("tokenizer")?;
        g.plan.check("generator")?;
        positive("tokenizer.posterior_std", t.posterior_std)?;
        for (name, weight) in [
            ("kl_weight", t.kl_weight),
            ("pixel_weight", t.pixel_weight),
            ("structure_weight", t.structure_weight),
            ("perceptual_weight", t.perceptual_weight),
            ("discriminator_weight", t.discriminator_weight),
            ("semantic_weight", t.semantic_weight),
        ] {
            not_negative(&format!("tokenizer.{name}"), weight)?;
        }
        not_negative("generator.weight_decay", g.weight_decay)?;
        probability("generator.label_drop_prob", g.label_drop_prob)?;
        probability("generator.attn_dropout", g.attn_dropout)?;
        probability("generator.proj_dropout", g.proj_dropout)?;
        for (name, count) in
            [("views", g.views), ("shift_num", g.shift_num), ("diffusion_batch_mul", g.diffusion_batch_mul)]
        {
            in_range(&format!("generator.{name}"), count, 1, MOST)?;
        }
        in_range("generator.lora_rank", g.lora_rank, 0, MOST)?;
        in_range("generator.evaluation_images", g.evaluation_images, 2, MOST)?;
        in_range("tokenizer.discriminator_channels", t.discriminator_channels, 1, MOST)?;
        let generator = GeneratorConfig { embed: t.model.embed, ..g.model.clone() };
        Config { generator, tokenizer: t.model.clone() }.check()
    }

    /// The recipe as TOML, which can be edited and [read](Recipe::read).
    ///
    /// # Errors
    /// If TOML cannot represent a number.
    pub fn text(&self) -> Result<String> {
        toml::to_string(self).or_run("recipe")
    }
}

/// Overwrites the keys of `table` with `changes`, recursively in nested tables.
fn merge(table: &mut Table, changes: Table) {
    for (key, change) in changes {
        match (table.get_mut(&key), change) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(change)) => merge(inner, change),
            (_, change) => drop(table.insert(key, change)),
        }
    }
}

/// Levels with these channels, from the image to the latent grid; only the last level has attention.
fn levels(channels: &[usize]) -> Vec<Level> {
    let last = channels.len() - 1;
    channels.iter().enumerate().map(|(level, &channels)| Level { channels, attention: level == last }).collect()
}

fn demo() -> Recipe {
    let published = Recipe::new(Base::Small);
    let tokenizer = TokenizerConfig {
        image_channels: 3,
        rows: 16,
        embed: 128,
        len_down_scale: 4,
        groups: 4,
        encoder: Tower { z_channels: 16, conv_in: 16, res_blocks: 1, levels: levels(&[16, 32, 48, 64, 96]) },
        decoder: Tower { z_channels: 16, conv_in: 128, res_blocks: 1, levels: levels(&[16, 32, 64, 96, 128]) },
    };
    let generator = GeneratorConfig {
        class_num: 5,
        class_names: vec![],
        buffer: 8,
        embed: tokenizer.embed,
        dim: 144,
        depth: 4,
        heads: 6,
        mlp_dim: 576,
        flow_dim: 192,
        flow_depth: 3,
        time_dim: 128,
        ..published.generator.model.clone()
    };
    let plan = TrainingPlan {
        steps: 2800,
        batch_size: 4,
        accumulate: 1,
        tokens: 8,
        largest_scale: 1.25,
        flip: true,
        base_learning_rate: 0.03,
        warmup_steps: 50,
        schedule: Schedule::Cosine,
        betas: [0.9, 0.95],
        clip: 1.0,
        ema: 0.99,
        shard_optimizer: false,
        timeout: 600,
        bf16: false,
        validation: 2,
        seed: 1,
        log_every: 10,
        checkpoint_every: 100,
        sample_every: 300,
    };
    Recipe {
        tokenizer: TokenizerRecipe {
            model: tokenizer,
            plan: plan.clone(),
            posterior_std: 0.25,
            structure_weight: 0.2,
            discriminator_weight: 0.0,
            semantic_start: 0,
            ..published.tokenizer
        },
        generator: GeneratorRecipe {
            model: generator,
            plan: TrainingPlan {
                steps: 8000,
                batch_size: 16,
                tokens: 16,
                base_learning_rate: 0.008,
                ema: 0.999,
                ..plan
            },
            views: 24,
            lora_rank: 0,
            attn_dropout: 0.0,
            proj_dropout: 0.0,
            shift_num: 256,
            ..published.generator
        },
    }
}
