//! `eqim-run --jobs`: generates many images from one file in batches. When a job is done, the next job takes its place
//! in the batch.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use eqim::bundle::{Bundle, Int8Target};
use eqim::digest::sha256_of;
use eqim::engine::Engine;
use eqim::generate::batch::{Sequence, generate_all};
use eqim::generate::memory::check_memory;
use eqim::generate::tiles::Tiling;
use eqim::picture::Side;
use eqim::request::condition::ClassSchedule;
use eqim::request::jobs::{self, Line, check_id};
use eqim::request::{PreparedRequest, Request, Sampling};
use eqim::{Error, Result, ResultExt, files};
use eqim_cli::Progress;
use ndarray::{Array2, Array3};
use serde_json::json;

use super::arguments::Arguments;
use super::decode::decode_to;
use super::finish::Finish;
use super::inputs::{self, Prefix};
use super::job::Job;
use super::outputs;

/// Runs the jobs of a file.
///
/// # Errors
/// [`Error::input`] if a flag or a file cannot be used; [`Error::run`] if the engine fails, or at the end if jobs
/// failed.
pub fn run(arguments: &Arguments, file: &Path) -> Result<()> {
    if std::fs::metadata(file).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        eqim_cli::note(format_args!("--jobs {}: is not a file and is read to its end", file.display()));
    }
    let text = jobs::read(file).map_err(inputs::about("jobs"))?;
    let lines = Line::all(file, &text).map_err(inputs::about("jobs"))?;
    let missing = || Error::input("--output", "is missing: --jobs requires a folder for the images");
    let folder = arguments.output.as_deref().ok_or_else(missing)?;
    let bundle = Bundle::open(&arguments.engine)?;
    outputs::prepare_folder(folder, &bundle.folder)?;
    let manifest = &bundle.manifest;
    let is_dynamic = manifest.quantization.as_ref().is_some_and(|it| it.target == Int8Target::Cpu);
    // Graphs of older versions quantize the rows of a batch together, and have no functions.
    let is_old = manifest.graphs.values().all(|graph| graph.functions.is_empty());
    if is_dynamic && is_old && arguments.max_batch > 1 {
        let effect = "rows of a batch share the ranges of dynamic quantization, so images differ within INT8's error";
        tracing::warn!("{}: {effect} from those of --max-batch 1", bundle.folder.display());
    }
    let shared = |index: usize| arguments.shard.is_none_or(|shard| shard.holds(index));
    let mine: Vec<Line> =
        lines.into_iter().enumerate().filter(|(index, _)| shared(*index)).map(|(_, line)| line).collect();
    let progress = Progress::new("finished", mine.len(), "jobs");
    let mut runner = JobRunner { arguments, bundle: &bundle, file, folder, hashed: None, progress, done: 0, failed: 0 };
    let groups = runner.left(&mine)?;
    let before = runner.done;
    if !groups.is_empty() {
        let engine = eqim_engines::open(&bundle, &arguments.options()?)?;
        let mut batches =
            Batches { engine: engine.as_ref(), runner: &mut runner, beginning: None, active: HashMap::new() };
        groups.into_iter().try_for_each(|group| batches.run(group))?;
    }
    let JobRunner { done, failed, progress, .. } = runner;
    drop(progress);
    eqim_cli::note(format_args!("{} jobs done, {before} done before, {failed} failed", done - before));
    if failed > 0 {
        return Err(Error::run(
            format!("--jobs {}", file.display()),
            format!("{failed} jobs failed, see the error in the output line of each; the others are done"),
        ));
    }
    Ok(())
}

/// Jobs that can share a batch. Only their lines are kept, so that memory does not grow with what they ask for.
struct Group<'a> {
    /// Request of the first job.
    request: Request,
    /// Tiling of the first job.
    tiling: Option<Tiling>,
    lines: Vec<Line<'a>>,
}

impl Group<'_> {
    /// Whether a request can be in a batch with those of the group.
    fn fits(&self, request: &Request) -> bool {
        let key = |request: &Request| (request.cfg != 1.0, request.solver, request.steps);
        key(&self.request) == key(request)
    }
}

/// Inputs, output folder and progress of the jobs of a file.
struct JobRunner<'a> {
    arguments: &'a Arguments,
    bundle: &'a Bundle,
    /// The file of the jobs.
    file: &'a Path,
    /// The folder of the images.
    folder: &'a Path,
    /// The last prefix that was hashed, and its hash.
    hashed: Option<(PathBuf, String)>,
    progress: Progress,
    done: usize,
    failed: usize,
}

impl JobRunner<'_> {
    /// Jobs that are not done yet. Lines that are not valid jobs are reported as failed.
    fn left<'a>(&mut self, lines: &[Line<'a>]) -> Result<Vec<Group<'a>>> {
        let mut groups: Vec<Group> = vec![];
        let mut ids = HashSet::new();
        for line in lines {
            let (id, job) = match line.read() {
                Ok((id, settings)) => {
                    let known = if ids.insert(id.clone()) {
                        check_id(&id)
                    } else {
                        Err(Error::input("id", "is the id of an earlier job"))
                    };
                    (id.clone(), known.and_then(|()| Job::new(self.arguments, self.bundle, id, settings)))
                }
                Err(error) => (line.number.to_string(), Err(error)),
            };
            match job {
                Ok(job) if job.is_done(self.folder, |path| self.hash(path)) => {
                    self.done += 1;
                    self.progress.at(self.done + self.failed);
                }
                Ok(Job { request, tiling, .. }) => match groups.iter_mut().find(|group| group.fits(&request)) {
                    Some(group) => group.lines.push(*line),
                    None => groups.push(Group { request, tiling, lines: vec![*line] }),
                },
                Err(error) => self.finish(&id, Err(self.about(line, error)))?,
            }
        }
        Ok(groups)
    }

    /// SHA-256 of the file of a prefix. A file that consecutive jobs share is read once.
    fn hash(&mut self, path: &Path) -> Result<String> {
        match &self.hashed {
            Some((known, hash)) if known == path => Ok(hash.clone()),
            _ => {
                let hash = hash_of(path)?;
                self.hashed = Some((path.into(), hash.clone()));
                Ok(hash)
            }
        }
    }

    /// Adds the place of a line to its error.
    fn about(&self, line: &Line, error: Error) -> Error {
        error.about(format_args!("{} line {}", self.file.display(), line.number))
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

/// SHA-256 of a file.
fn hash_of(path: &Path) -> Result<String> {
    Ok(sha256_of(files::open(path)?).or_input(path.display())?.1)
}

/// A prefix, encoded. Consecutive jobs with the same prefix share it.
struct Beginning {
    path: PathBuf,
    side: Side,
    /// SHA-256 of the file.
    sha256: String,
    prefix: Prefix,
    /// Its tokens, `[1, n, E]`.
    tokens: Array3<f32>,
}

/// The batches of all jobs.
struct Batches<'a, 'b> {
    engine: &'a dyn Engine,
    runner: &'a mut JobRunner<'b>,
    /// Prefix of the last job that was admitted.
    beginning: Option<Beginning>,
    /// Jobs that are in the batch, by the numbers of their lines.
    active: HashMap<usize, (Job, Finish)>,
}

impl Batches<'_, '_> {
    /// Runs jobs that can share a batch.
    fn run(&mut self, group: Group) -> Result<()> {
        let (engine, most) = (self.engine, self.runner.arguments.max_batch);
        let classes = vec![ClassSchedule::Constant(None); most.min(group.lines.len())];
        check_memory(&Request { classes, ..group.request.clone() }, engine.config(), group.tiling)
            .map_err(|error| error.about("max_batch").with_field("max_batch"))?;
        let sampling = Sampling::new(engine.config(), &group.request);
        let shared = RefCell::new(self);
        let images = group.lines.iter().filter_map(|line| shared.borrow_mut().admit(line).transpose());
        generate_all(engine, sampling, images, most, |(number, tokens)| shared.borrow_mut().finish(number, tokens))
    }

    /// Prepares the job of a line for the batch. A job that cannot be prepared is reported as failed; the result is
    /// then `None`.
    fn admit(&mut self, line: &Line) -> Result<Option<(usize, Sequence)>> {
        let (id, settings) = line.read()?;
        match self.prepare(&id, Job::new(self.runner.arguments, self.runner.bundle, id.clone(), settings)) {
            Ok((job, finish, sequence)) => {
                self.active.insert(line.number, (job, finish));
                Ok(Some((line.number, sequence)))
            }
            Err(error) => {
                let error = self.runner.about(line, error);
                self.runner.finish(&id, Err(error)).map(|()| None)
            }
        }
    }

    /// Reads and encodes the prefix of a job, and draws its noise.
    fn prepare(&mut self, id: &str, job: Result<Job>) -> Result<(Job, Finish, Sequence)> {
        let (mut job, config) = (job?, self.engine.config());
        let beginning = self.beginning(&job)?;
        let finish = inputs::finish(&job.origin.settings, beginning.map(|known| &known.prefix), config)?;
        if let Some(known) = beginning {
            job.origin.prefix_sha256 = Some(known.sha256.clone());
            job.request.prefix = Some(known.tokens.clone());
        }
        let prepared = PreparedRequest::new(config, &job.request)?;
        let sequence = Sequence::of_batch(&prepared).pop().ok_or_else(|| Error::run(id, "has no image"))?;
        Ok((job, finish, sequence))
    }

    /// The prefix of a job. It is read and encoded if it is not that of the last job.
    fn beginning(&mut self, job: &Job) -> Result<Option<&Beginning>> {
        let settings = &job.origin.settings;
        let Some(path) = &settings.prefix else { return Ok(None) };
        let (side, config) = (settings.direction.unwrap_or_default(), self.engine.config());
        let is_known = self.beginning.as_ref().is_some_and(|known| known.path == *path && known.side == side);
        if !is_known {
            self.beginning = None;
            let sha256 = hash_of(path)?;
            let prefix = Prefix::read(path, &job.request, side, config)?;
            if hash_of(path)? != sha256 {
                let problem = "was changed while it was read";
                return Err(inputs::about("prefix")(Error::input(path.display(), problem)));
            }
            let tokens = prefix.encode(self.engine, 1)?;
            self.beginning = Some(Beginning { path: path.clone(), side, sha256, prefix, tokens });
        }
        let given = self.beginning.as_ref().map_or(0, |known| known.prefix.tokens(config));
        inputs::check_length(path, given, job.request.tokens)?;
        Ok(self.beginning.as_ref())
    }

    /// Writes and reports the image of a job that has left the batch.
    fn finish(&mut self, number: usize, tokens: Result<Array2<f32>>) -> Result<()> {
        let Some((job, finish)) = self.active.remove(&number) else { return Ok(()) };
        let written = tokens.and_then(|tokens| self.write(&job, &finish, tokens));
        self.runner.finish(&job.id, written)
    }

    /// Decodes the tokens `[N, E]` of a job, and writes the image and its record.
    fn write(&self, job: &Job, finish: &Finish, tokens: Array2<f32>) -> Result<PathBuf> {
        let folder = self.runner.folder;
        let path = job.image_path(folder);
        job.remove_record(folder)?;
        decode_to(self.engine, tokens.view(), job.tiling, finish, &path, &mut Duration::default())?;
        job.write_record(folder)?;
        Ok(path)
    }
}
