//! The loop around the steps of a training: progress, metrics, pictures, checkpoints.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use eqim::checkpoint::tensors::{self, TensorFile};
use eqim::{Error, Result, ResultExt, picture};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use ndarray::Array3;
use serde::{Deserialize, Serialize};

use crate::curve;
use crate::learner::Measures;
use crate::metrics::{Metrics, Record};
use crate::recipe::TrainingPlan;

/// One half of the model being trained.
pub trait Task {
    /// What is trained, `tokenizer` or `generator`: also the result's file name.
    fn kind(&self) -> &'static str;

    /// Steps, intervals, rates.
    fn plan(&self) -> &TrainingPlan;

    /// What two runs must have in common for one to go on where the other stopped, as readable text.
    ///
    /// # Errors
    /// When it cannot be written down.
    fn identity(&self) -> Result<String>;

    /// Takes the step of this number, from 0; gives what it measured, the loss as `loss`.
    ///
    /// # Errors
    /// [`Error::input`] for a photograph that cannot be read any more; [`Error::run`] for a loss that is not finite.
    fn step(&mut self, step: usize) -> Result<Measures>;

    /// Measures the averaged weights on what is held out; nothing where nothing is.
    ///
    /// # Errors
    /// When the model fails.
    fn validate(&self) -> Result<Measures>;

    /// A picture `[3, height, width]` in -1..1 that shows what the averaged weights can do.
    ///
    /// # Errors
    /// When the model fails.
    fn picture(&self) -> Result<Array3<f32>>;

    /// All that [`Task::restore`] needs.
    fn state(&self) -> Vec<(String, Tensor)>;

    /// Goes on from a state after `steps` steps.
    ///
    /// # Errors
    /// [`Error::input`] naming the tensor that does not fit.
    fn restore(&mut self, file: &mut TensorFile, steps: usize) -> Result<()>;

    /// Writes the averaged weights as a checkpoint of eqim.
    ///
    /// # Errors
    /// [`Error::run`] when it cannot be written.
    fn write_model(&self, path: &Path) -> Result<()>;
}

/// Key of [`Saved`], as JSON, in the metadata of a state.
const STATE_KEY: &str = "eqim-training";

/// How far a saved training had come.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    kind: String,
    steps: usize,
    identity: String,
}

/// The folder that a training run writes.
#[derive(Debug)]
pub struct Output {
    folder: PathBuf,
}

impl Output {
    /// A folder for a new run, or with `resume` one that a run may have left a state in.
    ///
    /// # Errors
    /// [`Error::input`] when it holds a run already and `resume` is not asked for; [`Error::run`] when it cannot be made.
    pub fn open(folder: &Path, resume: bool) -> Result<Self> {
        let output = Self { folder: folder.to_path_buf() };
        if !resume && (output.state().exists() || output.metrics().exists()) {
            let problem = "already contains a training run: resume it with --resume, or choose another folder";
            return Err(Error::input(folder.display(), problem));
        }
        let samples = output.folder.join("samples");
        std::fs::create_dir_all(&samples).or_run(samples.display())?;
        Ok(output)
    }

    /// A file of this name in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// What `--resume` goes on from.
    fn state(&self) -> PathBuf {
        self.file("state.safetensors")
    }

    fn metrics(&self) -> PathBuf {
        self.file("metrics.jsonl")
    }

    /// Brings `task` to where the saved run stopped; gives the steps that it had taken, 0 where nothing was saved yet.
    ///
    /// # Errors
    /// [`Error::input`] when the state is of another training.
    pub fn resume(&self, task: &mut impl Task) -> Result<usize> {
        let path = self.state();
        if !path.exists() {
            return Ok(0);
        }
        let bad = |problem: String| Error::input(path.display(), problem);
        let mut file = TensorFile::open(&path)?;
        let text = file.text(STATE_KEY).ok_or_else(|| bad(format!("has no `{STATE_KEY}` in its metadata")))?;
        let saved: Saved = serde_json::from_str(text).or_input(path.display())?;
        if saved.kind != task.kind() {
            return Err(bad(format!("is the training state of a {}, expected that of a {}", saved.kind, task.kind())));
        }
        let identity = task.identity()?;
        if let Some((was, is)) = saved.identity.lines().zip(identity.lines()).find(|(was, is)| was != is) {
            return Err(bad(format!(
                "is the state of another training: it was started with `{was}`, this one with `{is}`; resume with the same settings"
            )));
        }
        task.restore(&mut file, saved.steps)?;
        Ok(saved.steps)
    }

    fn save(&self, task: &impl Task, steps: usize) -> Result<()> {
        let saved = Saved { kind: task.kind().into(), steps, identity: task.identity()? };
        let text = serde_json::to_string(&saved).or_run("training state")?;
        let state = task.state();
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

/// Takes the steps from `start` on.
///
/// # Errors
/// Those of the task, with what was kept; [`Error::run`] when a file cannot be written.
pub fn run(task: &mut impl Task, output: &Output, start: usize) -> Result<()> {
    let mut metrics = Metrics::open(&output.metrics(), start)?;
    let plan = task.plan().clone();
    let mut pace = Pace::new(&plan, start);
    let mut kept = start;
    for step in start..plan.steps {
        let done = step + 1;
        let every = |interval: usize| done.is_multiple_of(interval) || done == plan.steps;
        let measured = task.step(step).map_err(|error| stopped(error, step, kept, output))?;
        pace.add(measured);
        let look = every(plan.sample_every);
        if every(plan.log_every) || look {
            let mut values = pace.line(step);
            if look {
                values.extend(task.validate()?.into_iter().map(|(name, value)| (format!("validation_{name}"), value)));
            }
            pace.show(done, &values);
            let finite = |value: f64| value.is_finite().then_some(value);
            let values = values.into_iter().map(|(name, value)| (name, finite(value))).collect();
            metrics.append(Record { step: done, values })?;
        }
        if look {
            output.draw(task, &metrics, done)?;
        }
        if every(plan.checkpoint_every) {
            output.save(task, done)?;
            kept = done;
        }
    }
    Ok(())
}

fn stopped(error: Error, step: usize, kept: usize, output: &Output) -> Error {
    let at = format!("step {}", step + 1);
    let left = match kept {
        0 => "no checkpoint was written yet".to_string(),
        _ => format!("the checkpoint of step {kept} is kept in {}", output.folder.display()),
    };
    error.advise(format!("; {left}")).about(at)
}

/// Means of what the steps since the last line measured, and how fast they went.
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

    /// The means since the last line, and what goes with them.
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

    /// Shows a line: in the bar on a terminal, by itself elsewhere.
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
