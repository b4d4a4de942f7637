//! Tests of the TensorRT generation loop on a mock device. Its engines are the model on Candle, and its memory is host
//! memory.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::ControlFlow;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use candle_core::{Device as CandleDevice, Tensor};
use eqim::bundle::{FileRecord, Precision};
use eqim::checkpoint::{self, Hints, WeightSet};
use eqim::close::{Tolerance, close};
use eqim::engine::Engine;
use eqim::engine::candle::CandleEngine;
use eqim::generate::batch::Sequence;
use eqim::generate::generate;
use eqim::generate::scheduler::{Capacity, Event, Order, Scheduler};
use eqim::model::{Sizes, Stage, ValueInfo, ValueKind};
use eqim::ops::eager::Eager;
use eqim::request::condition::{ClassSchedule, ClassSpan};
use eqim::request::solver::{Solver, Tableau};
use eqim::request::{Noise, PreparedRequest, Request};
use eqim::weights::Weights;
use eqim::{Config, Error, Result};
use eqim_engines::trt::{
    ALIGNMENT, Address, Binding, Device, EngineRecord, EngineSet, Profile, SIDECAR_FORMAT, TrtEngine,
};
use ndarray::{Array, Array2, Array3, Axis, Dimension, concatenate, s};

fn fixture() -> Result<(Config, Weights)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let hints = Hints { heads: Some(2), ..Hints::default() };
    checkpoint::load(&folder.join("generator.pth"), &folder.join("tokenizer.ckpt"), WeightSet::Ema, &hints)
}

type Memory = Rc<RefCell<BTreeMap<Address, Vec<u8>>>>;

/// An allocation. It is removed from the memory when it is dropped, as on a device.
struct Piece {
    memory: Memory,
    address: Address,
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.memory.borrow_mut().remove(&self.address);
    }
}

/// Calls of the device.
#[derive(Default)]
struct Counts {
    uploads: Cell<usize>,
    downloads: Cell<usize>,
    marks: Cell<u64>,
    runs: RefCell<Vec<(Stage, Vec<Binding>)>>,
    /// Index of the run that fails, counted from 1 over all stages.
    failing: Cell<Option<usize>>,
}

struct Mock {
    config: Config,
    weights: Weights,
    memory: Memory,
    next: Cell<Address>,
    counts: Rc<Counts>,
}

impl Mock {
    fn read(&self, address: Address, bytes: usize) -> Vec<u8> {
        let memory = self.memory.borrow();
        let (start, piece) = memory.range(..=address).next_back().expect("an address that was allocated");
        let offset = (address - start) as usize;
        assert!(offset + bytes <= piece.len(), "read beyond the end of a buffer");
        piece[offset..offset + bytes].to_vec()
    }

    fn write(&self, address: Address, bytes: &[u8]) {
        let mut memory = self.memory.borrow_mut();
        let (start, piece) = memory.range_mut(..=address).next_back().expect("an address that was allocated");
        let offset = (address - start) as usize;
        assert!(offset + bytes.len() <= piece.len(), "written beyond the end of a buffer");
        piece[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn tensor(&self, info: &ValueInfo, binding: &Binding) -> Result<Tensor> {
        let shape: Vec<usize> = binding.shape.as_ref().expect("an input's shape").iter().map(|&n| n as usize).collect();
        let count: usize = shape.iter().product();
        if info.kind == ValueKind::Integer {
            let bytes = self.read(binding.address, 8 * count);
            let values: Vec<i64> = bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
            return Ok(Tensor::from_vec(values, shape, &CandleDevice::Cpu)?);
        }
        let bytes = self.read(binding.address, 4 * count);
        let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        Ok(Tensor::from_vec(values, shape, &CandleDevice::Cpu)?)
    }
}

impl Device for Mock {
    type Memory = Piece;
    type Context = Stage;
    type Event = u64;

    fn name(&self) -> &str {
        "mock"
    }

    fn allocate(&self, bytes: usize) -> Result<(Piece, Address)> {
        let address = self.next.get();
        // The gap makes an access beyond the end of a buffer fail.
        self.next.set(address + (bytes + ALIGNMENT).next_multiple_of(ALIGNMENT) as u64);
        self.memory.borrow_mut().insert(address, vec![0; bytes]);
        Ok((Piece { memory: Rc::clone(&self.memory), address }, address))
    }

    fn upload(&self, from: &[u8], to: Address) -> Result<()> {
        self.counts.uploads.set(self.counts.uploads.get() + 1);
        self.write(to, from);
        Ok(())
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.counts.downloads.set(self.counts.downloads.get() + 1);
        to.copy_from_slice(&self.read(from, to.len()));
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.write(to, &self.read(from, bytes));
        Ok(())
    }

    fn load(&self, stage: Stage) -> Result<Stage> {
        Ok(stage)
    }

    fn enqueue(&self, stage: &mut Stage, bindings: &[Binding]) -> Result<()> {
        self.counts.runs.borrow_mut().push((*stage, bindings.to_vec()));
        if self.counts.failing.get() == Some(self.counts.runs.borrow().len()) {
            return Err(Error::run(stage.name(), "the mock fails here"));
        }
        assert!(
            bindings.iter().all(|binding| (binding.address as usize).is_multiple_of(ALIGNMENT)),
            "{stage:?} is not aligned"
        );
        let (inputs, outputs) = (stage.inputs(&self.config), stage.outputs(&self.config));
        let names: Vec<&String> = inputs.iter().chain(&outputs).map(|info| &info.name).collect();
        assert_eq!(bindings.iter().map(|binding| &binding.name).collect::<Vec<_>>(), names, "{stage:?}");
        let tensors = inputs.iter().zip(bindings).map(|(info, binding)| self.tensor(info, binding));
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        let found = stage.run(&mut Eager::new(&self.weights), &self.config, &tensors)?;
        for (binding, found) in bindings[inputs.len()..].iter().zip(found) {
            let values = found.flatten_all()?.to_vec1::<f32>()?;
            self.write(binding.address, &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
        }
        Ok(())
    }

    fn mark(&self) -> Result<u64> {
        self.counts.marks.set(self.counts.marks.get() + 1);
        Ok(self.counts.marks.get())
    }

    fn wait(&self, _event: &u64) -> Result<()> {
        Ok(())
    }

    fn elapsed(&self, from: &u64, to: &u64) -> Result<Duration> {
        assert!(from < to, "times run backwards");
        Ok(Duration::from_millis(to - from))
    }
}

/// Engines for up to four images, 24 tokens and 8 steps.
fn set(config: &Config) -> EngineSet {
    let engine = |stage: Stage| {
        let profile = |info: &ValueInfo| {
            let width = config.tokenizer.token_width();
            let limits = |sizes: Sizes| info.shape(&sizes).into_iter().map(|size| size as i64).collect::<Vec<i64>>();
            let least = limits(Sizes { width: 2 * width, ..Sizes::of_batch(1) });
            let batch = if matches!(stage, Stage::Prefill | Stage::Step) { 8 } else { 4 };
            let most = limits(Sizes { batch, rows: 8, evaluations: 8, tokens: 24, width: 24 * width });
            (info.name.clone(), Profile { min: least, opt: most.clone(), max: most })
        };
        let record = EngineRecord {
            file: FileRecord { file: "none".into(), bytes: 0, sha256: String::new() },
            graph: String::new(),
            lowered: String::new(),
            precision: Precision::Fp32,
            int8: false,
            profiles: stage.inputs(config).iter().map(profile).collect(),
            layers: vec![],
            seconds: 0.0,
            peak_bytes: 0,
        };
        (stage.name().to_string(), record)
    };
    EngineSet {
        format: SIDECAR_FORMAT,
        producer: "a test".into(),
        tensorrt: "mock".into(),
        targets: vec![],
        model: config.clone(),
        weights: String::new(),
        engines: Stage::ALL.into_iter().map(engine).collect(),
    }
}

struct Both {
    mock: TrtEngine<Mock>,
    candle: CandleEngine,
    counts: Rc<Counts>,
    memory: Memory,
}

fn both() -> Result<Both> {
    let (config, weights) = fixture()?;
    let (counts, memory) = (Rc::<Counts>::default(), Memory::default());
    let device = Mock {
        config: config.clone(),
        weights: weights.clone(),
        memory: Rc::clone(&memory),
        next: Cell::new(4096),
        counts: Rc::clone(&counts),
    };
    let mock = TrtEngine::new(device, &set(&config))?;
    Ok(Both { mock, candle: CandleEngine::new(config, weights), counts, memory })
}

fn request(classes: &[Option<usize>], tokens: usize, cfg: f32) -> Request {
    let (config, _) = fixture().expect("the fixture");
    Request { cfg, steps: 4, noise: Noise::Seed(5), ..Request::new(&config, classes.iter().copied(), tokens) }
}

fn assert_close<D: Dimension>(found: &Array<f32, D>, expected: &Array<f32, D>) {
    assert_eq!(found.dim(), expected.dim());
    close(found, expected, Tolerance::SUMS).expect("the same values");
}

#[test]
#[should_panic(expected = "the same values")]
fn a_value_that_is_not_a_number_fails_a_comparison() {
    assert_close(&Array3::from_elem((1, 2, 3), f32::NAN), &Array3::zeros((1, 2, 3)));
}

#[test]
fn rollouts_equal_those_of_candle() -> Result<()> {
    let Both { mock, candle, memory, .. } = both()?;
    // Rollouts longer than the attention window; batches that grow and shrink on one engine; with and without guidance.
    for (labels, tokens, cfg) in [
        (&[Some(0)][..], 2, 1.0),
        (&[Some(1), None, Some(2)], 11, 3.0),
        (&[None], 9, 2.5),
        (&[Some(3), Some(0), None, Some(1)], 7, 1.0),
    ] {
        let request = request(labels, tokens, cfg);
        let mut reported = vec![];
        let found = generate(&mock, &request, |done| reported.push(done))?;
        let expected = generate(&candle, &request, |_| {})?;
        assert_close(&found.tokens, &expected.tokens);
        assert_eq!(found.noise, expected.noise);
        assert_eq!(reported, (1..=tokens).collect::<Vec<_>>());
        let device = found.times.device.expect("a device's times");
        assert!(device.host_to_device > Duration::ZERO && device.device_to_host > Duration::ZERO);
        assert!(found.times.flow.total() > found.times.prefill.total());
        assert!(memory.borrow().is_empty(), "memory is held after the rollout");
    }
    Ok(())
}

#[test]
fn classes_change_and_fade_along_the_way() -> Result<()> {
    let Both { mock, candle, memory, .. } = both()?;
    let span = |class, begin, end| ClassSpan { class, begin, end };
    let mut request = request(&[Some(0), Some(1), None], 9, 3.0);
    request.classes[1] = ClassSchedule::Spans(vec![span(Some(1), 0, Some(4)), span(Some(2), 4, None)]);
    request.classes[2] = ClassSchedule::Spans(vec![span(None, 0, Some(7)), span(Some(3), 2, None)]);
    let found = generate(&mock, &request, |_| {})?;
    assert_close(&found.tokens, &generate(&candle, &request, |_| {})?.tokens);
    assert!(memory.borrow().is_empty(), "memory is held after the rollout");
    Ok(())
}

#[test]
fn a_prefix_is_kept_and_continued() -> Result<()> {
    let Both { mock, candle, .. } = both()?;
    let mut request = request(&[Some(1), Some(2)], 9, 3.0);
    let whole = generate(&candle, &request, |_| {})?.tokens;
    request.prefix = Some(whole.slice(s![.., ..5, ..]).to_owned());
    let found = generate(&mock, &request, |_| {})?.tokens;
    assert_close(&found, &generate(&candle, &request, |_| {})?.tokens);
    assert_close(&found.slice(s![.., ..5, ..]).to_owned(), &whole.slice(s![.., ..5, ..]).to_owned());
    Ok(())
}

#[test]
fn the_token_by_token_interface_gives_the_same() -> Result<()> {
    let Both { mock, candle, .. } = both()?;
    let generator = &candle.config().generator;
    let labels = [1, generator.unconditional() as i64];
    let (mut found, z) = mock.start(&labels)?;
    let (mut expected, z_expected) = candle.start(&labels)?;
    assert_close(&z, &z_expected);
    let noise = Array2::from_elem((1, generator.embed), 0.3);
    let tableau = Tableau::new(Solver::Heun, 2);
    for position in 0..6 {
        let token = mock.sample(z.view(), noise.view(), &[2.0], &tableau)?;
        assert_close(&token, &candle.sample(z.view(), noise.view(), &[2.0], &tableau)?);
        let rows = concatenate![Axis(0), token, token];
        assert_close(&found.step(rows.view(), &[position; 2])?, &expected.step(rows.view(), &[position; 2])?);
    }
    let latents = Array3::from_shape_fn((2, 5, generator.embed), |(b, n, e)| (b + n) as f32 * 0.1 - e as f32 * 0.05);
    let image = mock.decode(latents.view())?;
    assert_close(&image, &candle.decode(latents.view())?);
    assert_close(&mock.encode(image.view())?, &candle.encode(image.view())?);
    Ok(())
}

#[test]
fn rows_begin_and_end_at_any_time() -> Result<()> {
    let Both { mock, candle, .. } = both()?;
    let requests = [(Some(0), 9), (Some(1), 3), (None, 5), (Some(1), 7)]
        .map(|(label, tokens)| Request { noise: Noise::Seed(tokens as u64), ..request(&[label], tokens, 3.0) });
    let prepared = requests.each_ref().map(|request| PreparedRequest::new(candle.config(), request));
    let prepared = prepared.into_iter().collect::<Result<Vec<_>>>()?;
    let found = RefCell::new(HashMap::new());
    let mut scheduler = Scheduler::new(&mock, Capacity { images: 2, bytes: u64::MAX });
    for (number, prepared) in prepared.iter().enumerate() {
        let found = &found;
        let events = move |event| {
            if let Event::Token(index, token) = event {
                assert!(found.borrow_mut().insert((number, index), token).is_none());
            }
            ControlFlow::Continue(())
        };
        let (sequence, sampling) = (Sequence::of_batch(prepared).remove(0), prepared.sampling.clone());
        scheduler.submit(Order { number, priority: 0, sequence, sampling, tiling: None, previewed: false, events });
    }
    scheduler.finish()?;
    assert_eq!(scheduler.metrics().done, 4);
    for (number, request) in requests.iter().enumerate() {
        let expected = generate(&candle, request, |_| {})?.tokens;
        for (index, token) in expected.index_axis(Axis(0), 0).rows().into_iter().enumerate() {
            assert_close(&found.borrow()[&(number, index)], &token.to_owned());
        }
    }
    Ok(())
}

#[test]
fn one_upload_and_one_download_a_rollout() -> Result<()> {
    let Both { mock, counts, .. } = both()?;
    generate(&mock, &request(&[Some(0), Some(1)], 12, 3.0), |_| {})?;
    assert_eq!((counts.uploads.get(), counts.downloads.get()), (1, 1));
    Ok(())
}

#[test]
fn past_and_present_change_places() -> Result<()> {
    let Both { mock, counts, .. } = both()?;
    generate(&mock, &request(&[Some(0)], 8, 3.0), |_| {})?;
    let runs = counts.runs.borrow();
    let steps: Vec<&Vec<Binding>> = runs.iter().filter(|(stage, _)| *stage == Stage::Step).map(|(_, b)| b).collect();
    assert_eq!(steps.len(), 7);
    let at = |bindings: &[Binding], name: &str| bindings.iter().find(|binding| binding.name == name).unwrap().address;
    for pair in steps.windows(2) {
        for i in 0..2 {
            for part in ["key", "value"] {
                let (past, present) = (format!("past_key_values.{i}.{part}"), format!("present.{i}.{part}"));
                assert_eq!(at(pair[0], &present), at(pair[1], &past));
                assert_eq!(at(pair[0], &past), at(pair[1], &present));
            }
        }
        for fixed in ["token", "position", "z", "cross.0.key"] {
            assert_eq!(at(pair[0], fixed), at(pair[1], fixed), "{fixed}");
        }
    }
    let all: BTreeSet<Address> = steps[0].iter().map(|binding| binding.address).collect();
    assert_eq!(all.len(), steps[0].len(), "two tensors of a step share a place");
    Ok(())
}

#[test]
fn waits_for_a_token_only_when_the_next_is_on_its_way() -> Result<()> {
    let Both { mock, counts, .. } = both()?;
    let mut runs_at_report = vec![];
    generate(&mock, &request(&[Some(0)], 6, 1.0), |_| runs_at_report.push(counts.runs.borrow().len()))?;
    // One prefill and one flow run, then one step and one flow run per token. Token n is reported after the runs of
    // token n + 1.
    assert_eq!(runs_at_report, [4, 6, 8, 10, 12, 12]);
    Ok(())
}

#[test]
fn a_failure_in_the_middle_leaves_an_engine_that_works() -> Result<()> {
    let Both { mock, candle, counts, memory } = both()?;
    let request = request(&[Some(2)], 7, 3.0);
    let expected = generate(&candle, &request, |_| {})?.tokens;
    for failing in [1, 2, 6, 7] {
        counts.runs.borrow_mut().clear();
        counts.failing.set(Some(failing));
        let error = generate(&mock, &request, |_| {}).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("the mock fails here"), "{error}");
        assert!(memory.borrow().is_empty(), "memory is held after a failure");
        counts.failing.set(None);
        assert_close(&generate(&mock, &request, |_| {})?.tokens, &expected);
    }
    Ok(())
}

#[test]
fn shapes_beyond_the_profile_are_refused_before_anything_runs() -> Result<()> {
    let Both { mock, counts, .. } = both()?;
    let refused = |request: &Request, words: &[&str]| {
        let error = generate(&mock, request, |_| {}).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        for word in words {
            assert!(error.to_string().contains(word), "{error}");
        }
    };
    refused(&request(&[Some(0); 5], 4, 3.0), &["of prefill takes labels from [1] to [8]", "[10]", "max_batch"]);
    refused(&Request { steps: 9, ..request(&[Some(0)], 4, 3.0) }, &["times", "[9]", "largest shapes"]);
    let latents = Array3::zeros((1, 25, mock.config().generator.embed));
    assert!(mock.decode(latents.view()).unwrap_err().to_string().contains("max_tokens"));
    assert!(counts.runs.borrow().is_empty());
    assert_eq!(counts.uploads.get(), 0);
    Ok(())
}

#[test]
fn a_token_that_is_not_finite_is_named() -> Result<()> {
    let Both { mock, candle, .. } = both()?;
    let mut request = request(&[Some(0)], 5, 1.0);
    let mut noise = Array3::zeros((1, 5, candle.config().generator.embed));
    noise[[0, 3, 0]] = f32::MAX;
    request.noise = Noise::Given(noise);
    let problem = |engine: &dyn Engine| {
        let error = generate(engine, &request, |_| {}).unwrap_err().to_string();
        error.strip_prefix(engine.name()).expect("the engine's name").to_string()
    };
    let expected = problem(&candle);
    assert!(expected.contains(" is not finite"), "{expected}");
    assert_eq!(problem(&mock), expected);
    Ok(())
}
