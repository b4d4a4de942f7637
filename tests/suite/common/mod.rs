//! The golden fixtures, and tolerances with their reasons.

pub mod bins;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use eqim::Config;
use eqim::checkpoint::tensors::TensorFile;
use eqim::checkpoint::{self, Hints, WeightSet};
use eqim::close::{Tolerance, values};
use eqim::engine::candle::CandleEngine;
use eqim::request::{GuidanceSchedule, Noise, Request};
use ndarray::{Array, Dimension};
use serde_json::Value;

/// One set of golden fixtures.
pub struct Fixture {
    pub folder: PathBuf,
    pub heads: usize,
    pub meta: Value,
    pub expected: BTreeMap<String, Tensor>,
}

/// A file of the repository.
pub fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Folder of the fixtures.
pub fn fixtures() -> PathBuf {
    file("tests/fixtures")
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
    pub fn request(&self, config: &Config, run: &str) -> Request {
        let meta = &self.meta["sampling"][run];
        let number = |key: &str| meta[key].as_u64().unwrap() as usize;
        let classes: Vec<Option<usize>> = match self.expected.get(&format!("{run}/labels")) {
            Some(labels) => labels.to_vec1::<i64>().unwrap().into_iter().map(|label| Some(label as usize)).collect(),
            None => vec![None; number("batch")],
        };
        let linear = meta["cfg_schedule"] == "linear";
        Request {
            cfg: meta["cfg"].as_f64().unwrap() as f32,
            cfg_schedule: if linear { GuidanceSchedule::Linear } else { GuidanceSchedule::Constant },
            steps: self.meta["generator"]["steps"].as_u64().unwrap() as usize,
            prefix: (number("prefix") > 0).then(|| self.array(&format!("{run}/prefix"))),
            noise: Noise::Seed(meta["seed"].as_u64().unwrap()),
            ..Request::new(config, classes, number("n_tokens"))
        }
    }

    /// Names of the sampling runs.
    pub fn runs(&self) -> Vec<String> {
        self.meta["sampling"].as_object().unwrap().keys().cloned().collect()
    }
}

/// Asserts that `found` is within `tolerance` of the fixture `key` everywhere.
#[track_caller]
pub fn close(fixture: &Fixture, key: &str, found: &Tensor, tolerance: Tolerance) {
    assert_eq!(found.dims(), fixture.tensor(key).dims(), "{key}");
    let [found, expected] = [found, fixture.tensor(key)].map(|tensor| values(tensor).unwrap());
    match eqim::close::close(&found, &expected, tolerance) {
        Ok(difference) => println!("{key}: {difference:.1e}"),
        Err(error) => panic!("{key}: {error}"),
    }
}

/// Asserts the same of arrays.
#[track_caller]
pub fn close_array<D: Dimension>(fixture: &Fixture, key: &str, found: &Array<f32, D>, tolerance: Tolerance) {
    close(fixture, key, &eqim::engine::candle::to_tensor(found.view()).unwrap(), tolerance);
}
