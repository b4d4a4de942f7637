//! The training loop, with progress, metrics, sample pictures and checkpoints.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use eqim::bundle::FileRecord;
use eqim::checkpoint::tensors::{self, TensorFile};
use eqim::lock::Lock;
use eqim::{Error, Result, ResultExt, files, picture};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use ndarray::Array3;
use serde::{Deserialize, Serialize};

use crate::curve;
use crate::learner::{self, Measures};
use crate::metrics::{Metrics, Record};
use crate::ranks::{Ranks, difference};
use crate::recipe::TrainingPlan;

/// The training of the tokenizer or of the generator.
pub trait Task {
    /// Name of the trained model, `tokenizer` or `generator`; also the name of its file.
    fn kind(&self) -> &'static str;

    /// Steps, intervals and learning rates.
    fn plan(&self) -> &TrainingPlan;

    /// The settings and inputs that must be equal for a run to be resumed, as readable text.
    ///
    /// # Errors
    /// If the settings cannot be written as text.
    fn identity(&self) -> Result<String>;

    /// Takes the step of this number, counted from 0. Returns its metrics; the loss has the name `loss`.
    ///
    /// # Errors
    /// [`Error::input`] if a photograph can no longer be read; [`Error::run`] if the gradients are not finite.
    fn step(&mut self, step: usize) -> Result<Measures>;

    /// Metrics of the averaged weights on the held-out photographs; empty if no photographs are held out.
    ///
    /// # Errors
    /// [`Error::run`] if the model fails, or if a metric is not a number.
    fn validate(&self) -> Result<Measures>;

    /// Checks that the weights, moments and averages are finite, and what the model computes with them. Only then are
    /// they saved over an earlier checkpoint.
    ///
    /// # Errors
    /// [`Error::run`] naming what is not finite.
    fn check(&self) -> Result<()>;

    /// A sample picture from the averaged weights, `[3, height, width]` in -1..1.
    ///
    /// # Errors
    /// If the model fails.
    fn picture(&self) -> Result<Array3<f32>>;

    /// The processes that share the training.
    fn ranks(&self) -> &Ranks;

    /// Hash of the trained weights.
    ///
    /// # Errors
    /// If a Candle operation fails.
    fn fingerprint(&self) -> Result<String>;

    /// Brings to the first rank what the others have of the moments and averages. All ranks call it.
    ///
    /// # Errors
    /// [`Error::run`] if a rank does not answer.
    fn collect(&mut self) -> Result<()>;

    /// Drops what [`Task::collect`] brought.
    fn release(&mut self);

    /// All tensors that [`Task::restore`] needs. With several ranks, the first has all of them after [`Task::collect`].
    fn state(&self) -> Vec<(String, Tensor)>;

    /// Restores a state that was saved after `steps` steps.
    ///
    /// # Errors
    /// [`Error::input`] naming the tensor that is missing, not finite or of a wrong type or shape.
    fn restore(&mut self, file: &mut TensorFile, steps: usize) -> Result<()>;

    /// Writes the averaged weights as an eqim checkpoint.
    ///
    /// # Errors
    /// [`Error::run`] if the file cannot be written.
    fn write_model(&self, path: &Path) -> Result<()>;
}

/// Metadata key in a state file for [`Saved`] as JSON.
const STATE_KEY: &str = "eqim-training";

/// Description of a saved training state.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    kind: String,
    steps: usize,
    identity: String,
    /// Hash of all tensors.
    sha256: String,
}

/// Name of the state in the output folder.
const STATE: &str = "state.safetensors";
/// Name of the metrics in the output folder.
const METRICS: &str = "metrics.jsonl";

/// Output folder of a training run.
#[derive(Debug)]
pub struct Output {
    folder: PathBuf,
    /// Only the first rank writes.
    _lock: Option<Lock>,
}

impl Output {
    /// Opens the folder. The first rank creates it if it is missing. With `resume`, it may hold the state of an earlier run.
    ///
    /// # Errors
    /// [`Error::input`] if the folder already holds a run and `resume` is false, or if it cannot be created or written to;
    /// [`Error::run`] if another process trains in it.
    pub fn open(folder: &Path, resume: bool, ranks: &Ranks) -> Result<Self> {
        let lock = if ranks.is_first() { Some(Self::lock(folder, resume)?) } else { None };
        ranks.meet()?;
        Ok(Self { folder: folder.to_path_buf(), _lock: lock })
    }

    fn lock(folder: &Path, resume: bool) -> Result<Lock> {
        let (state, metrics, samples) = (folder.join(STATE), folder.join(METRICS), folder.join("samples"));
        if !resume && (state.exists() || metrics.exists()) {
            let problem = "already contains a training run: resume it with --resume, or choose another folder";
            return Err(Error::input(folder.display(), problem));
        }
        std::fs::create_dir_all(&samples).or_input(samples.display())?;
        files::check_output(&state)?;
        Lock::beside(&state)
    }

    /// Path of a file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Path of the state from which `--resume` continues.
    fn state(&self) -> PathBuf {
        self.file(STATE)
    }

    fn metrics(&self) -> PathBuf {
        self.file(METRICS)
    }

    /// Restores `task` from the saved state, on all ranks. Returns the number of steps taken so far, 0 if no state was saved
    /// yet.
    ///
    /// # Errors
    /// [`Error::input`] if the state belongs to another training; [`Error::run`] if a rank does not answer.
    pub fn resume(&self, task: &mut impl Task) -> Result<usize> {
        let path = self.state();
        if !path.exists() {
            return Ok(0);
        }
        let bad = |problem: String| Error::input(path.display(), problem);
        let mut file = TensorFile::open(&path)?;
        let text = file.text(STATE_KEY).ok_or_else(|| bad(format!("has no `{STATE_KEY}` in its metadata")))?;
        let saved: Saved = serde_json::from_str(text).map_err(|error| {
            bad("is not a training state of this version: begin the training again".into()).because(error)
        })?;
        if saved.kind != task.kind() {
            return Err(bad(format!("is the training state of a {}, expected that of a {}", saved.kind, task.kind())));
        }
        if let Some((was, is)) = difference(&saved.identity, &task.identity()?) {
            return Err(bad(format!(
                "is the state of another training: it was started with `{was}`, this one with `{is}`; resume with the same settings"
            )));
        }
        let (steps, planned) = (saved.steps, task.plan().steps);
        if steps > planned {
            let problem = format!("is the state after step {steps}, but this training has {planned} steps");
            return Err(bad(problem).with_field("steps"));
        }
        task.restore(&mut file, steps)?;
        task.collect()?;
        if task.ranks().is_first() && hash(&task.state())? != saved.sha256 {
            return Err(bad("its tensors do not have their hash: the file was changed".into()));
        }
        Ok(steps)
    }

    fn save(&self, task: &impl Task, steps: usize) -> Result<()> {
        let state = task.state();
        let saved = Saved { kind: task.kind().into(), steps, identity: task.identity()?, sha256: hash(&state)? };
        let text = serde_json::to_string(&saved).or_run("training state")?;
        let state: Vec<(&str, Tensor)> = state.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
        task.write_model(&self.file(&format!("{}.safetensors", task.kind())))?;
        tensors::write(&self.state(), &state, HashMap::from([(STATE_KEY.into(), text)]))
    }

    fn draw(&self, task: &impl Task, metrics: &Metrics, steps: usize) -> Result<()> {
        picture::write_png(&self.file(&format!("samples/step-{steps:07}.png")), task.picture()?.view())?;
        let title = format!("Training of the {}", task.kind());
        curve::draw(&self.file("loss.png"), &title, metrics.records(), &["loss", "validation_loss"])
    }
}

/// Hash of a state.
fn hash(state: &[(String, Tensor)]) -> Result<String> {
    learner::hash(state.iter().map(|(name, tensor)| (name.as_str(), tensor)))
}

/// Takes all steps from `start` to the end of the plan. All ranks call it; the first writes the files, and has the whole state
/// at the end.
///
/// # Errors
/// The errors of the task, with the last checkpoint in the message; [`Error::run`] if a file cannot be written, or if a rank
/// does not answer or has other weights.
pub fn run(task: &mut impl Task, output: &Output, start: usize) -> Result<()> {
    let plan = task.plan().clone();
    agree(task, start)?;
    if !task.ranks().is_first() {
        return follow(task, &plan, start);
    }
    let mut metrics = Metrics::open(&output.metrics(), start)?;
    let mut pace = Pace::new(&plan, start);
    let mut kept = start;
    for step in start..plan.steps {
        let done = step + 1;
        let every = |interval| is_due(&plan, done, interval);
        let stopped = |error| stopped(error, step, kept, output);
        task.release();
        pace.add(task.step(step).map_err(stopped)?);
        let (look, keep) = (every(plan.sample_every), every(plan.checkpoint_every));
        if look || keep {
            gather(task).map_err(stopped)?;
        }
        if keep {
            task.check().map_err(stopped)?;
        }
        if every(plan.log_every) || look {
            let mut values = pace.line(step);
            if look {
                values.extend(
                    task.validate()
                        .map_err(stopped)?
                        .into_iter()
                        .map(|(name, value)| (format!("validation_{name}"), value)),
                );
            }
            pace.show(done, &values);
            let finite = |value: f64| value.is_finite().then_some(value);
            let values = values.into_iter().map(|(name, value)| (name, finite(value))).collect();
            metrics.append(Record { step: done, values })?;
        }
        if look {
            output.draw(task, &metrics, done)?;
        }
        if keep {
            output.save(task, done)?;
            kept = done;
        }
    }
    task.ranks().meet()
}

/// Whether something that happens every `interval` steps, and after the last step, happens after `done` steps.
fn is_due(plan: &TrainingPlan, done: usize, interval: usize) -> bool {
    done.is_multiple_of(interval) || done == plan.steps
}

/// Checks that all ranks train the same from the same step with the same program.
fn agree(task: &impl Task, start: usize) -> Result<()> {
    let ranks = task.ranks();
    if ranks.size() == 1 {
        return Ok(());
    }
    let program = FileRecord::at(&std::env::current_exe().or_run("program")?)?.sha256;
    ranks.agree("training", &format!("{}step = {start}\nprogram = {program}\n", task.identity()?))
}

/// Takes the steps of a rank that writes no files.
fn follow(task: &mut impl Task, plan: &TrainingPlan, start: usize) -> Result<()> {
    for step in start..plan.steps {
        let done = step + 1;
        task.step(step).map_err(|error| error.about(format!("step {done}")))?;
        if is_due(plan, done, plan.sample_every) || is_due(plan, done, plan.checkpoint_every) {
            gather(task)?;
        }
    }
    task.ranks().meet()
}

/// Brings the state to the first rank, and checks that the weights of all ranks are equal.
fn gather(task: &mut impl Task) -> Result<()> {
    if task.ranks().size() > 1 {
        task.ranks().agree("weights", &task.fingerprint()?)?;
    }
    task.collect()
}

fn stopped(error: Error, step: usize, kept: usize, output: &Output) -> Error {
    let at = format!("step {}", step + 1);
    let left = match kept {
        0 => "no checkpoint was written yet".to_string(),
        _ => format!("the checkpoint of step {kept} is kept in {}", output.folder.display()),
    };
    error.advise(format!("; {left}")).about(at)
}

/// Means of the metrics since the last line, and the speed of the steps.
struct Pace {
    bar: ProgressBar,
    plan: TrainingPlan,
    started: Instant,
    line: Instant,
    sums: Measures,
    steps: usize,
    start: usize,
}

impl Pace {
    fn new(plan: &TrainingPlan, start: usize) -> Self {
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} steps  {msg}");
        let bar = ProgressBar::new(plan.steps as u64).with_position(start as u64);
        let bar = bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        let now = Instant::now();
        Self { bar, plan: plan.clone(), started: now, line: now, sums: Measures::new(), steps: 0, start }
    }

    fn add(&mut self, measured: Measures) {
        measured.into_iter().for_each(|(name, value)| *self.sums.entry(name).or_default() += value);
        self.steps += 1;
        self.bar.inc(1);
    }

    /// The means since the last line, with the speed, the learning rate and the elapsed time.
    fn line(&mut self, step: usize) -> Measures {
        let seconds = self.line.elapsed().as_secs_f64();
        let steps = self.steps as f64;
        let mut values: Measures = std::mem::take(&mut self.sums);
        values.values_mut().for_each(|sum| *sum /= steps);
        values.insert("images_per_second".into(), steps * self.plan.batch_size as f64 / seconds);
        values.insert("learning_rate".into(), self.plan.learning_rate(step));
        values.insert("seconds".into(), self.started.elapsed().as_secs_f64());
        (self.line, self.steps) = (Instant::now(), 0);
        values
    }

    /// Shows a line: in the progress bar on a terminal, otherwise as a separate line.
    fn show(&self, done: usize, values: &Measures) {
        let a_step = self.started.elapsed().as_secs_f64() / (done - self.start).max(1) as f64;
        let left = Duration::from_secs_f64(a_step * (self.plan.steps - done) as f64);
        let hidden = ["learning_rate", "seconds", "images_per_second"];
        let losses: Vec<String> = values
            .iter()
            .filter(|(name, _)| !hidden.contains(&name.as_str()))
            .map(|(name, value)| format!("{name} {value:.4}"))
            .collect();
        let speed = values.get("images_per_second").copied().unwrap_or_default();
        let text = format!("{}, {speed:.1} images/s, {} left", losses.join(", "), HumanDuration(left));
        if self.bar.is_hidden() {
            eqim_cli::note(format_args!("step {done}/{}: {text}", self.plan.steps));
        } else {
            self.bar.set_message(text);
        }
    }
}

impl Drop for Pace {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
