//! `eqim-bench`: measures how fast bundles run, and checks that their tokens agree.

mod arguments;
mod contest;
mod equivariance;
mod photos;
mod predict;
mod probe;
mod probed;
mod pytorch;
mod reference;
mod report;
mod roofline;
mod solvers;
mod statistics;
mod tiling;
mod workload;

use std::cell::RefCell;
use std::ffi::OsString;
use std::rc::Rc;
use std::time::{Duration, Instant};

use arguments::Arguments;
use clap::Parser;
use eqim::engine::candle::{CandleEngine, open_device};
use eqim::model::Stage;
use eqim::request::Request;
use eqim::request::random::TorchRng;
use eqim::request::solver::Solver;
use eqim::request::timing::CallTimes;
use eqim::{Config, Error, Result, files};
use ndarray::Array3;

use contest::Candidate;
use eqim::bundle::Bundle;
use eqim::generate::memory::{check_memory, check_sampling};
use eqim_cli::Spinner;
use eqim_cli::memory;
use eqim_engines::onnxruntime::Runtime;
use eqim_engines::{Options, native};
use equivariance::Subject;
use predict::Prediction;
use probe::Probe;
use pytorch::{PyTorch, PyTorchOptions, Variant};
use reference::Reference;
use report::{BenchReport, Case, Measurement, StageMeasurement};
use roofline::Effort;
use statistics::Summary;
use workload::{Calls, TimedBatch, Workload};

/// Runs the program with its arguments, the first of which is its name. Returns the exit code of the process.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let arguments = Arguments::parse_from(arguments);
    eqim_cli::main(|| run(&arguments))
}

/// Runs the measurements that the flags describe.
///
/// # Errors
/// [`Error::input`] if something cannot be measured; [`Error::run`] if a run fails, or if tokens do not agree.
fn run(arguments: &Arguments) -> Result<()> {
    let bundles = arguments.engines.iter().map(|folder| Bundle::open(folder)).collect::<Result<Vec<_>>>()?;
    let config = bundles[0].manifest.model.clone();
    check(arguments, &bundles)?;
    if !arguments.on.is_empty() {
        return written(arguments, &predictions(arguments, &config)?);
    }
    let spinner = Spinner::new();
    let candidates = candidates(arguments, bundles, &spinner)?;
    let probe = if arguments.is_cpu() { probe()? } else { None };
    let mut report = BenchReport::default();
    if arguments.solvers || arguments.tiling || arguments.equivariance {
        let request = request(arguments, &config, arguments.batch[0], arguments.tokens[0]);
        let show = &mut |what| spinner.show(what);
        let Some(engine) = candidates.iter().find_map(Candidate::bundle_engine) else { return Ok(()) };
        if arguments.solvers {
            report.solvers = solvers::solve(&candidates, &request, arguments.seed(), show)?;
        } else if arguments.tiling {
            report.tiling = Some(tiling::try_tiles(engine, &request, arguments.images.as_deref(), show)?);
        } else if let Some(images) = &arguments.images {
            let (seed, &Arguments { trained, positions, .. }) = (arguments.seed(), arguments);
            let subject = Subject { engine, images, trained, positions, seed };
            report.equivariance = Some(equivariance::measure(&subject, show)?);
        }
    } else {
        for &batch in &arguments.batch {
            for &tokens in &arguments.tokens {
                report.cases.push(case(arguments, &candidates, probe.as_ref(), (batch, tokens), &spinner)?);
            }
        }
    }
    spinner.finish();
    written(arguments, &report)?;
    match (&arguments.plot, &report.equivariance) {
        (Some(path), Some(found)) => found.draw(path, &arguments.engines[0].display().to_string())?,
        (Some(path), None) => solvers::Solved::draw(&report.solvers, path)?,
        (None, _) => {}
    }
    let differs = |result: &&Measurement| result.agreement.is_some_and(|agreement| !agreement.agrees);
    match report.cases.iter().flat_map(|case| &case.results).find(differs) {
        Some(result) => {
            Err(Error::run(&result.name, "its tokens differ from those of the reference: see the comparison above"))
        }
        None => Ok(()),
    }
}

/// Prints a report, and writes it to the files that the flags name.
fn written(arguments: &Arguments, report: &BenchReport) -> Result<()> {
    eqim_cli::print(report.text())?;
    if let Some(path) = &arguments.export_json {
        files::write_json(path, report)?;
    }
    if let Some(path) = &arguments.export_markdown {
        files::write(path, report.markdown().as_bytes())?;
    }
    Ok(())
}

/// Predicts the limits of the machines of `--on` for every batch size and length.
fn predictions(arguments: &Arguments, config: &Config) -> Result<BenchReport> {
    let mut report = BenchReport::default();
    for machine in &arguments.on {
        for &batch in &arguments.batch {
            for &tokens in &arguments.tokens {
                let request = request(arguments, config, batch, tokens);
                report.predictions.push(Prediction::new(machine, config, &request)?);
            }
        }
    }
    Ok(report)
}

/// Checks that all requested measurements are possible, and that their results can be written.
fn check(arguments: &Arguments, bundles: &[Bundle]) -> Result<()> {
    let outputs = [
        ("--export-json", &arguments.export_json),
        ("--export-markdown", &arguments.export_markdown),
        ("--plot", &arguments.plot),
    ];
    for (flag, path) in outputs.into_iter().filter_map(|(flag, path)| Some((flag, path.as_ref()?))) {
        files::check_output(path).map_err(|error| error.about(flag))?;
    }
    if let Some(device) = &arguments.device {
        open_device(device)?;
    }
    let first = &bundles[0].manifest;
    for bundle in &bundles[1..] {
        if !bundle.manifest.model.is_same_model(&first.model) {
            return Err(Error::input(bundle.folder.display(), "has another model than the first --engine"));
        }
    }
    if (arguments.reference || arguments.pytorch.is_some()) && !first.is_fp32() {
        let problem = "provides the weights of the reference, expected a bundle in FP32: name an FP32 bundle first";
        return Err(Error::input(bundles[0].folder.display(), problem));
    }
    for &tokens in &arguments.tokens {
        if let Some(tail) = arguments.tail.filter(|tail| *tail >= tokens) {
            return Err(Error::input(
                "--tail",
                format!("is {tail}, expected fewer than the {tokens} tokens of an image"),
            ));
        }
        for &batch in &arguments.batch {
            let request = request(arguments, &first.model, batch, tokens);
            request.check(&first.model)?;
            match arguments.tail {
                Some(_) => check_sampling(&request, &first.model)?,
                None => check_memory(&request, &first.model, None)?,
            }
        }
    }
    Ok(())
}

/// All candidates. The others are compared with the first one.
fn candidates(arguments: &Arguments, bundles: Vec<Bundle>, spinner: &Spinner) -> Result<Vec<Candidate>> {
    let mut all = vec![];
    let first = &bundles[0];
    if let (Some(checkout), Some(python)) = (&arguments.pytorch, &arguments.python) {
        spinner.show("starting PyTorch".into());
        let embed = first.manifest.model.generator.embed;
        let options =
            PyTorchOptions { device: arguments.device.as_deref(), threads: arguments.threads.last().copied() };
        let pytorch = Rc::new(PyTorch::start(checkout, python, &first.folder, options, embed)?);
        let tuned = arguments.pytorch_tuned.then(|| pytorch.tuned()).into_iter().flatten();
        let variants = [Variant::Reference].into_iter().chain(tuned);
        all.extend(variants.map(|variant| Candidate::PyTorch(Rc::clone(&pytorch), variant)));
    }
    if arguments.reference {
        let (config, weights) = first.load_weights()?;
        all.push(Candidate::Reference(Box::new(Reference(CandleEngine::new(config, weights)))));
    }
    let threads: Vec<Option<usize>> = match arguments.threads.as_slice() {
        [] => vec![None],
        some => some.iter().copied().map(Some).collect(),
    };
    for bundle in bundles {
        spinner.show(format!("loading {}", bundle.folder.display()));
        for &threads in &threads {
            let (backend, providers, device) =
                (arguments.backend, arguments.providers.clone(), arguments.device.clone());
            let options = Options { backend, threads, providers, device, cuda_graph: false };
            let engine = eqim_engines::open(&bundle, &options)?;
            all.push(Candidate::Bundle(Box::new(bundle.clone()), engine, threads));
        }
    }
    Ok(all)
}

/// Prepares the measurement of the limits of this machine's CPU; `None` if ONNX Runtime is not found.
fn probe() -> Result<Option<RefCell<Probe>>> {
    match native::find_onnxruntime() {
        Ok(library) => Ok(Some(RefCell::new(Probe::new(Runtime::load(&library, None)?)?))),
        Err(problem) => {
            tracing::warn!("{problem}; the machine's limits are not measured");
            Ok(None)
        }
    }
}

/// Request of a case: the classes in turn, and noise from one seed.
fn request(arguments: &Arguments, config: &Config, batch: usize, tokens: usize) -> Request {
    let classes = (0..batch).map(|row| Some(row % config.generator.class_num));
    arguments.sampling.apply(Request::new(config, classes, tokens))
}

/// Gives all tokens of a request but the last `tail`, as noise.
fn with_prefix(arguments: &Arguments, config: &Config, request: Request, tail: usize) -> Request {
    let (batch, given, embed) = (request.classes.len(), request.tokens - tail, config.generator.embed);
    let values = TorchRng::new(!arguments.seed()).randn(batch * given * embed);
    let prefix = Array3::from_shape_fn((batch, given, embed), |(b, n, e)| values[(b * given + n) * embed + e]);
    Request { prefix: Some(prefix), ..request }
}

/// Times of all batches of one candidate.
#[derive(Default)]
struct Samples {
    calls: Calls,
    total: CallTimes,
    first: CallTimes,
    peak: u64,
    tokens: Option<Array3<f32>>,
}

impl Samples {
    fn add(&mut self, image: TimedBatch, whole: bool) {
        if whole {
            self.first.0.extend(image.first_token());
        }
        self.calls.extend(image.calls);
        self.total.0.push(image.total);
        self.tokens = Some(image.tokens);
    }
}

/// Measures all candidates in turn on the same workload.
fn case(
    arguments: &Arguments,
    candidates: &[Candidate],
    probe: Option<&RefCell<Probe>>,
    (batch, tokens): (usize, usize),
    spinner: &Spinner,
) -> Result<Case> {
    let Some(Candidate::Bundle(bundle, ..)) = candidates.iter().find(|it| !it.is_reference()) else {
        return Err(Error::run("bench", "no bundle is measured"));
    };
    let config = bundle.manifest.model.clone();
    let ours = request(arguments, &config, batch, tokens);
    let ours = match arguments.tail {
        Some(tail) => with_prefix(arguments, &config, ours, tail),
        None => ours,
    };
    let own_way = ours.solver == Solver::Euler;
    let theirs = Request {
        solver: Solver::Euler,
        steps: if own_way { ours.steps } else { config.generator.steps },
        ..ours.clone()
    };
    let work = |candidate: &Candidate| Workload {
        request: if candidate.is_reference() { theirs.clone() } else { ours.clone() },
        seed: arguments.seed(),
        decode: arguments.tail.is_none(),
    };
    let mut all: Vec<Samples> = candidates.iter().map(|_| Samples::default()).collect();
    match arguments.stage {
        Some(stage) => {
            for (candidate, times) in candidates.iter().zip(&mut all) {
                spinner.show(format!("{}: {}", candidate.name(), stage.name()));
                memory::forget_peak();
                times.calls = one_stage(arguments, candidate, stage, &ours, probe)?;
                times.peak = peak(probe);
            }
        }
        None => {
            for candidate in candidates {
                spinner.show(format!("{}: warming up", candidate.name()));
                warm_up(arguments, candidate, &work(candidate))?;
            }
            let start = Instant::now();
            let mut rounds = 0;
            while rounds < arguments.iterations || start.elapsed() < Duration::from_secs(arguments.duration) {
                for (candidate, times) in candidates.iter().zip(&mut all) {
                    spinner.show(format!("{}: batch {batch}, {tokens} tokens, round {rounds}", candidate.name()));
                    memory::forget_peak();
                    let image = candidate.run(&work(candidate), probe)?;
                    match arguments.tail {
                        Some(tail) => times.add(image.last(tail), false),
                        None => times.add(image, true),
                    }
                    times.peak = times.peak.max(peak(probe));
                }
                rounds += 1;
            }
        }
    }
    let generated = arguments.tail.unwrap_or(tokens);
    let evaluations = ours.solver.evaluations(ours.steps);
    let results = measurements(arguments, candidates, all, (&ours, own_way))?;
    Ok(Case { batch, tokens, generated, cfg: ours.cfg, solver: ours.solver.to_string(), evaluations, results })
}

/// Generates short images until the warm-up time is over. The first runs allocate memory and read files.
fn warm_up(arguments: &Arguments, candidate: &Candidate, work: &Workload) -> Result<()> {
    let request = Request { tokens: 2, prefix: None, ..work.request.clone() };
    let short = Workload { request, ..work.clone() };
    let start = Instant::now();
    loop {
        candidate.run(&short, None)?;
        if start.elapsed() >= Duration::from_millis(arguments.warm_up) {
            return Ok(());
        }
    }
}

/// Peak memory of the candidates: that of the process without the buffer of the probe.
fn peak(probe: Option<&RefCell<Probe>>) -> u64 {
    memory::peak().saturating_sub(probe.map_or(0, |probe| probe.borrow().bytes()))
}

/// Measures one stage of a candidate.
fn one_stage(
    arguments: &Arguments,
    candidate: &Candidate,
    stage: Stage,
    request: &Request,
    probe: Option<&RefCell<Probe>>,
) -> Result<Calls> {
    let start = Instant::now();
    let warm_up = Duration::from_millis(arguments.warm_up);
    candidate.run_stage(stage, request, None, |count| count == 0 || start.elapsed() < warm_up)?;
    let start = Instant::now();
    let duration = Duration::from_secs(arguments.duration);
    candidate.run_stage(stage, request, probe, |count| count < arguments.iterations || start.elapsed() < duration)
}

/// Summarizes the times of all candidates. Ratios are relative to the first candidate.
fn measurements(
    arguments: &Arguments,
    candidates: &[Candidate],
    all: Vec<Samples>,
    (request, own_way): (&Request, bool),
) -> Result<Vec<Measurement>> {
    let rounds = all[0].total.0.len().max(1) as f64;
    let mut results: Vec<Measurement> = vec![];
    for (index, (candidate, times)) in candidates.iter().zip(&all).enumerate() {
        let mut stages = vec![];
        for stage in Stage::ALL {
            let calls = times.calls.of(stage);
            let seconds: Vec<Duration> = calls.iter().map(|call| call.time).collect();
            let Some(call) = Summary::new(&seconds, &arguments.percentiles) else { continue };
            let effort = candidate.work(stage, request)?.and_then(|work| Effort::new(&work, calls));
            stages.push(StageMeasurement { stage: stage.name(), calls: call.count as f64 / rounds, call, effort });
        }
        let batch = Summary::new(&times.total.0, &arguments.percentiles);
        let exactly = own_way || !candidates[0].is_reference();
        let agreement = match (&all[0].tokens, &times.tokens) {
            (Some(expected), Some(found)) if index > 0 => Some(candidate.agreement(found, expected, exactly)),
            _ => None,
        };
        let ratio = match (agreement, &batch, results.first().and_then(|first| first.batch.as_ref())) {
            (Some(agreement), Some(batch), Some(first)) if agreement.agrees => Some(first.median / batch.median),
            _ => None,
        };
        results.push(Measurement {
            name: candidate.name(),
            is_reference: candidate.is_reference(),
            first_token: Summary::new(&times.first.0, &arguments.percentiles),
            batch,
            stages,
            peak_bytes: times.peak,
            agreement,
            ratio,
        });
    }
    Ok(results)
}
