//! The golden fixtures, and tolerances with their reasons.
#![allow(dead_code, missing_docs)]

pub mod bins;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use eqim::checkpoint::tensors::TensorFile;
use eqim::checkpoint::{self, Hints, WeightSet};
use eqim::engine::candle::CandleEngine;
use eqim::request::solver::Solver;
use eqim::request::{Noise, Request, Schedule};
use ndarray::{Array, Dimension};
use serde_json::Value;

/// Largest absolute difference of one activation: both sides round at about 1e-7 of values near 1, a few hundred times.
pub const ACTIVATION: f32 = 1e-5;
/// The same after a whole sampling run, where differences pass through up to 60 tokens of 10 guided steps.
pub const SAMPLING: f32 = 1e-4;
/// Noise from a seed: PyTorch's vectorized logarithm and cosine round differently from libm's in the last place.
pub const NOISE: f32 = 1e-6;

/// One set of golden fixtures.
pub struct Fixture {
    pub folder: PathBuf,
    pub heads: usize,
    pub meta: Value,
    pub expected: BTreeMap<String, Tensor>,
}

/// Folder of the fixtures.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Both sets: the reference's at two configurations that differ in every size.
pub fn all() -> [Fixture; 2] {
    [Fixture::open(fixtures()), Fixture::open(fixtures().join("other"))]
}

impl Fixture {
    pub fn open(folder: PathBuf) -> Self {
        let meta: Value = serde_json::from_slice(&std::fs::read(folder.join("meta.json")).unwrap()).unwrap();
        let mut file = TensorFile::open(&folder.join("expected.safetensors")).unwrap();
        let names: Vec<String> = file.tensors().into_keys().collect();
        let expected = names.into_iter().map(|name| (name.clone(), file.read(&name).unwrap())).collect();
        let heads = meta["generator"]["heads"].as_u64().unwrap() as usize;
        Self { folder, heads, meta, expected }
    }

    pub fn engine(&self, set: WeightSet) -> CandleEngine {
        let hints = Hints { heads: Some(self.heads), ..Hints::default() };
        let (generator, tokenizer) = (self.folder.join("generator.pth"), self.folder.join("tokenizer.ckpt"));
        let (config, weights) = checkpoint::load(&generator, &tokenizer, set, &hints).unwrap();
        CandleEngine::new(config, weights)
    }

    pub fn tensor(&self, key: &str) -> &Tensor {
        self.expected.get(key).unwrap_or_else(|| panic!("no {key} in {}", self.folder.display()))
    }

    pub fn array<D: Dimension>(&self, key: &str) -> Array<f32, D> {
        eqim::engine::candle::to_array(&self.tensor(key).to_dtype(DType::F32).unwrap()).unwrap()
    }

    /// The request of a sampling run, with its noise from the seed.
    pub fn request(&self, run: &str) -> Request {
        let meta = &self.meta["sampling"][run];
        let number = |key: &str| meta[key].as_u64().unwrap() as usize;
        let labels = match self.expected.get(&format!("{run}/labels")) {
            Some(labels) => {
                labels.to_vec1::<i64>().unwrap().into_iter().map(|label| Some(label as usize).into()).collect()
            }
            None => vec![None.into(); number("batch")],
        };
        Request {
            labels,
            tokens: number("n_tokens"),
            cfg: meta["cfg"].as_f64().unwrap() as f32,
            schedule: if meta["cfg_schedule"] == "linear" { Schedule::Linear } else { Schedule::Constant },
            solver: Solver::Euler,
            steps: self.meta["generator"]["steps"].as_u64().unwrap() as usize,
            prefix: (number("prefix") > 0).then(|| self.array(&format!("{run}/prefix"))),
            noise: Noise::Seed(meta["seed"].as_u64().unwrap()),
        }
    }

    /// Names of the sampling runs.
    pub fn runs(&self) -> Vec<String> {
        self.meta["sampling"].as_object().unwrap().keys().cloned().collect()
    }
}

/// Asserts that `found` is within `tolerance` of the fixture `key` everywhere.
#[track_caller]
pub fn close(fixture: &Fixture, key: &str, found: &Tensor, tolerance: f32) {
    let expected = fixture.tensor(key);
    assert_eq!(found.elem_count(), expected.elem_count(), "{key}: {:?} against {:?}", found.shape(), expected.shape());
    let difference = (found.flatten_all().unwrap() - expected.flatten_all().unwrap()).unwrap();
    let largest = difference.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    println!("{key}: {largest:.1e}");
    assert!(largest <= tolerance, "{key}: differs by {largest:e}, tolerance {tolerance:e}");
}

/// Asserts the same of arrays.
#[track_caller]
pub fn close_array<D: Dimension>(fixture: &Fixture, key: &str, found: &Array<f32, D>, tolerance: f32) {
    close(fixture, key, &eqim::engine::candle::to_tensor(found.view()).unwrap(), tolerance);
}
