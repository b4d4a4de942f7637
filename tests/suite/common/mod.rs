//! The golden fixtures, and comparisons with them.

pub mod bins;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use eqim::checkpoint::tensors::TensorFile;
use eqim::checkpoint::{self, Hints, WeightSet};
use eqim::close::{Tolerance, close, values};
use eqim::engine::Engine;
use eqim::engine::candle::{CandleEngine, open_device, to_array, to_tensor};
use eqim::generate::batch::Sequence;
use eqim::generate::scheduler::{Capacity, Event, Order, Scheduler};
use eqim::request::{GuidanceSchedule, Noise, PreparedRequest, Request};
use eqim::{Config, Result};
use ndarray::{Array, Array2, Dimension, IxDyn};
use serde_json::Value;

/// One set of golden fixtures. The tensors are on the [device] of the tests.
pub struct Fixture {
    pub folder: PathBuf,
    pub device: Device,
    pub heads: usize,
    pub meta: Value,
    pub expected: BTreeMap<String, Tensor>,
}

/// Path of a file of the repository. Cargo sets the variable, and so does `gpu.py` where there is no Cargo.
pub fn file(name: &str) -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&root).join(name)
}

/// The device of Candle that is compared with PyTorch: the CPU, unless `EQIM_TEST_DEVICE` names another one.
pub fn device() -> Device {
    open_device(std::env::var("EQIM_TEST_DEVICE").as_deref().unwrap_or("cpu")).unwrap()
}

/// Folder of the fixtures.
pub fn fixtures() -> PathBuf {
    file("tests/fixtures")
}

/// Both sets of fixtures, from the reference at two configurations that differ in every size.
pub fn all() -> [Fixture; 2] {
    [Fixture::open(fixtures()), Fixture::open(fixtures().join("other"))]
}

impl Fixture {
    pub fn open(folder: PathBuf) -> Self {
        let meta: Value = serde_json::from_slice(&std::fs::read(folder.join("meta.json")).unwrap()).unwrap();
        let mut file = TensorFile::open(&folder.join("expected.safetensors")).unwrap();
        let names: Vec<String> = file.tensors().into_keys().collect();
        let device = device();
        let mut read = |name: &str| file.read(name).unwrap().to_device(&device).unwrap();
        let expected = names.into_iter().map(|name| (name.clone(), read(&name))).collect();
        let heads = meta["generator"]["heads"].as_u64().unwrap() as usize;
        Self { folder, device, heads, meta, expected }
    }

    pub fn engine(&self, set: WeightSet) -> CandleEngine {
        let hints = Hints { heads: Some(self.heads), ..Hints::default() };
        let (generator, tokenizer) = (self.folder.join("generator.pth"), self.folder.join("tokenizer.ckpt"));
        let (config, weights) = checkpoint::load(&generator, &tokenizer, set, &hints).unwrap();
        CandleEngine::new(config, weights.to_device(&self.device).unwrap())
    }

    pub fn tensor(&self, key: &str) -> &Tensor {
        self.expected.get(key).unwrap_or_else(|| panic!("no {key} in {}", self.folder.display()))
    }

    pub fn array<D: Dimension>(&self, key: &str) -> Array<f32, D> {
        to_array(&self.tensor(key).to_dtype(DType::F32).unwrap()).unwrap()
    }

    /// The request of a sampling run, with the noise from its seed.
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

/// Generates images in batches of at most `most`. Returns their tokens `[N, E]` by number, in the order in which they end.
pub fn together(engine: &dyn Engine, images: &[PreparedRequest], most: usize) -> Vec<(usize, Result<Array2<f32>>)> {
    let results = RefCell::new(vec![]);
    let mut scheduler = Scheduler::new(engine, Capacity { images: most, bytes: u64::MAX });
    for (number, image) in images.iter().enumerate() {
        let mut tokens = Array2::zeros((0, engine.config().generator.embed));
        let results = &results;
        let events = move |event| {
            match event {
                Event::Token(_, token) => tokens.push_row(token.view()).unwrap(),
                Event::Strip(_) | Event::Preview(_) => panic!("no image is decoded"),
                Event::Done => results.borrow_mut().push((number, Ok(tokens.clone()))),
                Event::Failed(error) => results.borrow_mut().push((number, Err(error))),
            }
            ControlFlow::Continue(())
        };
        let (sequence, sampling) = (Sequence::of_batch(image).remove(0), image.sampling.clone());
        scheduler.submit(Order { number, priority: 0, sequence, sampling, tiling: None, previewed: false, events });
    }
    scheduler.finish().unwrap();
    results.into_inner()
}

/// Filters of insta for reports: numbers, the widths of columns, and warnings about the times differ from run to run.
pub const VARYING: [(&str, &str); 4] =
    [("(?m)^warning: .*\n", ""), (r"\d+(\.\d+)?(e-?\d+)?", "#"), (" +", " "), ("-{3,}", "---")];

/// Hides the limit in messages about memory, which is that of the machine.
pub const MEMORY: [(&str, &str); 1] = [(r"of memory, expected at most [\d.]+ GB", "of memory, expected at most # GB")];

/// Asserts that values are close to the expected values, and prints the difference.
#[track_caller]
pub fn assert_close<'a>(
    what: impl Display,
    found: impl IntoIterator<Item = &'a f32>,
    expected: impl IntoIterator<Item = &'a f32>,
    tolerance: Tolerance,
) {
    match close(found, expected, tolerance) {
        Ok(difference) => println!("{what}: {difference:.1e}"),
        Err(error) => panic!("{what}: {error}"),
    }
}

/// Asserts that a tensor is close to the fixture's tensor `key`.
#[track_caller]
pub fn assert_tensor(fixture: &Fixture, key: &str, found: &Tensor, tolerance: Tolerance) {
    let [found, expected] = [found, fixture.tensor(key)].map(|tensor| values(tensor).unwrap());
    assert_close(key, &found, &expected, tolerance);
}

/// Asserts that an array is close to the fixture's tensor `key`.
#[track_caller]
pub fn assert_array<D: Dimension>(fixture: &Fixture, key: &str, found: &Array<f32, D>, tolerance: Tolerance) {
    assert_tensor(fixture, key, &to_tensor(found.view()).unwrap(), tolerance);
}

/// The fixture's tensor `forward/z` with one value that is not a number.
fn planted() -> (Fixture, Tensor) {
    let fixture = Fixture::open(fixtures());
    let tensor = fixture.tensor("forward/z");
    let mut values = values(tensor).unwrap();
    values[7] = f32::NAN;
    let planted = Tensor::from_vec(values, tensor.dims(), tensor.device()).unwrap();
    (fixture, planted)
}

#[test]
#[should_panic(expected = "the difference is inf")]
fn values_that_are_not_numbers_are_not_close() {
    assert_close("planted", &[1.0, f32::NAN], &[1.0, 2.0], Tolerance::absolute("any", f32::MAX));
}

#[test]
#[should_panic(expected = "forward/z: the difference is inf")]
fn a_tensor_with_a_value_that_is_not_a_number_is_not_close() {
    let (fixture, planted) = planted();
    assert_tensor(&fixture, "forward/z", &planted, Tolerance::ACTIVATION);
}

#[test]
#[should_panic(expected = "forward/z: the difference is inf")]
fn an_array_with_a_value_that_is_not_a_number_is_not_close() {
    let (fixture, planted) = planted();
    let planted: Array<f32, IxDyn> = to_array(&planted).unwrap();
    assert_array(&fixture, "forward/z", &planted, Tolerance::ACTIVATION);
}
