//! Training of the tokenizer (reference: `tokenizer/models/tokenizer.py` and
//! `tokenizer/modules/losses/contperceptual.py`).

use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

use candle_core::{Device, Tensor, Var};
use eqim::checkpoint::tensors::TensorFile;
use eqim::checkpoint::{self, StoredConfig};
use eqim::config::{GeneratorConfig, Preset, TokenizerConfig};
use eqim::digest::Hash;
use eqim::engine::candle;
use eqim::model::tokenizer::{self, Semantics};
use eqim::model::{Stage, parameters_of};
use eqim::ops::cost::Cost;
use eqim::ops::eager::{Eager, Training};
use eqim::picture::quality::psnr_of_values;
use eqim::weights::Weights;
use eqim::{Config, Error, Result, ResultExt};
use ndarray::{Array3, Array4, ArrayView3, ArrayView4, Axis, concatenate, s};

use crate::adamw::Update;
use crate::data::{Ahead, Batches, Crops};
use crate::discriminator;
use crate::evaluation::Evaluation;
use crate::initial;
use crate::learner::{Learner, Losses, Measures};
use crate::perceptual::Perceptual;
use crate::photos::{LOOKED_AT, Photo, Photos};
use crate::random::{Purpose, randomness};
use crate::ranks::Ranks;
use crate::recipe::{self, TokenizerRecipe, TrainingPlan};
use crate::run::Task;
use crate::semantic::Semantic;
use crate::structure::structure;

/// The tokenizer being trained.
pub struct TokenizerTask {
    recipe: TokenizerRecipe,
    learner: Learner,
    discriminator: Option<Learner>,
    networks: Networks,
    device: Device,
    /// Weights that are not trained.
    frozen: Weights,
    training: Photos,
    held_out: Photos,
    batches: Option<Ahead>,
    ranks: Rc<Ranks>,
}

/// Pretrained networks; all are optional.
#[derive(Debug, Default)]
pub struct Networks {
    /// Network of the perceptual loss.
    pub perceptual: Option<Perceptual>,
    /// Network of the semantic loss.
    pub semantic: Option<Semantic>,
    /// Network of the Fréchet distance of the reconstructions.
    pub evaluation: Option<Evaluation>,
}

// Values of the first feature maps of a shard on a GPU, where a shard is one pass. The published tokenizer takes 1 image
// per pass, the demo's 16. On a CPU every image is a shard, and the shards run in parallel.
const GPU_SHARD: usize = 1 << 23;
// As in the published configuration.
const SEMANTIC_LEVELS: usize = 2;
const SEMANTIC_BLOCKS: usize = 2;
const SEMANTIC: &str = "semantic_decoder.";

/// Sizes of the semantic decoder, which predicts features of this width.
fn semantics(width: usize) -> Semantics {
    Semantics { levels: SEMANTIC_LEVELS, channels: width, res_blocks: SEMANTIC_BLOCKS, features: width }
}

/// Names and shapes of the weights of the semantic decoder for features of this width.
fn semantic_parameters(model: &TokenizerConfig, width: usize) -> Result<Vec<(String, Vec<usize>)>> {
    if !width.is_multiple_of(model.groups) {
        let problem = format!("has features of width {width}, expected a multiple of the {} groups", model.groups);
        return Err(Error::setting("semantic", problem));
    }
    let mut cost = Cost::default();
    let channels = model.decoder.levels.last().map_or(model.decoder.conv_in, |level| level.channels);
    tokenizer::semantics(&mut cost, model, semantics(width), &vec![1, channels, model.rows, 2])?;
    Ok(cost.into_parameters())
}

/// Checks that a training fits in `most` bytes of memory.
///
/// # Errors
/// Those of [`recipe::check_memory`].
pub fn check_memory(recipe: &TokenizerRecipe, most: u64) -> Result<()> {
    /// Batches in memory: in the queue, being made and in use.
    const BATCHES: usize = 4;
    let TokenizerRecipe { model, plan, .. } = recipe;
    let row = [BATCHES, model.image_channels, model.image_height(), model.token_width(), plan.tokens];
    recipe::check_memory("tokenizer", plan, &parameters_of(&whole(model), &STAGES)?, &row, most)
}

/// Stages whose weights are trained.
const STAGES: [Stage; 2] = [Stage::Encoder, Stage::Decoder];

// Prefixes of the weights that are frozen if only the decoder is trained.
const ENCODER: [&str; 2] = ["encoder.", "quant_layer."];

impl TokenizerTask {
    /// A tokenizer that starts from the weights `initial`, or from random weights. All `ranks` are created in the same way.
    ///
    /// # Errors
    /// [`Error::input`] if the recipe requires initial weights that are not given, or holds out all photographs, or if a
    /// batch has fewer shards than there are ranks.
    pub fn new(
        recipe: TokenizerRecipe,
        photos: Photos,
        initial: Option<Weights>,
        networks: Networks,
        device: Device,
        ranks: Rc<Ranks>,
    ) -> Result<Self> {
        let rows = rows_of_a_shard(&recipe, device.is_cpu());
        recipe::check_ranks("tokenizer", &recipe.plan, rows, &ranks)?;
        let (training, held_out) = photos.split(recipe.plan.validation, recipe.plan.seed)?;
        let parameters = parameters_of(&whole(&recipe.model), &STAGES)?;
        let mut values = match &initial {
            None if recipe.decoder_only => {
                return Err(Error::input("decoder_only", "requires a tokenizer to start from: set --from"));
            }
            None => initial::tokenizer_weights(&parameters, recipe.plan.seed)?,
            Some(weights) => {
                let value = |(name, shape): &(String, Vec<usize>)| Ok((name.clone(), weights.get(name, shape)?));
                parameters.iter().map(value).collect::<Result<_>>()?
            }
        };
        if let Some(network) = &networks.semantic {
            let parameters = semantic_parameters(&recipe.model, network.width())?;
            values.extend(initial::tokenizer_weights(&parameters, recipe.plan.seed)?);
        }
        let stays = |name: &str| recipe.decoder_only && ENCODER.iter().any(|part| name.starts_with(part));
        let (kept, learned): (Vec<_>, Vec<_>) = values.into_iter().partition(|(name, _)| stays(name));
        let mut frozen = Weights::default();
        for (name, tensor) in kept {
            frozen.insert(name, &tensor.to_device(&device)?)?;
        }
        let learner = |name, values| Learner::new(name, values, &device, ranks.clone(), recipe.plan.shard_optimizer);
        let discriminator = match recipe.discriminator_weight > 0.0 {
            true => {
                let random = &mut randomness(recipe.plan.seed, Purpose::Initial, 2);
                Some(learner("discriminator", discriminator::initial(recipe.discriminator_channels, random)?)?)
            }
            false => None,
        };
        let learner = learner("tokenizer", learned)?;
        Ok(Self { recipe, learner, discriminator, networks, device, frozen, training, held_out, batches: None, ranks })
    }

    fn crops(&self) -> Crops {
        let (plan, model) = (&self.recipe.plan, &self.recipe.model);
        Crops {
            height: model.image_height(),
            width: plan.tokens * model.token_width(),
            largest_scale: plan.largest_scale,
            flip: plan.flip,
        }
    }

    /// Rows of a shard, and this rank's shards of a batch.
    fn shares(&self) -> (usize, Range<usize>) {
        let rows = rows_of_a_shard(&self.recipe, self.learner.is_on_cpu());
        (rows, self.ranks.share(self.recipe.plan.batch_size.div_ceil(rows)))
    }

    /// Prepares this rank's rows of the batches of `steps`.
    fn prepare(&self, steps: Range<usize>) -> Result<Ahead> {
        let plan = &self.recipe.plan;
        let (rows, shards) = self.shares();
        let rows = shards.start * rows..plan.batch_size.min(shards.end * rows);
        let batches = Batches { size: plan.batch_size, seed: plan.seed, rows };
        Ahead::start(self.training.clone(), self.crops(), batches, steps)
    }

    /// The averaged weights and the frozen weights.
    fn averaged(&self) -> Result<Weights> {
        let mut weights = self.learner.average()?;
        add(&mut weights, &self.frozen)?;
        Ok(weights)
    }

    /// Encodes and decodes a picture `[3, height, width]` with `weights`.
    fn reconstruct(&self, weights: &Weights, picture: ArrayView3<f32>) -> Result<Array3<f32>> {
        let o = &mut Eager::new(weights);
        let image = candle::to_tensor(picture.insert_axis(Axis(0)))?.to_device(&self.device)?;
        let latent = tokenizer::encode(o, &self.recipe.model, &image)?;
        let image: Array4<f32> = candle::to_array(&tokenizer::decode(o, &self.recipe.model, &latent)?)?;
        Ok(image.index_axis_move(Axis(0), 0))
    }

    /// Like [`TokenizerTask::reconstruct`], for the photograph at `path`.
    ///
    /// # Errors
    /// [`Error::run`] if a pixel is not finite.
    fn finite_reconstruction(&self, weights: &Weights, path: &Path, picture: ArrayView3<f32>) -> Result<Array3<f32>> {
        let reconstruction = self.reconstruct(weights, picture)?;
        match reconstruction.iter().all(|value| value.is_finite()) {
            true => Ok(reconstruction),
            false => {
                let problem =
                    "its reconstruction has a pixel that is not finite: lower base_learning_rate, or set clip";
                Err(Error::run(path.display(), problem))
            }
        }
    }

    /// A whole photograph, scaled to the image height of the model, `[3, height, width]`; `None` if it cannot be used.
    fn whole_picture(&self, photo: &Photo) -> Result<Option<Array3<f32>>> {
        let model = &self.recipe.model;
        self.training.whole(photo, model.image_height(), model.token_width())
    }

    /// The first photographs that can be used, at most `most`: held-out ones first. With their pixels.
    fn first(&self, most: usize) -> Result<Vec<(&Photo, Array3<f32>)>> {
        let photos = self.held_out.photos.iter().chain(self.training.photos.iter());
        let pictures = photos.map(|photo| Ok(self.whole_picture(photo)?.map(|picture| (photo, picture))));
        pictures.filter_map(Result::transpose).take(most).collect()
    }

    /// Peak signal-to-noise ratio in dB of the reconstruction of each photograph with the averaged weights, by file. It
    /// covers all pixels of the photograph at the image height of the model. Of more than [`LOOKED_AT`] photographs, these are
    /// the first.
    ///
    /// # Errors
    /// If a photograph can no longer be read.
    pub fn psnr(&self, photos: &Photos) -> Result<Vec<(String, f64)>> {
        let weights = self.averaged()?;
        let of = |photo: &Photo| {
            let pair = self.pair(&weights, photo)?;
            let psnr = pair.map(|(picture, made)| psnr_of_values(made.view(), picture.view()));
            Ok(psnr.map(|psnr| (photo.path.display().to_string(), psnr)))
        };
        photos.photos.iter().take(LOOKED_AT).map(of).filter_map(Result::transpose).collect()
    }

    /// A photograph and its reconstruction with `weights`, both `[3, height, width]` in -1..1; `None` if it cannot be used.
    fn pair(&self, weights: &Weights, photo: &Photo) -> Result<Option<(Array3<f32>, Array3<f32>)>> {
        let Some(picture) = self.whole_picture(photo)? else { return Ok(None) };
        let reconstruction = self.finite_reconstruction(weights, &photo.path, picture.view())?;
        Ok(Some((picture, reconstruction.mapv(|value| value.clamp(-1.0, 1.0)))))
    }

    /// The training photographs and the held-out photographs.
    pub fn photos(&self) -> (&Photos, &Photos) {
        (&self.training, &self.held_out)
    }
}

/// Rows of a shard of a batch.
fn rows_of_a_shard(recipe: &TokenizerRecipe, is_on_cpu: bool) -> usize {
    let TokenizerRecipe { model, plan, .. } = recipe;
    let values = model.image_height() * plan.tokens * model.token_width() * model.encoder.conv_in;
    if is_on_cpu { 1 } else { plan.rows((GPU_SHARD / values).max(1)) }
}

/// Inputs of one shard of a batch.
struct Shard {
    /// Images, `[rows, 3, height, width]`.
    image: Tensor,
    /// Noise of the posterior samples, `[rows, tokens, E]`.
    noise: Tensor,
}

/// The losses of a reconstruction.
struct Objective<'a> {
    recipe: &'a TokenizerRecipe,
    perceptual: Option<&'a Perceptual>,
    /// From the first step with the semantic loss.
    semantic: Option<&'a Semantic>,
    /// Weights of the discriminator, from the first step with the discriminator.
    discriminator: Option<Weights>,
}

// As in `calculate_adaptive_weight` of the reference.
const ADAPTIVE_EPS: f64 = 1e-4;
const ADAPTIVE_MOST: f64 = 1e4;

impl Objective<'_> {
    /// The means of the posteriors `[rows, tokens, E]`, the reconstructions of a sample, and the intermediate features of the
    /// decoder.
    fn reconstruct(&self, weights: &Weights, shard: &Shard) -> Result<(Tensor, Tensor, Tensor)> {
        let o = &mut self.interpreter(weights);
        let mean = tokenizer::encode(o, &self.recipe.model, &shard.image)?;
        let latent = (&mean + (&shard.noise * self.recipe.posterior_std)?)?;
        let (reconstruction, features) = tokenizer::decode_with_features(o, &self.recipe.model, &latent)?;
        Ok((mean, reconstruction, features))
    }

    fn interpreter<'w>(&self, weights: &'w Weights) -> Eager<'w> {
        Eager::training(weights, Training { dropout: None, products: self.recipe.plan.products() })
    }

    /// Sum of the squared errors of the predicted semantic features, divided by the number of values of the image.
    fn semantic(&self, network: &Semantic, weights: &Weights, features: &Tensor, image: &Tensor) -> Result<Tensor> {
        let model = &self.recipe.model;
        let predicted =
            tokenizer::semantics(&mut self.interpreter(weights), model, semantics(network.width()), features)?;
        let expected = network.features(image, model.rows, predicted.dim(3)?)?;
        Ok(((predicted - expected)?.sqr()?.sum_all()? / image.elem_count() as f64)?)
    }

    fn loss(&self, weights: &Weights, shard: &Shard) -> Result<Losses> {
        let recipe = self.recipe;
        let (mean, reconstruction, features) = self.reconstruct(weights, shard)?;
        let Losses { mut total, mut parts } = self.difference(&reconstruction, &shard.image)?;
        if let Some(discriminator) = &self.discriminator {
            let adversarial = discriminator::logits(discriminator, &reconstruction)?.mean_all()?.neg()?;
            let weight = self.adaptive_weight(discriminator, &reconstruction, &shard.image)?;
            total = (total + (&adversarial * (weight * recipe.discriminator_weight))?)?;
            parts.push(("adversarial", adversarial));
        }
        if let Some(network) = self.semantic {
            let semantic = self.semantic(network, weights, &features, &shard.image)?;
            total = (total + (&semantic * recipe.semantic_weight)?)?;
            parts.push(("semantic", semantic));
        }
        // KL divergence from the standard normal distribution, divided by the number of values of the image as in the
        // reference.
        let variance = recipe.posterior_std.powi(2);
        let kl = ((mean.sqr()?.sum_all()? + mean.elem_count() as f64 * (variance - 1.0 - variance.ln()))? * 0.5)?;
        let kl = (kl / shard.image.elem_count() as f64)?;
        total = (total + (&kl * recipe.kl_weight)?)?;
        parts.push(("kl", kl));
        parts.push(("loss", total.clone()));
        Ok(Losses { total, parts })
    }

    /// Losses between a reconstruction and its image, without the discriminator.
    fn difference(&self, reconstruction: &Tensor, image: &Tensor) -> Result<Losses> {
        let pixel = (reconstruction - image)?.abs()?.mean_all()?;
        let mut total = (&pixel * self.recipe.pixel_weight)?;
        let mut parts = vec![("pixel", pixel)];
        if self.recipe.structure_weight > 0.0 {
            let structure = structure(reconstruction, image)?;
            total = (total + (&structure * self.recipe.structure_weight)?)?;
            parts.push(("structure", structure));
        }
        if let Some(network) = self.perceptual {
            let distance = network.distance(reconstruction, image)?;
            total = (total + (&distance * self.recipe.perceptual_weight)?)?;
            parts.push(("perceptual", distance));
        }
        Ok(Losses { total, parts })
    }

    /// Weight of the adversarial loss: the gradient norm of the other reconstruction losses, divided by the gradient
    /// norm of the adversarial loss (reference: `calculate_adaptive_weight`). The reference takes the gradients with
    /// respect to the weight of the last layer. Here they are taken with respect to the reconstruction, which needs no
    /// pass through the decoder.
    fn adaptive_weight(&self, discriminator: &Weights, reconstruction: &Tensor, image: &Tensor) -> Result<f64> {
        let leaf = Var::from_tensor(&reconstruction.detach())?;
        let pull = |loss: Tensor| -> Result<f64> {
            let gradients = loss.backward()?;
            let gradient = gradients.get(&leaf).ok_or_else(|| Error::run("discriminator", "has no gradient"))?;
            Ok(f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt())
        };
        let difference = pull(self.difference(&leaf, image)?.total)?;
        let adversarial = pull(discriminator::logits(discriminator, &leaf)?.mean_all()?)?;
        Ok((difference / (adversarial + ADAPTIVE_EPS)).min(ADAPTIVE_MOST))
    }
}

/// A configuration with this tokenizer. The generator in it is not used.
fn whole(model: &TokenizerConfig) -> Config {
    let generator = GeneratorConfig { embed: model.embed, ..Preset::Small.config().generator };
    Config { generator, tokenizer: model.clone() }
}

fn add(weights: &mut Weights, others: &Weights) -> Result<()> {
    others.iter().try_for_each(|(name, tensor)| weights.insert(name.to_string(), tensor))
}

/// Hash of the values of the weights, in the order of their names.
fn fingerprint(weights: &Weights) -> Result<String> {
    let mut hash = Hash::default();
    for (_, tensor) in weights.iter() {
        hash.add_values(&tensor.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(hash.hex())
}

/// The arithmetic mean; 0 if there are no values.
pub fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1);
    values.sum::<f64>() / count as f64
}

impl Task for TokenizerTask {
    fn kind(&self) -> &'static str {
        "tokenizer"
    }

    fn plan(&self) -> &TrainingPlan {
        &self.recipe.plan
    }

    fn identity(&self) -> Result<String> {
        let (recipe, plan) = (self.recipe.clone(), self.recipe.plan.identity());
        let recipe = TokenizerRecipe { plan, ..recipe };
        let recipe = toml::to_string(&recipe).or_run("recipe")?;
        let photographs = self.training.fingerprint();
        let Networks { perceptual, semantic, .. } = &self.networks;
        let perceptual = perceptual.as_ref().map_or("none", Perceptual::name);
        let semantic = semantic.as_ref().map_or("none", Semantic::name);
        let frozen = fingerprint(&self.frozen)?;
        let networks = format!("perceptual = {perceptual}\nsemantic = {semantic}\n");
        Ok(format!("{recipe}photographs = {photographs}\n{networks}frozen = {frozen}\n"))
    }

    fn step(&mut self, step: usize) -> Result<Measures> {
        let plan = self.recipe.plan.clone();
        let mut batches = match self.batches.take() {
            Some(batches) => batches,
            None => self.prepare(step..plan.steps)?,
        };
        let batch = batches.next_batch()?;
        self.batches = Some(batches);
        let embed = self.recipe.model.embed;
        let (most, shares) = self.shares();
        let shard = |(shard, images): (usize, ArrayView4<f32>)| {
            let rows = images.dim().0;
            let first = step * plan.batch_size + shard * most;
            let noise = |sample| {
                let mut random = randomness(plan.seed, Purpose::Posterior, sample);
                initial::normal(&mut random, plan.tokens * embed)
            };
            let noise = (first..first + rows).flat_map(noise).collect();
            let noise = Tensor::from_vec(noise, (rows, plan.tokens, embed), &self.device)?;
            let image = candle::to_tensor(images)?.to_device(&self.device)?;
            Ok((rows as f64 / plan.batch_size as f64, Shard { image, noise }))
        };
        let shards = shares.zip(batch.images.axis_chunks_iter(Axis(0), most)).map(shard);
        let shards = shards.collect::<Result<Vec<_>>>()?;
        let update = Update {
            learning_rate: plan.learning_rate(step),
            betas: plan.betas,
            weight_decay: 0.0,
            decays: &|_, _| false,
            clip: (plan.clip > 0.0).then_some(plan.clip),
            average: plan.ema,
        };
        let adversary = self.discriminator.as_mut().filter(|_| step >= self.recipe.discriminator_start);
        let discriminator = adversary.as_ref().map(|discriminator| discriminator.weights()).transpose()?;
        let Networks { perceptual, semantic, .. } = &self.networks;
        let semantic = semantic.as_ref().filter(|_| step >= self.recipe.semantic_start);
        let objective = Objective { recipe: &self.recipe, perceptual: perceptual.as_ref(), semantic, discriminator };
        let mut weights = self.learner.weights()?;
        add(&mut weights, &self.frozen)?;
        let (gradients, mut measures) =
            self.learner.differentiate(&shards, plan.accumulate, |shard| objective.loss(&weights, shard))?;
        measures.insert("gradient_norm".into(), self.learner.update(&gradients, &update)?);
        if let Some(adversary) = adversary {
            let weights = adversary.weights()?;
            let mut updated = self.learner.weights()?;
            add(&mut updated, &self.frozen)?;
            let loss = |shard: &Shard| {
                let (_, made, _) = objective.reconstruct(&updated, shard)?;
                let real = discriminator::logits(&weights, &shard.image)?;
                let total = discriminator::hinge(&real, &discriminator::logits(&weights, &made.detach())?)?;
                Ok(Losses { total: total.clone(), parts: vec![("discriminator", total)] })
            };
            let (gradients, measured) = adversary.differentiate(&shards, plan.accumulate, loss)?;
            adversary.update(&gradients, &update)?;
            measures.extend(measured);
        }
        Ok(measures)
    }

    fn validate(&self) -> Result<Measures> {
        let weights = self.averaged()?;
        let pairs = self.held_out.photos.iter().map(|photo| self.pair(&weights, photo));
        let pairs: Vec<_> = pairs.filter_map(Result::transpose).collect::<Result<_>>()?;
        if pairs.is_empty() {
            return Ok(Measures::new());
        }
        let psnr = |(picture, made): &(Array3<f32>, Array3<f32>)| psnr_of_values(made.view(), picture.view());
        let mut measures = Measures::from([("psnr".into(), mean(pairs.iter().map(psnr)))]);
        if let Some(evaluation) = &self.networks.evaluation {
            let (pictures, made): (Vec<_>, Vec<_>) = pairs.iter().map(|(a, b)| (a.view(), b.view())).unzip();
            measures.insert("frechet_distance".into(), evaluation.distance(&made, &pictures)?);
        }
        Ok(measures)
    }

    fn check(&self) -> Result<()> {
        [Some(&self.learner), self.discriminator.as_ref()].into_iter().flatten().try_for_each(Learner::check)?;
        let Some((photo, picture)) = self.first(1)?.pop() else { return Ok(()) };
        let mut trained = self.learner.weights()?;
        add(&mut trained, &self.frozen)?;
        for weights in [trained, self.averaged()?] {
            self.finite_reconstruction(&weights, &photo.path, picture.view())?;
        }
        Ok(())
    }

    fn picture(&self) -> Result<Array3<f32>> {
        let weights = self.averaged()?;
        let mut rows = vec![];
        for (_, picture) in self.first(4)? {
            let width = (2 * self.recipe.model.image_height()).min(picture.dim().2);
            let reconstruction = self.reconstruct(&weights, picture.view())?;
            let (left, right) = (picture.slice(s![.., .., ..width]), reconstruction.slice(s![.., .., ..width]));
            let mut row = Array3::from_elem((3, picture.dim().1, 4 * self.recipe.model.image_height()), -1.0);
            row.slice_mut(s![.., .., ..width]).assign(&left);
            row.slice_mut(s![.., .., width..2 * width]).assign(&right);
            rows.push(row);
        }
        let rows: Vec<ArrayView3<f32>> = rows.iter().map(|row| row.view()).collect();
        concatenate(Axis(1), &rows).or_run("samples")
    }

    fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    fn fingerprint(&self) -> Result<String> {
        self.learner.fingerprint()
    }

    fn collect(&mut self) -> Result<()> {
        [Some(&mut self.learner), self.discriminator.as_mut()].into_iter().flatten().try_for_each(Learner::collect)
    }

    fn release(&mut self) {
        [Some(&mut self.learner), self.discriminator.as_mut()].into_iter().flatten().for_each(Learner::release);
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        let learners = [Some(&self.learner), self.discriminator.as_ref()];
        learners.into_iter().flatten().flat_map(Learner::state).collect()
    }

    fn restore(&mut self, file: &mut TensorFile, steps: usize) -> Result<()> {
        self.learner.restore(file, steps)?;
        match &mut self.discriminator {
            Some(discriminator) => discriminator.restore(file, steps.saturating_sub(self.recipe.discriminator_start)),
            None => Ok(()),
        }
    }

    fn write_model(&self, path: &Path) -> Result<()> {
        let weights = self.averaged()?.to_device(&Device::Cpu)?;
        let config = StoredConfig { generator: None, tokenizer: Some(self.recipe.model.clone()) };
        let kept = weights.iter().filter(|(name, _)| !name.starts_with(SEMANTIC));
        let stored: Vec<(&str, Tensor)> = kept.map(|(name, tensor)| (name, tensor.clone())).collect();
        checkpoint::write(path, &config, &stored)
    }
}
