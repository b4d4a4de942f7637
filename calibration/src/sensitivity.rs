//! Sensitivity search: the error of tokens and images if each scope alone is quantized, and the fewest scopes to
//! exclude from INT8 so that images keep a minimum PSNR.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use eqim::close::{largest, relative_error};
use eqim::engine::Engine;
use eqim::engine::candle::CandleEngine;
use eqim::generate::generate;
use eqim::model::Stage;
use eqim::picture::quality::psnr;
use eqim::request::{Generated, Noise, Request};
use eqim::weights::Weights;
use eqim::{Config, Error, Result};
use ndarray::{Array3, Array4, Axis};

use crate::collect::Collection;
use crate::policy::{Policy, Scheme};
use crate::preview::Preview;
use crate::quantize::plan;
use crate::table::{Damage, Ranked, Samples, Sensitivity};

/// A model, with its reference tokens and images in FP32.
pub struct Search<'a> {
    config: &'a Config,
    weights: &'a Weights,
    reference: Generated,
    images: Array4<f32>,
}

impl<'a> Search<'a> {
    /// Generates the reference images in FP32, of the first classes.
    ///
    /// # Errors
    /// If the model fails.
    pub fn new(config: &'a Config, weights: &'a Weights, policy: &Policy) -> Result<Self> {
        let engine = CandleEngine::new(config.clone(), weights.clone());
        let reference = generate(&engine, &request(config, &policy.table.samples), |_| {})?;
        let images = decode(&engine, &reference.tokens)?;
        Ok(Self { config, weights, reference, images })
    }

    /// Measures the error of tokens and images under a policy.
    ///
    /// # Errors
    /// If the model fails.
    pub fn damage(&self, policy: &Policy) -> Result<Damage> {
        let engine = Preview::engine(self.config, self.weights, policy)?;
        let tokens = generate(&engine, &request(self.config, &policy.table.samples), |_| {})?.tokens;
        let rows = tokens.outer_iter().zip(self.reference.tokens.outer_iter());
        let errors: Vec<f32> = rows.map(|(found, expected)| relative_error(found, expected)).collect();
        // Tokens that are not finite are the largest damage. JSON has no infinite number.
        let token_error = largest(&errors).min(f32::MAX);
        Ok(Damage { token_error, psnr: self.worst_psnr(&decode(&engine, &tokens)?) })
    }

    /// Lowest PSNR of the images against the reference images; `None` if all images are equal.
    fn worst_psnr(&self, images: &Array4<f32>) -> Option<f32> {
        let rows = images.axis_chunks_iter(Axis(0), 1).zip(self.images.axis_chunks_iter(Axis(0), 1));
        rows.filter_map(|(found, expected)| psnr(found, expected)).min_by(f32::total_cmp)
    }

    /// Damage if only this scope is quantized. If only the decoder uses the scope, the tokens do not change and are not
    /// generated again.
    fn alone(&self, policy: &Policy, scope: &str, stages: &BTreeSet<Stage>) -> Result<Damage> {
        let policy = Policy { only: Some([scope.to_string()].into()), ..policy.clone() };
        if stages.iter().any(|&stage| stage != Stage::Decoder) {
            return self.damage(&policy);
        }
        let images = decode(&Preview::engine(self.config, self.weights, &policy)?, &self.reference.tokens)?;
        Ok(Damage { token_error: 0.0, psnr: self.worst_psnr(&images) })
    }
}

/// Number of images that damage is measured on. There are several because the damage differs between images.
const IMAGES: usize = 8;

/// A batch of guided images with the tokens, steps, guidance and seed of the calibration.
fn request(config: &Config, samples: &Samples) -> Request {
    let classes = (0..IMAGES).map(|row| Some(row % config.generator.class_num));
    Request {
        cfg: samples.cfg,
        steps: samples.steps,
        noise: Noise::Seed(samples.seed),
        ..Request::new(config, classes, samples.tokens)
    }
}

fn decode(engine: &dyn Engine, tokens: &Array3<f32>) -> Result<Array4<f32>> {
    engine.decode_tokens(tokens.view())
}

/// Scopes that a policy runs in INT8, each with the stages that use it. The encoder is left out.
///
/// # Errors
/// Errors of [`plan`].
pub fn quantized(config: &Config, policy: &Policy) -> Result<BTreeMap<String, BTreeSet<Stage>>> {
    let mut scopes: BTreeMap<String, BTreeSet<Stage>> = BTreeMap::new();
    for (stage, plan) in plan(config, policy)? {
        // A rollout does not run the encoder.
        let chosen = plan.schemes.into_iter().filter(|(_, scheme)| *scheme != Scheme::Float && stage != Stage::Encoder);
        for (scope, _) in chosen {
            scopes.entry(scope).or_default().insert(stage);
        }
    }
    Ok(scopes)
}

/// Measures the damage of every scope alone and ranks the scopes by it. Then excludes the worst scopes from INT8, as
/// few as needed for a PSNR of `min_psnr` dB.
///
/// The results are stored in `collection` and saved to the file `state` after every scope. `progress` receives the
/// number of scopes measured so far.
///
/// # Errors
/// If the model fails, the state cannot be written, or the PSNR is not reached even without INT8.
pub fn search(
    config: &Config,
    weights: &Weights,
    policy: &Policy,
    min_psnr: f32,
    (collection, state): (&mut Collection, &Path),
    mut progress: impl FnMut(usize),
) -> Result<Sensitivity> {
    let search = Search::new(config, weights, policy)?;
    let settings = format!("{} {}", policy.target, policy.table.estimator);
    let scopes = quantized(config, policy)?;
    for (done, (scope, stages)) in scopes.iter().enumerate() {
        progress(done);
        let known = collection.damages.entry(settings.clone()).or_default();
        if !known.contains_key(scope) {
            known.insert(scope.clone(), search.alone(policy, scope, stages)?);
            collection.save(state)?;
        }
    }
    progress(scopes.len());
    let known = collection.damages.remove(&settings).unwrap_or_default();
    let mut ranking: Vec<Ranked> = known
        .into_iter()
        .filter(|(scope, _)| scopes.contains_key(scope))
        .map(|(scope, damage)| Ranked { scope, damage })
        .collect();
    let severity = |ranked: &Ranked| ranked.damage.severity();
    ranking.sort_by(|a, b| severity(b).partial_cmp(&severity(a)).unwrap_or(std::cmp::Ordering::Equal));
    let (kept, damage) = fewest(&search, policy, &ranking, min_psnr)?;
    let exclude = ranking[..kept].iter().map(|ranked| ranked.scope.clone()).collect();
    Ok(Sensitivity { target: policy.target, min_psnr, psnr: damage.psnr, exclude, scopes: ranking })
}

/// Number of scopes at the front of the ranking that must be excluded, found by bisection, and the damage that remains.
fn fewest(search: &Search, policy: &Policy, ranking: &[Ranked], min_psnr: f32) -> Result<(usize, Damage)> {
    let without = |count: usize| {
        let left_out = ranking[..count].iter().map(|ranked| ranked.scope.clone()).collect();
        search.damage(&Policy { left_out, ..policy.clone() })
    };
    let passes = |damage: Damage| damage.psnr.is_none_or(|psnr| psnr >= min_psnr);
    let damage = without(0)?;
    if passes(damage) {
        return Ok((0, damage));
    }
    let (mut too_few, mut enough, mut best) = (0, ranking.len(), without(ranking.len())?);
    if !passes(best) {
        return Err(Error::run("min_psnr", format!("{min_psnr} dB is not reached, even without INT8")));
    }
    while enough - too_few > 1 {
        let middle = usize::midpoint(too_few, enough);
        let damage = without(middle)?;
        if passes(damage) {
            (enough, best) = (middle, damage);
        } else {
            too_few = middle;
        }
    }
    Ok((enough, best))
}
