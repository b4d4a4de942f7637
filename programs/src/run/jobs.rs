//! `eqim-run --jobs`: generates many images from one file in batches. When a job is done, the next job takes its place
//! in the batch.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use eqim::bundle::{Bundle, Int8Target};
use eqim::digest::sha256_of;
use eqim::engine::Engine;
use eqim::generate::batch::Sequence;
use eqim::generate::memory::check_memory;
use eqim::generate::scheduler::{Capacity, Event, Order, Scheduler};
use eqim::generate::tiles::{Strip, Tiling};
use eqim::lock::Lock;
use eqim::picture::Side;
use eqim::request::condition::ClassSchedule;
use eqim::request::jobs::{self, Line, check_id};
use eqim::request::{PreparedRequest, Request};
use eqim::{Error, Result, ResultExt, files};
use eqim_cli::Progress;
use ndarray::Array3;
use serde_json::{Value, json};

use super::arguments::Arguments;
use super::decode::ImageWriter;
use super::inputs::{self, Prefix};
use super::job::Job;
use super::outputs;

/// Receives a line about a job that is done or has failed.
type Report = fn(Value) -> Result<()>;

/// Runs the jobs of a file.
///
/// # Errors
/// [`Error::input`] if a flag or a file cannot be used; [`Error::run`] if the engine fails, or at the end if jobs
/// failed.
pub fn run(arguments: &Arguments, file: &Path, report: Report) -> Result<()> {
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
    let mut runner =
        JobRunner { arguments, bundle: &bundle, file, folder, hashed: None, progress, report, done: 0, failed: 0 };
    let groups = runner.left(&mine)?;
    let before = runner.done;
    if !groups.is_empty() {
        let engine = eqim_engines::open(&bundle, &arguments.options)?;
        let jobs = Jobs {
            engine: engine.as_ref(),
            runner: RefCell::new(&mut runner),
            beginning: RefCell::default(),
            fatal: RefCell::default(),
        };
        jobs.run(groups)?;
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
    report: Report,
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
        (self.report)(line)
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

/// The jobs that are being generated.
struct Jobs<'a, 'b> {
    engine: &'a dyn Engine,
    runner: RefCell<&'a mut JobRunner<'b>>,
    /// Prefix of the last job that was submitted.
    beginning: RefCell<Option<Beginning>>,
    /// Why the run has to end.
    fatal: RefCell<Option<Error>>,
}

/// Receives the events of a job.
type Events<'a> = Box<dyn FnMut(Event) -> ControlFlow<()> + 'a>;

impl<'a> Jobs<'a, '_> {
    /// Runs all jobs. Jobs that can share a batch are next to each other.
    fn run(&'a self, groups: Vec<Group>) -> Result<()> {
        let images = self.runner.borrow().arguments.max_batch;
        let mut scheduler = Scheduler::new(self.engine, Capacity::of_machine(images));
        for group in groups {
            let classes = vec![ClassSchedule::Constant(None); images.min(group.lines.len())];
            check_memory(&Request { classes, ..group.request.clone() }, self.engine.config(), group.tiling)
                .map_err(|error| error.about("max_batch").with_field("max_batch"))?;
            for line in group.lines {
                while scheduler.room() == 0 {
                    self.turn(&mut scheduler)?;
                }
                if let Some(order) = self.order(&line)? {
                    scheduler.submit(order);
                }
            }
        }
        while self.turn(&mut scheduler)? {}
        Ok(())
    }

    /// Takes a turn of the scheduler. Returns whether there was anything to do.
    fn turn(&self, scheduler: &mut Scheduler<Events>) -> Result<bool> {
        let busy = scheduler.turn()?;
        self.fatal.take().map_or(Ok(busy), Err)
    }

    /// The image of a line. A job that cannot be prepared is reported as failed; the result is then `None`.
    fn order(&'a self, line: &Line) -> Result<Option<Order<Events<'a>>>> {
        let (id, settings) = line.read()?;
        let (arguments, bundle) = (self.runner.borrow().arguments, self.runner.borrow().bundle);
        match self.prepare(line.number, Job::new(arguments, bundle, id.clone(), settings)) {
            Ok(Some(order)) => Ok(Some(order)),
            // Another process has done it meanwhile.
            Ok(None) => {
                let path = Job::path(self.runner.borrow().folder, &id);
                self.runner.borrow_mut().finish(&id, Ok(path)).map(|()| None)
            }
            Err(error) => {
                let error = self.runner.borrow().about(line, error);
                self.runner.borrow_mut().finish(&id, Err(error)).map(|()| None)
            }
        }
    }

    /// Reads and encodes the prefix of a job, and draws its noise. Returns `None` if the job is done.
    fn prepare(&'a self, number: usize, job: Result<Job>) -> Result<Option<Order<Events<'a>>>> {
        let (mut job, config) = (job?, self.engine.config());
        let folder = self.runner.borrow().folder;
        let path = job.image_path(folder);
        let lock = Lock::beside(&path)?;
        if job.is_done(folder, hash_of) {
            return Ok(None);
        }
        let mut last = self.beginning.borrow_mut();
        let beginning = self.beginning(&mut last, &job)?;
        let finish = inputs::finish(&job.origin.settings, beginning.map(|known| &known.prefix), config)?;
        if let Some(known) = beginning {
            job.origin.prefix_sha256 = Some(known.sha256.clone());
            job.request.prefix = Some(known.tokens.clone());
        }
        let prepared = PreparedRequest::new(config, &job.request)?;
        let sequence = Sequence::of_batch(&prepared).pop().ok_or_else(|| Error::run(&job.id, "has no image"))?;
        let tokens = job.request.tokens;
        let tiling = Some(job.tiling.unwrap_or(Tiling::whole(tokens)));
        let image = ImageWriter::new(path, finish, config.image_size(tokens));
        let (sampling, events) = (prepared.sampling, self.events(job, image, lock));
        Ok(Some(Order { number, priority: 0, sequence, sampling, tiling, previewed: false, events }))
    }

    /// The prefix of a job. It is read and encoded if it is not that of the last job.
    fn beginning<'k>(&self, last: &'k mut Option<Beginning>, job: &Job) -> Result<Option<&'k Beginning>> {
        let settings = &job.origin.settings;
        let Some(path) = &settings.prefix else { return Ok(None) };
        let (side, config) = (settings.direction.unwrap_or_default(), self.engine.config());
        let is_known = last.as_ref().is_some_and(|known| known.path == *path && known.side == side);
        if !is_known {
            *last = None;
            let sha256 = hash_of(path)?;
            let prefix = Prefix::read(path, &job.request, side, config)?;
            if hash_of(path)? != sha256 {
                let problem = "was changed while it was read";
                return Err(inputs::about("prefix")(Error::input(path.display(), problem)));
            }
            let tokens = prefix.encode(self.engine, 1)?;
            *last = Some(Beginning { path: path.clone(), side, sha256, prefix, tokens });
        }
        let given = last.as_ref().map_or(0, |known| known.prefix.tokens(config));
        inputs::check_length(path, given, job.request.tokens)?;
        Ok(last.as_ref())
    }

    /// Writes and reports the image of a job, which is locked until then.
    fn events(&'a self, job: Job, mut image: ImageWriter, lock: Lock) -> Events<'a> {
        Box::new(move |event| {
            let _lock = &lock;
            let result = match event {
                Event::Token(..) | Event::Preview(_) => return ControlFlow::Continue(()),
                Event::Strip(strip) => match self.write(&job, &mut image, strip) {
                    Ok(()) => return ControlFlow::Continue(()),
                    Err(error) => Err(error),
                },
                Event::Done => Ok(image.path().to_path_buf()),
                Event::Failed(error) => Err(error),
            };
            if let Err(error) = self.runner.borrow_mut().finish(&job.id, result) {
                self.fatal.replace(Some(error));
            }
            ControlFlow::Break(())
        })
    }

    /// Writes a strip of an image, and the record of the image if the strip is the last one.
    fn write(&self, job: &Job, image: &mut ImageWriter, strip: Strip) -> Result<()> {
        let folder = self.runner.borrow().folder;
        if strip.index == 0 {
            job.remove_record(folder)?;
        }
        let is_last = image.write(strip)?;
        if is_last { job.write_record(folder) } else { Ok(()) }
    }
}
