//! The PyTorch reference in a checkout of the user. It runs in `benches/pytorch/reference.py`, which reads and writes
//! one line of JSON per batch.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use eqim::model::Stage;
use eqim::request::condition::ClassSchedule;
use eqim::request::timing::CallTimes;
use eqim::{Error, Result, ResultExt};
use ndarray::Array3;
use serde::Deserialize;
use serde_json::json;
use tempfile::TempDir;

use super::workload::{Calls, TimedBatch, Workload};

const SCRIPTS: [(&str, &str); 2] = [
    ("reference.py", include_str!("../../pytorch/reference.py")),
    ("tuned.py", include_str!("../../pytorch/tuned.py")),
];

/// The reference's flow head, and the variants of it in `benches/pytorch/tuned.py`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// The code of the checkout.
    Reference,
    /// The modulations of all steps are computed before the loop.
    Hoisted,
    /// Also compiled.
    Compiled,
    /// Also compiled, in bfloat16.
    Bfloat16,
    /// Also with dynamic INT8.
    Int8,
}

impl Variant {
    /// Name of the variant in the script.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            Self::Hoisted => "hoisted",
            Self::Compiled => "compiled",
            Self::Bfloat16 => "bfloat16",
            Self::Int8 => "int8",
        }
    }

    /// Whether the numbers are those of the reference only approximately.
    pub fn is_lossy(self) -> bool {
        matches!(self, Self::Bfloat16 | Self::Int8)
    }
}

/// Where PyTorch runs.
#[derive(Clone, Copy)]
pub struct PyTorchOptions<'a> {
    /// `cpu`, which is the default, or `cuda:N`.
    pub device: Option<&'a str>,
    /// Number of threads on the CPU. The default is that of PyTorch.
    pub threads: Option<usize>,
}

/// A Python process that has loaded the model.
pub struct PyTorch {
    child: Child,
    pipes: RefCell<(ChildStdin, BufReader<ChildStdout>)>,
    folder: TempDir,
    embed: usize,
    on_gpu: bool,
    /// Version of PyTorch, and its number of threads or its GPU.
    pub name: String,
}

/// Message of the script when it is ready.
#[derive(Deserialize)]
struct Ready {
    torch: String,
    /// The number of threads, or the name of the GPU.
    processor: String,
}

/// Message of the script after a batch, with times in seconds.
#[derive(Deserialize)]
struct Answer {
    step: Vec<f64>,
    flow: Vec<f64>,
    decode: Vec<f64>,
    total: f64,
}

impl PyTorch {
    /// Starts the script with the weights of a bundle in FP32.
    ///
    /// # Errors
    /// [`Error::input`] if the checkout or the Python program is not found; [`Error::run`] if Python fails. Python
    /// writes the cause to standard error.
    pub fn start(
        checkout: &Path,
        python: &Path,
        bundle: &Path,
        options: PyTorchOptions<'_>,
        embed: usize,
    ) -> Result<Self> {
        if !checkout.join("generator/equ_modeling.py").is_file() {
            let problem = "has no generator/equ_modeling.py, expected a checkout of drx-code/EquivariantModeling";
            return Err(Error::input(format!("--pytorch {}", checkout.display()), problem));
        }
        let failed = |error| Error::run_caused("PyTorch", error);
        let folder = tempfile::tempdir().map_err(failed)?;
        for (name, script) in SCRIPTS {
            std::fs::write(folder.path().join(name), script).map_err(failed)?;
        }
        let script = folder.path().join(SCRIPTS[0].0);
        let mut command = Command::new(python);
        let checkout = checkout.canonicalize().map_err(failed)?;
        let device = options.device.unwrap_or("cpu");
        command.arg(&script).arg(checkout).arg(bundle).arg(device).arg(options.threads.unwrap_or(0).to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        command.env("PYTHONWARNINGS", "ignore");
        let mut child = command.spawn().or_input(format!("--python {}", python.display()))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::run("PyTorch", "has no pipes"));
        };
        let pipes = RefCell::new((stdin, BufReader::new(stdout)));
        let on_gpu = device != "cpu";
        let mut pytorch = Self { child, pipes, folder, embed, on_gpu, name: String::new() };
        let Ready { torch, processor } = pytorch.receive()?;
        pytorch.name = format!("PyTorch {torch}, {processor}");
        Ok(pytorch)
    }

    /// The variants of `--pytorch-tuned`. PyTorch has dynamic INT8 only for CPUs.
    pub fn tuned(&self) -> impl Iterator<Item = Variant> {
        let int8 = (!self.on_gpu).then_some(Variant::Int8);
        [Variant::Hoisted, Variant::Compiled, Variant::Bfloat16].into_iter().chain(int8)
    }

    fn receive<T: for<'a> Deserialize<'a>>(&self) -> Result<T> {
        let mut line = String::new();
        self.pipes.borrow_mut().1.read_line(&mut line).or_run("PyTorch")?;
        serde_json::from_str(&line)
            .map_err(|_| Error::run("PyTorch", format!("stopped after the output {line:?}: see its message above")))
    }

    /// Generates a batch of images.
    ///
    /// # Errors
    /// [`Error::run`] if Python fails.
    pub fn run(&self, work: &Workload, variant: Variant) -> Result<TimedBatch> {
        let failed = |error: std::io::Error| Error::run_caused("PyTorch", error);
        let (output, prefix) = (self.folder.path().join("tokens"), self.folder.path().join("prefix"));
        if let Some(given) = &work.request.prefix {
            let bytes: Vec<u8> = given.iter().flat_map(|value| value.to_le_bytes()).collect();
            std::fs::write(&prefix, bytes).map_err(failed)?;
        }
        let request = &work.request;
        let line = json!({
            "labels": request.classes.iter().flat_map(ClassSchedule::classes).collect::<Vec<_>>(),
            "tokens": request.tokens,
            "cfg": request.cfg,
            "steps": request.steps,
            "seed": work.seed,
            "prefix": request.prefix.is_some().then_some(&prefix),
            "decode": work.decode,
            "output": output,
            "variant": variant.name(),
        });
        {
            let stdin = &mut self.pipes.borrow_mut().0;
            writeln!(stdin, "{line}").and_then(|()| stdin.flush()).map_err(failed)?;
        }
        let answer: Answer = self.receive()?;
        let bytes = std::fs::read(output).map_err(failed)?;
        let values = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let shape = (request.classes.len(), request.tokens, self.embed);
        let tokens = Array3::from_shape_vec(shape, values).or_run("PyTorch")?;
        let mut calls = Calls::default();
        for (stage, seconds) in
            [(Stage::Step, answer.step), (Stage::Flow, answer.flow), (Stage::Decoder, answer.decode)]
        {
            calls.add(stage, CallTimes(seconds.into_iter().map(Duration::from_secs_f64).collect()));
        }
        Ok(TimedBatch { tokens, calls, total: Duration::from_secs_f64(answer.total) })
    }
}

impl Drop for PyTorch {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
