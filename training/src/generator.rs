//! Training of the generator (reference: `generator/equ_modeling.py`, `engine_generator.py`, `diffusion/flows.py`).

use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

use candle_core::{DType, Device, Tensor};
use eqim::checkpoint::tensors::TensorFile;
use eqim::checkpoint::{self, CLASS_TABLE, StoredConfig, adapter};
use eqim::config::{GeneratorConfig, TokenizerConfig, is_class_name};
use eqim::engine::Engine;
use eqim::engine::candle::CandleEngine;
use eqim::generate::generate;
use eqim::model::{Stage, flow, parameters_of, transformer};
use eqim::ops::eager::{Dropout, Eager, Training};
use eqim::request::{GuidanceSchedule, Noise, Request};
use eqim::weights::Weights;
use eqim::{Config, Error, Result, ResultExt};
use ndarray::{Array3, Axis, concatenate};
use rand::{Rng, RngCore};
use rand_mt::Mt;

use crate::adamw::Update;
use crate::data::{Crops, Order};
use crate::evaluation::Evaluation;
use crate::initial::{self, normal};
use crate::latents::{Encoder, Latents};
use crate::learner::{Learner, Losses, Measures};
use crate::photos::Photos;
use crate::random::{Purpose, randomness};
use crate::ranks::Ranks;
use crate::recipe::{self, GeneratorRecipe, TrainingPlan};
use crate::run::Task;
use crate::start::Start;

/// The generator being trained.
pub struct GeneratorTask {
    recipe: GeneratorRecipe,
    learner: Learner,
    encoder: Encoder,
    /// The [identity](Start::identity) of the checkpoint from which the training started; empty without one. Its weights are
    /// not kept.
    start: String,
    evaluation: Option<Evaluation>,
    posterior_std: f64,
    device: Device,
    /// Weights that are not trained.
    frozen: Weights,
    /// Names of the frozen weights with adapters.
    adapted: Vec<String>,
    classes: Vec<String>,
    fingerprint: String,
    training: Latents,
    held_out: Latents,
    /// The held-out photographs, for the evaluation.
    held_out_photos: Photos,
    /// Order of the photographs of `training`.
    order: Order,
    ranks: Rc<Ranks>,
}

/// The trained networks of a training.
pub struct Networks {
    /// The tokenizer, which encodes the photographs.
    pub encoder: Encoder,
    /// The generator from which the training starts; without it, the weights are random at first.
    pub start: Option<Start>,
    /// Network of the Fréchet distance of generated images.
    pub evaluation: Option<Evaluation>,
}

/// All inputs of the loss of a step, except the weights.
pub struct StepInputs {
    /// Tokens of the photographs, `[batch, tokens, E]`.
    pub tokens: Tensor,
    /// Class labels, `[batch]`; a dropped label is `class_num`.
    pub labels: Tensor,
    /// Position of the first token.
    pub shift: usize,
    /// Noise, `[copies, batch, tokens, E]`; every copy of a token has its own noise.
    pub noise: Tensor,
    /// Times in 0..1, `[copies, batch, tokens]`.
    pub times: Tensor,
    /// Dropout and data type of products in training; `None` in validation.
    pub training: Option<Training>,
}

// Rows per shard of a batch. The numbers are fixed, so that sums do not depend on the number of cores. On a GPU each
// shard is one pass, and must fit in the memory.
const CPU_SHARD: usize = 8;
const GPU_SHARD: usize = 64;
// Euler steps and guidance scale of the sample pictures.
const PREVIEW_STEPS: usize = 25;
const PREVIEW_CFG: f32 = 2.0;
// Images that are generated at a time for the evaluation.
const EVALUATION_BATCH: usize = 8;
// Number of batches over which the validation loss is averaged.
const VALIDATION_BATCHES: usize = 4;

/// Flow matching loss, a scalar: the mean squared error of the predicted velocity at `z_t = t·noise + (1-t)·token`,
/// where the true velocity is `noise - token` (reference: `diffusion/flows.py`, `RectifiedFlow.get_train_tuple`).
///
/// # Errors
/// If the shapes do not match.
pub fn loss(config: &GeneratorConfig, weights: &Weights, inputs: &StepInputs) -> Result<Tensor> {
    let (batch, n, embed) = inputs.tokens.dims3()?;
    let copies = inputs.noise.dim(0)?;
    let rows = copies * batch * n;
    let mut o = match &inputs.training {
        Some(training) => Eager::training(weights, training.clone()),
        None => Eager::new(weights),
    };
    let tokens = inputs.tokens.reshape((batch * n, embed))?;
    let z = transformer::teacher_forced(&mut o, config, &inputs.labels, &tokens, n, inputs.shift)?;
    let z = z.repeat((copies, 1))?;
    let token = tokens.repeat((copies, 1))?;
    let noise = inputs.noise.reshape((rows, embed))?;
    let t = inputs.times.reshape((rows, 1))?;
    let velocity = (&noise - &token)?;
    let at = (&token + velocity.broadcast_mul(&t)?)?;
    let found = flow::velocity(&mut o, config, &at, &t.flatten_all()?, &z)?;
    Ok((found - velocity)?.sqr()?.mean_all()?)
}

/// Whether AdamW's weight decay applies to a parameter (reference: `util/misc.py`, `add_weight_decay`). It does not
/// apply to biases, other vectors, and the parameters of the flow head.
pub fn decays(name: &str, axes: usize) -> bool {
    axes > 1 && !name.starts_with("diffloss.")
}

/// Checks that a training with the tokenizer `encoder` fits in `most` bytes of memory.
///
/// # Errors
/// Those of [`recipe::check_memory`].
pub fn check_memory(recipe: &GeneratorRecipe, encoder: &TokenizerConfig, most: u64) -> Result<()> {
    let GeneratorRecipe { model, plan, diffusion_batch_mul: copies, .. } = recipe;
    let generator = GeneratorConfig { embed: encoder.embed, ..model.clone() };
    let config = Config { generator, tokenizer: encoder.clone() };
    config.check()?;
    // Tokens and posteriors; the noise of every copy.
    let row = [plan.tokens, encoder.embed, copies.saturating_add(2)];
    recipe::check_memory("generator", plan, &parameters_of(&config, &STAGES)?, &row, most)
}

/// Stages whose weights are trained.
const STAGES: [Stage; 3] = [Stage::Prefill, Stage::Step, Stage::Flow];

/// The first values of a training.
#[derive(Default)]
struct Beginning {
    /// What is trained: weights, or matrices of adapters.
    learned: Vec<(String, Tensor)>,
    /// Weights that are not trained.
    frozen: Weights,
    /// Names of the weights with adapters.
    adapted: Vec<String>,
}

/// Whether a weight can have an adapter: the products of attention and of the MLPs of the transformer.
fn is_adaptable(name: &str, shape: &[usize]) -> bool {
    let part = [".attn.", ".attn2.", ".mlp."].iter().any(|part| name.contains(part));
    shape.len() == 2 && name.starts_with("encoder_blocks.") && part
}

impl Beginning {
    fn new(config: &Config, start: Option<&Start>, classes: &[String], recipe: &GeneratorRecipe) -> Result<Self> {
        let (parameters, seed) = (parameters_of(config, &STAGES)?, recipe.plan.seed);
        let Some(start) = start else {
            return match recipe.lora_rank {
                0 => Ok(Self { learned: initial::generator_weights(&parameters, seed)?, ..Self::default() }),
                _ => Err(Error::input("generator.lora_rank", "requires a generator to start from: set --from")),
            };
        };
        let (given, mut beginning, mut adapted) = (start.weights(classes)?, Self::default(), vec![]);
        for (name, shape) in parameters {
            let value = given.get(&name, &shape)?;
            let (trained, with_adapters) = (start.is_trained(&name), recipe.lora_rank > 0);
            // The table of the classes is new. It is small, and trained as a whole.
            match trained && (!with_adapters || name == CLASS_TABLE) {
                true => beginning.learned.push((name, value)),
                false => {
                    beginning.frozen.insert(name.clone(), &value)?;
                    if trained && is_adaptable(&name, &shape) {
                        adapted.push((name, shape));
                    }
                }
            }
        }
        beginning.learned.extend(initial::adapters(&adapted, recipe.lora_rank, seed)?);
        beginning.adapted = adapted.into_iter().map(|(name, _)| name).collect();
        match beginning.learned.is_empty() {
            true => Err(Error::setting("freeze", "matches all weights, expected some to train")),
            false => Ok(beginning),
        }
    }
}

impl GeneratorTask {
    /// A generator with random weights, or with those of a checkpoint. The latents of the photographs are computed first
    /// and stored in `cache`. All `ranks` are created in the same way.
    ///
    /// # Errors
    /// [`eqim::Error::input`] if the photographs, the recipe or the checkpoint do not fit the tokenizer, or if a batch has
    /// fewer shards than there are ranks.
    pub fn new(
        mut recipe: GeneratorRecipe,
        posterior_std: f64,
        photos: Photos,
        networks: Networks,
        cache: &Path,
        device: Device,
        ranks: Rc<Ranks>,
    ) -> Result<Self> {
        let Networks { encoder, start, evaluation } = networks;
        let plan = &recipe.plan;
        let classes = photos.classes.clone();
        let given = start.as_ref().map(|start| start.config(&classes, encoder.config.embed)).transpose()?;
        let (training, held_out) = photos.split(plan.validation, plan.seed)?;
        let fingerprint = training.fingerprint();
        let crops = Crops {
            height: encoder.config.image_height(),
            width: plan.tokens * encoder.config.token_width(),
            largest_scale: plan.largest_scale,
            flip: plan.flip,
        };
        let placed = Encoder { weights: encoder.weights.to_device(&device)?, ..encoder.clone() };
        recipe::check_ranks("generator", plan, rows_of_a_shard(plan, device.is_cpu()), &ranks)?;
        let open = |photos: &Photos| Latents::open(cache, &placed, photos, crops, recipe.views, plan.seed, &ranks);
        let held_out_photos = held_out;
        let (training, held_out) = (open(&training)?, open(&held_out_photos)?);
        let order = Order::new(plan.seed, training.len());
        recipe.model = given.unwrap_or_else(|| GeneratorConfig {
            class_num: classes.len(),
            embed: encoder.config.embed,
            vae_norm: 1.0 / training.deviation(posterior_std),
            ..recipe.model
        });
        // If one folder name is not valid as a class name, no class has a name, only a number.
        let named = classes.iter().all(|name| is_class_name(name));
        recipe.model.class_names = if named { classes.clone() } else { vec![] };

        let config = Config { generator: recipe.model.clone(), tokenizer: encoder.config.clone() };
        config.check()?;
        let Beginning { learned, frozen, adapted } = Beginning::new(&config, start.as_ref(), &classes, &recipe)?;
        let sharded = recipe.plan.shard_optimizer;
        let learner = Learner::new("generator", learned, &device, ranks.clone(), sharded)?;
        let frozen = frozen.to_device(&device)?;
        Ok(Self {
            recipe,
            learner,
            encoder,
            start: start.as_ref().map_or(String::new(), Start::identity),
            evaluation,
            posterior_std,
            device,
            frozen,
            adapted,
            classes,
            fingerprint,
            training,
            held_out,
            held_out_photos,
            order,
            ranks,
        })
    }

    /// The weights of the current step.
    fn weights(&self) -> Result<Weights> {
        self.whole(self.learner.weights()?)
    }

    /// The averaged weights.
    fn averaged(&self) -> Result<Weights> {
        self.whole(self.learner.average()?)
    }

    /// All weights of the generator, with what was learned.
    fn whole(&self, learned: Weights) -> Result<Weights> {
        let mut weights = self.frozen.clone();
        for (name, tensor) in learned.iter() {
            weights.insert(name.to_string(), tensor)?;
        }
        for name in &self.adapted {
            let [a, b] = adapter::names(name);
            let merged = adapter::merged(self.frozen.find(name)?, learned.find(&a)?, learned.find(&b)?, 1.0)?;
            weights.insert(name.clone(), &merged)?;
        }
        Ok(weights)
    }

    /// The Fréchet distance of generated images, which have the classes in turn, to the held-out photographs.
    fn distance(&self, evaluation: &Evaluation) -> Result<f64> {
        let (engine, model) = (self.engine()?, &self.encoder.config);
        let (height, width) = (model.image_height(), model.token_width());
        let count = self.recipe.evaluation_images;
        let mut images = vec![];
        for first in (0..count).step_by(EVALUATION_BATCH) {
            let classes = (first..count.min(first + EVALUATION_BATCH)).map(|image| Some(image % self.classes.len()));
            let seed = self.recipe.plan.seed.wrapping_add(first as u64);
            let request = Request {
                steps: PREVIEW_STEPS,
                noise: Noise::Seed(seed),
                ..Request::new(engine.config(), classes, height.div_ceil(width))
            };
            let tokens = generate(&engine, &request, |_| {})?.tokens;
            images.push(engine.decode_tokens(tokens.view())?);
        }
        let photos = &self.held_out_photos;
        let real = photos.photos.iter().map(|photo| photos.whole(photo, height, width));
        let real: Vec<Array3<f32>> = real.filter_map(Result::transpose).collect::<Result<_>>()?;
        let images: Vec<_> = images.iter().flat_map(|batch| batch.axis_iter(Axis(0))).collect();
        evaluation.distance(&images, &real.iter().map(|image| image.view()).collect::<Vec<_>>())
    }

    /// Names of the classes.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The inputs of a whole batch of validation.
    fn validation(&self, latents: &Latents, step: usize) -> Result<StepInputs> {
        let TrainingPlan { seed, batch_size, .. } = self.recipe.plan;
        let photos = Order::new(seed, latents.len()).batch(batch_size, step);
        self.draw(latents, &photos, step, 0..batch_size, false)
    }

    /// Draws the inputs of these rows of the batch of a step, which has these `photos`.
    fn draw(
        &self,
        latents: &Latents,
        photos: &[usize],
        step: usize,
        rows: Range<usize>,
        training: bool,
    ) -> Result<StepInputs> {
        let GeneratorRecipe { model, plan, .. } = &self.recipe;
        let (count, n, embed, copies) = (rows.len(), plan.tokens, model.embed, self.recipe.diffusion_batch_mul);
        let of = |purpose, row: usize| randomness(plan.seed, purpose, step * plan.batch_size + row);
        let (mut tokens, mut classes, mut spread) = (vec![], vec![], vec![]);
        let (mut noise, mut times) = (vec![], vec![]);
        for row in rows.clone() {
            tokens.push(latents.draw(photos[row], n, &mut of(Purpose::Crop, row))?);
            let dropped = training && of(Purpose::Labels, row).random_bool(self.recipe.label_drop_prob);
            classes.push(if dropped { model.unconditional() } else { latents.class(photos[row]) } as i64);
            spread.extend(normal(&mut of(Purpose::Posterior, row), n * embed));
            let mut flow = of(Purpose::Flow, row);
            noise.extend(normal(&mut flow, copies * n * embed));
            times.extend((0..copies * n).map(|_| time(flow.random_range(0.0..1.0))));
        }
        let spread = Tensor::from_vec(spread, (count, n, embed), &Device::Cpu)?;
        let tokens = ((Tensor::stack(&tokens, 0)? + (spread * self.posterior_std)?)? * model.vae_norm)?;
        let mut place = randomness(plan.seed, Purpose::Shift, step);
        let shift = if training { place.random_range(0..self.recipe.shift_num) } else { 0 };
        let forgotten = Dropout {
            attention: self.recipe.attn_dropout,
            projection: self.recipe.proj_dropout,
            random: Mt::new(of(Purpose::Dropout, rows.start).next_u32()),
        };
        let training = training.then(|| Training { dropout: Some(forgotten), products: plan.products() });
        let device = &self.device;
        let noise = Tensor::from_vec(noise, (count, copies, n, embed), device)?;
        let times = Tensor::from_vec(times, (count, copies, n), device)?;
        Ok(StepInputs {
            tokens: tokens.to_device(device)?,
            labels: Tensor::from_vec(classes, count, device)?,
            shift,
            noise: noise.transpose(0, 1)?.contiguous()?,
            times: times.transpose(0, 1)?.contiguous()?,
            training,
        })
    }

    /// The inputs of this rank's shards of a step, with their fractions of the batch.
    fn shards(&mut self, step: usize) -> Result<Vec<(f64, StepInputs)>> {
        let plan = &self.recipe.plan;
        let (batch, most) = (plan.batch_size, rows_of_a_shard(plan, self.learner.is_on_cpu()));
        let photos = self.order.batch(batch, step);
        let shard = |shard: usize| {
            let rows = shard * most..batch.min((shard + 1) * most);
            Ok((rows.len() as f64 / batch as f64, self.draw(&self.training, &photos, step, rows, true)?))
        };
        self.ranks.share(batch.div_ceil(most)).map(shard).collect()
    }

    /// The loss without gradients.
    ///
    /// # Errors
    /// [`Error::run`] if it is not finite.
    fn loss_of(&self, weights: &Weights, inputs: &StepInputs) -> Result<f64> {
        let loss = loss(&self.recipe.model, weights, inputs)?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
        match loss.is_finite() {
            true => Ok(loss.into()),
            false => Err(Error::run("loss", format!("is {loss}, not finite: lower base_learning_rate, or set clip"))),
        }
    }

    /// An engine with the averaged weights of the generator and with the tokenizer.
    fn engine(&self) -> Result<CandleEngine> {
        let mut weights = self.encoder.weights.clone();
        for (name, tensor) in self.averaged()?.to_device(&Device::Cpu)?.iter() {
            weights.insert(name.to_string(), tensor)?;
        }
        let config = Config { generator: self.recipe.model.clone(), tokenizer: self.encoder.config.clone() };
        Ok(CandleEngine::new(config, weights))
    }
}

/// Maps a uniform random number to a time in (0, 1] (reference: `RectifiedFlow.get_train_tuple`).
pub fn time(uniform: f32) -> f32 {
    const LEAST: f32 = 1e-5;
    uniform * (1.0 - LEAST) + LEAST
}

/// Rows of a shard of a batch.
fn rows_of_a_shard(plan: &TrainingPlan, is_on_cpu: bool) -> usize {
    if is_on_cpu { CPU_SHARD } else { plan.rows(GPU_SHARD) }
}

impl Task for GeneratorTask {
    fn kind(&self) -> &'static str {
        if self.adapted.is_empty() { "generator" } else { "adapter" }
    }

    fn plan(&self) -> &TrainingPlan {
        &self.recipe.plan
    }

    fn identity(&self) -> Result<String> {
        let (recipe, plan) = (self.recipe.clone(), self.recipe.plan.identity());
        let recipe = GeneratorRecipe { plan, evaluation_images: 0, ..recipe };
        let recipe = toml::to_string(&recipe).or_run("recipe")?;
        let (tokenizer, photographs) = (&self.encoder.hash, &self.fingerprint);
        Ok(format!("{recipe}tokenizer = {tokenizer}\nphotographs = {photographs}\n{}", self.start))
    }

    fn step(&mut self, step: usize) -> Result<Measures> {
        let shards = self.shards(step)?;
        let plan = &self.recipe.plan;
        let weights = self.weights()?;
        let model = &self.recipe.model;
        let (gradients, mut measures) = self.learner.differentiate(&shards, plan.accumulate, |inputs| {
            let total = loss(model, &weights, inputs)?;
            Ok(Losses { total: total.clone(), parts: vec![("loss", total)] })
        })?;
        let update = Update {
            learning_rate: plan.learning_rate(step),
            betas: plan.betas,
            weight_decay: self.recipe.weight_decay,
            decays: &decays,
            clip: (plan.clip > 0.0).then_some(plan.clip),
            average: plan.ema,
        };
        let norm = self.learner.update(&gradients, &update)?;
        measures.insert("gradient_norm".into(), norm);
        Ok(measures)
    }

    fn validate(&self) -> Result<Measures> {
        if self.held_out.is_empty() {
            return Ok(Measures::new());
        }
        let weights = self.averaged()?;
        let mut sum = 0.0;
        for batch in 0..VALIDATION_BATCHES {
            sum += self.loss_of(&weights, &self.validation(&self.held_out, batch)?)?;
        }
        let mut measures = Measures::from([("loss".into(), sum / VALIDATION_BATCHES as f64)]);
        if let Some(evaluation) = &self.evaluation {
            measures.insert("frechet_distance".into(), self.distance(evaluation)?);
        }
        Ok(measures)
    }

    fn check(&self) -> Result<()> {
        self.learner.check()?;
        let latents = if self.held_out.is_empty() { &self.training } else { &self.held_out };
        let inputs = self.validation(latents, 0)?;
        for weights in [self.weights()?, self.averaged()?] {
            self.loss_of(&weights, &inputs)?;
        }
        Ok(())
    }

    fn picture(&self) -> Result<Array3<f32>> {
        let engine = self.engine()?;
        let classes = (0..self.classes.len().min(5)).map(Some);
        let request = Request {
            cfg: PREVIEW_CFG,
            cfg_schedule: GuidanceSchedule::Constant,
            steps: PREVIEW_STEPS,
            noise: Noise::Seed(self.recipe.plan.seed),
            ..Request::new(engine.config(), classes, 2 * self.recipe.plan.tokens)
        };
        let tokens = generate(&engine, &request, |_| {})?.tokens;
        let images = engine.decode_tokens(tokens.view())?;
        let rows: Vec<_> = images.axis_iter(Axis(0)).collect();
        concatenate(Axis(1), &rows).or_run("samples")
    }

    fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    fn fingerprint(&self) -> Result<String> {
        self.learner.fingerprint()
    }

    fn collect(&mut self) -> Result<()> {
        self.learner.collect()
    }

    fn release(&mut self) {
        self.learner.release();
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        self.learner.state()
    }

    fn restore(&mut self, file: &mut TensorFile, steps: usize) -> Result<()> {
        self.learner.restore(file, steps)
    }

    fn write_model(&self, path: &Path) -> Result<()> {
        let model = &self.recipe.model;
        let is_adapter = !self.adapted.is_empty();
        let weights = if is_adapter { self.learner.average()? } else { self.averaged()? }.to_device(&Device::Cpu)?;
        let stored: Vec<(&str, Tensor)> = weights.iter().map(|(name, tensor)| (name, tensor.clone())).collect();
        match is_adapter {
            true => adapter::write(path, model, (&self.frozen, &self.adapted), &stored),
            false => {
                checkpoint::write(path, &StoredConfig { generator: Some(model.clone()), tokenizer: None }, &stored)
            }
        }
    }
}
