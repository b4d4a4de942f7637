//! `eqim-run --jobs`: generates many images from one file in batches. When a job is done, the next job takes its place
//! in the batch.

use std::cell::RefCell;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use eqim::bundle::Int8Target;
use eqim::engine::Engine;
use eqim::generate::batch::{Sequence, generate_all};
use eqim::generate::memory::check_memory;
use eqim::generate::tiles::Tiling;
use eqim::request::condition::ClassSchedule;
use eqim::request::settings::{Settings, TileSize};
use eqim::request::{PreparedRequest, Request, Sampling};
use eqim::{Error, Result, ResultExt, files};
use ndarray::Array2;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::arguments::Arguments;
use super::decode::decode_to;
use super::finish::Finish;
use super::inputs::{self, Inputs, Prefix};
use super::outputs;
use eqim::bundle::Bundle;
use eqim_cli::Progress;

/// Settings and weights of an image. The record is written next to the image, so that a resumed run knows which jobs
/// are done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    settings: Settings,
    /// SHA-256 of the weights.
    weights: String,
}

/// A valid job.
struct Job {
    id: String,
    record: Record,
    tiling: Option<Tiling>,
    request: Request,
    prefix: Option<Prefix>,
    finish: Finish,
}

/// Output folder and progress of the jobs of a file.
struct JobRunner<'a> {
    /// The file of the jobs.
    file: &'a Path,
    /// The folder of the images.
    folder: &'a Path,
    progress: Progress,
    done: usize,
    failed: usize,
}

/// Runs the jobs of a file.
///
/// # Errors
/// [`Error::input`] if a flag or a file cannot be used; [`Error::run`] if the engine fails, or at the end if jobs
/// failed.
pub fn run(arguments: &Arguments, file: &Path) -> Result<()> {
    let subject = format!("--jobs {}", file.display());
    let text = std::fs::read_to_string(file).or_input(&subject)?;
    let missing = || Error::input("--output", "is missing: --jobs requires a folder for the images");
    let folder = arguments.output.as_deref().ok_or_else(missing)?;
    let bundle = Bundle::open(&arguments.engine)?;
    outputs::prepare_folder(folder, &bundle.folder)?;
    let is_dynamic = bundle.manifest.quantization.as_ref().is_some_and(|it| it.target == Int8Target::Cpu);
    if is_dynamic && arguments.max_batch > 1 {
        let effect = "rows of a batch share the ranges of dynamic quantization, so images differ within INT8's error";
        tracing::warn!("{}: {effect} from those of --max-batch 1", bundle.folder.display());
    }
    let lines: Vec<(usize, &str)> = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).collect();
    let shared = |index: usize| arguments.shard.is_none_or(|shard| shard.holds(index));
    let mine = lines.into_iter().enumerate().filter(|(index, _)| shared(*index)).map(|(_, line)| line);
    let mine: Vec<(usize, &str)> = mine.collect();
    let mut runner =
        JobRunner { file, folder, progress: Progress::new("finished", mine.len(), "jobs"), done: 0, failed: 0 };
    let jobs = runner.jobs(arguments, &bundle, &mine)?;
    let before = runner.done;
    if !jobs.is_empty() {
        let engine = eqim_engines::open(&bundle, arguments.options()?)?;
        let shared = RefCell::new(&mut runner);
        for jobs in alike(jobs) {
            batches(engine.as_ref(), jobs, arguments, &shared)?;
        }
    }
    let JobRunner { done, failed, progress, .. } = runner;
    drop(progress);
    eqim_cli::note(format_args!("{} jobs done, {before} done before, {failed} failed", done - before));
    if failed > 0 {
        return Err(Error::run(
            subject,
            format!("{failed} jobs failed, see the error in the output line of each; the others are done"),
        ));
    }
    Ok(())
}

/// Groups jobs that can share a batch.
fn alike(jobs: Vec<Job>) -> Vec<Vec<Job>> {
    let key = |job: &Job| (job.request.cfg != 1.0, job.request.solver, job.request.steps);
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
fn batches(engine: &dyn Engine, jobs: Vec<Job>, arguments: &Arguments, runner: &RefCell<&mut JobRunner>) -> Result<()> {
    let (config, most) = (engine.config(), arguments.max_batch);
    let mut together = jobs[0].request.clone();
    together.classes = vec![ClassSchedule::Constant(None); most.min(jobs.len())];
    check_memory(&together, config, jobs[0].tiling)
        .map_err(|error| error.about("max_batch").with_field("max_batch"))?;
    let sampling = Sampling::new(config, &jobs[0].request);
    let named = |job: &Job| (job.id.clone(), job.record.clone(), job.tiling, job.finish.clone());
    let names: Vec<(String, Record, Option<Tiling>, Finish)> = jobs.iter().map(named).collect();
    let images = jobs.into_iter().enumerate().filter_map(|(number, job)| match job.image(engine) {
        Ok(image) => Some(Ok((number, image))),
        Err(error) => runner.borrow_mut().finish(&names[number].0, Err(error)).err().map(Err),
    });
    generate_all(engine, sampling, images, most, |(number, tokens)| {
        let runner = &mut *runner.borrow_mut();
        let (id, record, tiling, finish) = &names[number];
        let written = tokens.and_then(|tokens| write(engine, (runner.folder, id), record, (*tiling, finish), tokens));
        runner.finish(id, written)
    })
}

/// Decodes the tokens `[N, E]` of a job, writes the image, and then writes the record.
fn write(
    engine: &dyn Engine,
    (folder, id): (&Path, &str),
    record: &Record,
    (tiling, finish): (Option<Tiling>, &Finish),
    tokens: Array2<f32>,
) -> Result<PathBuf> {
    let path = image_path(folder, id);
    decode_to(engine, tokens.view(), tiling, finish, &path, &mut Duration::default())?;
    files::write_json(&record_path(folder, id), record)?;
    Ok(path)
}

fn image_path(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("{id}.png"))
}

fn record_path(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("{id}.json"))
}

impl JobRunner<'_> {
    /// Jobs of the given lines that are not done yet. Line numbers start at 0. Lines that are not valid jobs are
    /// reported as failed.
    fn jobs(&mut self, arguments: &Arguments, bundle: &Bundle, lines: &[(usize, &str)]) -> Result<Vec<Job>> {
        let mut jobs = vec![];
        let mut ids = HashSet::new();
        for &(number, text) in lines {
            let line = format!("{} line {}", self.file.display(), number + 1);
            let fallback = (number + 1).to_string();
            let (id, job) = match read_line(text) {
                Ok((id, settings)) => {
                    let id = id.unwrap_or(fallback);
                    let known = if ids.insert(id.clone()) {
                        check_id(&id)
                    } else {
                        Err(Error::input("id", "is the id of an earlier job"))
                    };
                    let job = known.and_then(|()| Job::new(arguments, bundle, id.clone(), settings));
                    (id, job.map_err(|error| error.about(&line)))
                }
                Err(error) => (fallback, Err(error.about(&line))),
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

    /// Reports the result of a job.
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

/// Checks that an id is a valid file name.
fn check_id(id: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if id.is_empty() || id.starts_with('.') || id.len() > 200 || !id.chars().all(fits) {
        let problem = format!("is {id:?}, expected letters, digits, '.', '_' and '-': it names the image");
        return Err(Error::input("id", problem));
    }
    Ok(())
}

/// Parses the id and the settings of a line.
fn read_line(text: &str) -> Result<(Option<String>, Settings)> {
    let mut object: Map<String, Value> = serde_json::from_str(text).or_input("a job")?;
    let id = match object.remove("id") {
        None | Some(Value::Null) => None,
        Some(Value::String(id)) => Some(id),
        Some(other) => return Err(Error::input("id", format!("is {other}, expected a string"))),
    };
    Ok((id, Settings::from_json(object)?))
}

impl Job {
    fn new(arguments: &Arguments, bundle: &Bundle, id: String, settings: Settings) -> Result<Self> {
        let settings = settings.over(&arguments.settings);
        // The folder of all images is not a folder of tiles, so it is not passed as the output.
        let Inputs { request, prefix, finish, tiling } = inputs::read(&settings, None, None, &bundle.manifest.model)?;
        if request.classes.len() > 1 {
            return Err(Error::setting("class", format!("names {} classes, expected one", request.classes.len())));
        }
        let tile = tiling.map_or(TileSize::Whole, |tiling| TileSize::Tokens(tiling.tile));
        let overlap = tiling.map(|tiling| tiling.overlap);
        let settings = Settings { tile: Some(tile), overlap, ..settings.resolved(&request, 0) };
        let record = Record { settings, weights: bundle.manifest.weights.sha256.clone() };
        Ok(Self { id, record, tiling, request, prefix, finish })
    }

    /// Whether the image already exists with the same settings and weights.
    fn is_done(&self, folder: &Path) -> bool {
        let record = std::fs::read(record_path(folder, &self.id)).ok();
        let record = record.and_then(|text| serde_json::from_slice::<Record>(&text).ok());
        record.as_ref() == Some(&self.record) && image_path(folder, &self.id).is_file()
    }

    /// Encodes the prefix and returns the sequence to generate.
    fn image(mut self, engine: &dyn Engine) -> Result<Sequence> {
        if let Some(prefix) = self.prefix {
            self.request.prefix = Some(prefix.encode(engine, 1)?);
        }
        let prepared = PreparedRequest::new(engine.config(), &self.request)?;
        Sequence::of_batch(&prepared).pop().ok_or_else(|| Error::run(self.id, "has no image"))
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
