//! `eqim-run --jobs`: many images from one file, in batches whose places go to the next job as soon as one is done.

use std::cell::RefCell;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use eqim::bundle::Flavour;
use eqim::engine::Engine;
use eqim::generate::batch::{Image, generate_all};
use eqim::generate::memory::check_memory;
use eqim::generate::tiles::Tiling;
use eqim::picture::Side;
use eqim::request::Sampling;
use eqim::request::condition::Label;
use eqim::request::solver::Solver;
use eqim::request::{Request, Rollout, Schedule};
use eqim::{Error, Result, files};
use ndarray::Array2;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::arguments::Arguments;
use super::arguments::Spans;
use super::decode::decode_to;
use super::finish::Finish;
use super::inputs::{self, Inputs, Prefix};
use super::outputs;
use eqim::bundle::Bundle;
use eqim_cli::Progress;

/// A line of the file. What it leaves out is as the flags say.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Line {
    id: Option<String>,
    class: Option<Class>,
    classes: Option<String>,
    seed: Option<u64>,
    tokens: Option<usize>,
    width: Option<usize>,
    cfg: Option<f32>,
    cfg_schedule: Option<Schedule>,
    solver: Option<Solver>,
    steps: Option<usize>,
    prefix: Option<PathBuf>,
    direction: Option<Side>,
    keep_prefix_pixels: Option<bool>,
}

/// A class by number or name.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Class {
    Number(usize),
    Name(String),
}

/// What an image was made from: it stands beside the image, so that a run that goes on knows what is done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    class: Label,
    seed: u64,
    tokens: usize,
    cfg: f32,
    cfg_schedule: Schedule,
    solver: Solver,
    steps: usize,
    prefix: Option<PathBuf>,
    #[serde(default)]
    direction: Side,
    #[serde(default)]
    keep_prefix_pixels: bool,
    /// Tokens of a tile, and those that two share, where it was decoded in tiles.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tiles: Option<(usize, usize)>,
    /// SHA-256 of the weights.
    weights: String,
}

impl Record {
    /// How the image is decoded.
    fn tiling(&self) -> Option<Tiling> {
        self.tiles.map(|(tile, overlap)| Tiling { tile, overlap })
    }
}

/// A job that can run.
struct Job {
    id: String,
    record: Record,
    request: Request,
    prefix: Option<Prefix>,
    finish: Finish,
}

/// How far the jobs of a file are.
struct Desk<'a> {
    folder: &'a Path,
    progress: Progress,
    done: usize,
    failed: usize,
}

/// Runs the jobs of a file.
///
/// # Errors
/// [`Error::Input`] for flags and files that cannot be used; [`Error::Run`] when the engine fails, or at the end when jobs
/// failed.
pub fn run(arguments: &Arguments, file: &Path) -> Result<()> {
    let subject = format!("--jobs {}", file.display());
    let text = std::fs::read_to_string(file).map_err(|error| Error::input(&subject, error))?;
    let missing = || Error::input("--output", "is not given: --jobs needs a folder for its images");
    let folder = arguments.output.as_deref().ok_or_else(missing)?;
    let bundle = Bundle::open(&arguments.engine)?;
    outputs::prepare_folder(folder, &bundle.folder)?;
    let is_dynamic = bundle.manifest.quantization.as_ref().is_some_and(|it| it.flavour == Flavour::Cpu);
    if is_dynamic && arguments.max_batch > 1 {
        let effect = "rows of a batch share the ranges of dynamic quantization, so images differ within INT8's error";
        tracing::warn!("{}: {effect} from those of --max-batch 1", bundle.folder.display());
    }
    let lines: Vec<(usize, &str)> = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).collect();
    let shared = |index: usize| arguments.shard.is_none_or(|shard| shard.holds(index));
    let mine = lines.into_iter().enumerate().filter(|(index, _)| shared(*index)).map(|(_, line)| line);
    let mine: Vec<(usize, &str)> = mine.collect();
    let mut desk = Desk { folder, progress: Progress::new("finished", mine.len(), "jobs"), done: 0, failed: 0 };
    let jobs = desk.jobs(arguments, &bundle, &mine)?;
    let before = desk.done;
    if !jobs.is_empty() {
        let engine = eqim_engines::open(&bundle, arguments.options()?)?;
        let shared = RefCell::new(&mut desk);
        for jobs in alike(jobs) {
            batches(engine.as_ref(), jobs, arguments, &shared)?;
        }
    }
    let Desk { done, failed, progress, .. } = desk;
    drop(progress);
    eqim_cli::note(format_args!("{} jobs done, {before} done before, {failed} failed", done - before));
    if failed > 0 {
        return Err(Error::run(subject, format!("{failed} jobs failed, as their lines say; the others are done")));
    }
    Ok(())
}

/// Jobs that can share a batch.
fn alike(jobs: Vec<Job>) -> Vec<Vec<Job>> {
    let key = |job: &Job| (job.record.cfg != 1.0, job.record.solver, job.record.steps);
    let mut groups: Vec<Vec<Job>> = vec![];
    for job in jobs {
        match groups.iter_mut().find(|group| key(&group[0]) == key(&job)) {
            Some(group) => group.push(job),
            None => groups.push(vec![job]),
        }
    }
    groups
}

/// Runs jobs that can share a batch.
fn batches(engine: &dyn Engine, jobs: Vec<Job>, arguments: &Arguments, desk: &RefCell<&mut Desk>) -> Result<()> {
    let (config, most) = (engine.config(), arguments.max_batch);
    let mut together = jobs[0].request.clone();
    together.labels = vec![Label::One(None); most.min(jobs.len())];
    check_memory(&together, config, jobs[0].record.tiling()).map_err(|error| Error::input("--max-batch", error))?;
    let sampling = Sampling::new(config, &jobs[0].request);
    let named = |job: &Job| (job.id.clone(), job.record.clone(), job.finish.clone());
    let names: Vec<(String, Record, Finish)> = jobs.iter().map(named).collect();
    let images = jobs.into_iter().enumerate().filter_map(|(number, job)| match job.image(engine) {
        Ok(image) => Some(Ok((number, image))),
        Err(error) => desk.borrow_mut().finish(&names[number].0, Err(error)).err().map(Err),
    });
    generate_all(engine, sampling, images, most, |(number, tokens)| {
        let desk = &mut *desk.borrow_mut();
        let (id, record, finish) = &names[number];
        let written = tokens.and_then(|tokens| write(engine, (desk.folder, id), record, finish, tokens));
        desk.finish(id, written)
    })
}

/// Decodes a job's tokens `[N, E]` and writes its image, then its record.
fn write(
    engine: &dyn Engine,
    (folder, id): (&Path, &str),
    record: &Record,
    finish: &Finish,
    tokens: Array2<f32>,
) -> Result<PathBuf> {
    let path = image_path(folder, id);
    decode_to(engine, tokens.view(), record.tiling(), finish, &path, &mut Duration::default())?;
    files::write_json(&record_path(folder, id), record)?;
    Ok(path)
}

fn image_path(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("{id}.png"))
}

fn record_path(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("{id}.json"))
}

impl Desk<'_> {
    /// The jobs of some lines, numbered from 0, that are still to be done. Lines that are no jobs have failed.
    fn jobs(&mut self, arguments: &Arguments, bundle: &Bundle, lines: &[(usize, &str)]) -> Result<Vec<Job>> {
        let mut jobs = vec![];
        let mut ids = HashSet::new();
        for &(number, text) in lines {
            let fallback = (number + 1).to_string();
            let (id, job) = match serde_json::from_str::<Line>(text) {
                Ok(line) => {
                    let id = line.id.clone().unwrap_or(fallback);
                    let known = if ids.insert(id.clone()) {
                        check_id(&id)
                    } else {
                        Err(Error::input("id", "is another job's too"))
                    };
                    (id.clone(), known.and_then(|()| Job::new(arguments, bundle, id, line)))
                }
                Err(error) => (fallback, Err(Error::input(format!("line {}", number + 1), error))),
            };
            match job {
                Ok(job) if job.is_done(self.folder) => {
                    self.done += 1;
                    self.progress.at(self.done + self.failed);
                }
                Ok(job) => jobs.push(job),
                Err(error) => self.finish(&id, Err(error))?,
            }
        }
        Ok(jobs)
    }

    /// Reports how a job ended.
    fn finish(&mut self, id: &str, image: Result<PathBuf>) -> Result<()> {
        let line = match image {
            Ok(path) => {
                self.done += 1;
                json!({ "id": id, "file": path })
            }
            Err(error) => {
                self.failed += 1;
                json!({ "id": id, "error": error.to_string() })
            }
        };
        self.progress.at(self.done + self.failed);
        eqim_cli::print(line)
    }
}

/// Checks that an id can name a file.
fn check_id(id: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if id.is_empty() || id.starts_with('.') || id.len() > 200 || !id.chars().all(fits) {
        let problem = format!("is {id:?}, expected letters, digits, '.', '_' and '-': it names the image");
        return Err(Error::input("id", problem));
    }
    Ok(())
}

impl Job {
    fn new(arguments: &Arguments, bundle: &Bundle, id: String, line: Line) -> Result<Self> {
        let mut own = arguments.clone();
        if line.class.is_some() && line.classes.is_some() {
            return Err(Error::input("class", "and classes are given, expected one of them"));
        }
        if let Some(class) = line.class {
            let class = match class {
                Class::Number(number) => number.to_string(),
                Class::Name(name) => name,
            };
            (own.classes, own.spans) = (vec![class], None);
        }
        if let Some(classes) = line.classes {
            own.spans = Some(Spans::parse(&classes).map_err(|problem| Error::input("classes", problem))?);
        }
        own.seed = line.seed.unwrap_or(own.seed);
        if line.tokens.is_some() && line.width.is_some() {
            return Err(Error::input("tokens", "and width are given, expected one of them"));
        }
        if line.tokens.is_some() || line.width.is_some() {
            (own.tokens, own.width) = (line.tokens, line.width);
        }
        own.cfg = line.cfg.unwrap_or(own.cfg);
        own.cfg_schedule = line.cfg_schedule.unwrap_or(own.cfg_schedule);
        own.solver = line.solver.unwrap_or(own.solver);
        own.steps = line.steps.or(own.steps);
        own.prefix = line.prefix.or(own.prefix);
        own.direction = line.direction.unwrap_or(own.direction);
        own.keep_prefix_pixels = line.keep_prefix_pixels.unwrap_or(own.keep_prefix_pixels);
        // The folder of all images is no folder of tiles.
        own.output = None;
        let Inputs { request, prefix, finish, tiling } = inputs::read(&own, &bundle.manifest.model)?;
        let tiles = tiling.map(|tiling| (tiling.tile, tiling.overlap));
        let record = Record {
            class: request.labels[0].clone(),
            seed: own.seed,
            tokens: request.tokens,
            cfg: request.cfg,
            cfg_schedule: request.schedule,
            solver: request.solver,
            steps: request.steps,
            prefix: own.prefix,
            direction: own.direction,
            keep_prefix_pixels: own.keep_prefix_pixels,
            tiles,
            weights: bundle.manifest.weights.sha256.clone(),
        };
        Ok(Self { id, record, request, prefix, finish })
    }

    /// Whether its image is there already, made from the same.
    fn is_done(&self, folder: &Path) -> bool {
        let record = std::fs::read(record_path(folder, &self.id)).ok();
        let record = record.and_then(|text| serde_json::from_slice::<Record>(&text).ok());
        record.as_ref() == Some(&self.record) && image_path(folder, &self.id).is_file()
    }

    /// Its image, ready to be generated.
    fn image(mut self, engine: &dyn Engine) -> Result<Image> {
        if let Some(prefix) = self.prefix {
            self.request.prefix = Some(prefix.encode(engine, 1)?);
        }
        let rollout = Rollout::new(engine.config(), &self.request)?;
        Image::all(&rollout).pop().ok_or_else(|| Error::run(self.id, "has no image"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_of_files() {
        assert!(["a", "7", "x_1.b-2"].iter().all(|id| check_id(id).is_ok()));
        assert!(["", ".", ".hidden", "../up", "a/b", "a b", "ä"].iter().all(|id| check_id(id).is_err()));
    }
}
