//! Runs targets on their hostile inputs and on mutations, and reports what the readers did.

use std::fmt::Write;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use eqim::{Result, ResultExt, files};
use eqim_cli::{memory, table};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::mutate::mutated;
use crate::target::Target;

/// Time in which an input has to be read. Machines can be busy: most inputs take a few milliseconds.
pub const LONGEST: Duration = Duration::from_secs(20);
/// Memory by which an input may increase that of the process, in bytes. The largest picture that is read takes 0.9 GB.
pub const MOST_MEMORY: u64 = 3 << 29;
/// Address space of the process, in bytes: the limit for a single allocation, which would end the process.
const ADDRESS_SPACE: u64 = 16 << 30;
/// Longest message in characters.
const LONGEST_MESSAGE: usize = 4000;

/// What a reader did with the inputs of a target.
#[derive(Clone, Debug)]
pub struct Report {
    /// Name of the target.
    pub target: &'static str,
    /// Number of inputs.
    pub cases: u64,
    /// Number of inputs that were read.
    pub accepted: u64,
    /// Longest time for an input.
    pub slowest: Duration,
    /// Largest increase of memory for an input, in bytes.
    pub largest: u64,
    /// What went wrong: the name of the case and the problem.
    pub faults: Vec<String>,
}

/// The input that is being read, for the thread that watches the time.
type Current = Arc<Mutex<Option<(String, Instant)>>>;

/// Limits the memory of the process, and ends it if an input is read for far too long.
#[derive(Debug)]
pub struct Guard {
    current: Current,
    /// Folder for the inputs of faults.
    kept: PathBuf,
}

impl Guard {
    /// Sets the limits of this process. Inputs that a reader handles wrongly are kept in `folder`.
    ///
    /// # Errors
    /// If the folder cannot be created.
    pub fn new(folder: &Path) -> Result<Self> {
        #[cfg(unix)]
        {
            use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
            let limit = Rlimit { current: Some(ADDRESS_SPACE), ..getrlimit(Resource::As) };
            setrlimit(Resource::As, limit).or_run("the limit of the address space")?;
        }
        std::fs::create_dir_all(folder).or_run(folder.display())?;
        let current = Current::default();
        let watched = Arc::clone(&current);
        std::thread::spawn(move || watch(&watched));
        Ok(Self { current, kept: folder.to_path_buf() })
    }

    /// Reads the seeds and the hostile inputs of a target, and the mutations of its seeds with the numbers `cases`.
    /// `progress` receives the number of mutations so far.
    ///
    /// # Errors
    /// If the input of a fault cannot be written.
    pub fn run(
        &self,
        target: &mut dyn Target,
        seed: u64,
        cases: Range<u64>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Report> {
        let first = cases.start;
        let (slowest, faults) = Default::default();
        let mut report = Report { target: target.name(), cases: 0, accepted: 0, slowest, largest: 0, faults };
        let seeds = target.seeds();
        let mut known = vec![];
        for (index, input) in seeds.iter().enumerate() {
            match self.read(target, &format!("seed {index}"), input, &mut report)? {
                Some(Ok(read)) => {
                    report.accepted += 1;
                    known.push(read);
                }
                Some(Err(error)) => report.faults.push(format!("seed {index} is refused: {error}")),
                None => {}
            }
        }
        for (name, input) in target.hostile() {
            self.judge(target, name, &input, &known, &mut report)?;
        }
        for number in cases {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(number);
            let input = mutated(&seeds, &mut random);
            self.judge(target, &format!("case {number}"), &input, &known, &mut report)?;
            progress(number + 1 - first);
        }
        Ok(report)
    }

    /// Reads an input, and looks at what the reader returned.
    fn judge(
        &self,
        target: &mut dyn Target,
        name: &str,
        input: &[u8],
        known: &[String],
        report: &mut Report,
    ) -> Result<()> {
        let problem = match self.read(target, name, input, report)? {
            None => return Ok(()),
            Some(Ok(read)) => {
                report.accepted += 1;
                let is_wrong = target.is_sealed() && !known.contains(&read);
                is_wrong.then(|| "was accepted, but its contents were changed".to_string())
            }
            Some(Err(error)) => wrong_refusal(&error, target.path()),
        };
        problem.map_or(Ok(()), |problem| self.keep(name, input, problem, report))
    }

    /// Reads an input under the limits. The result is `None` if a limit was exceeded or the reader panicked.
    fn read(
        &self,
        target: &mut dyn Target,
        name: &str,
        input: &[u8],
        report: &mut Report,
    ) -> Result<Option<Result<String>>> {
        let lock = || self.current.lock().unwrap_or_else(PoisonError::into_inner);
        memory::forget_peak();
        let (before, begin) = (memory::peak(), Instant::now());
        *lock() = Some((format!("{} {name}", target.name()), begin));
        let read = catch_unwind(AssertUnwindSafe(|| target.read(input)));
        *lock() = None;
        let (time, grown) = (begin.elapsed(), memory::peak().saturating_sub(before));
        report.cases += 1;
        report.slowest = report.slowest.max(time);
        report.largest = report.largest.max(grown);
        let problem = match read {
            Err(panic) => format!("panicked: {}", message(panic.as_ref())),
            _ if time > LONGEST => format!("took {:.1} s", time.as_secs_f64()),
            _ if grown > MOST_MEMORY => format!("took {:.1} GB", grown as f64 / f64::from(1 << 30)),
            Ok(read) => return Ok(Some(read)),
        };
        self.keep(name, input, problem, report).map(|()| None)
    }

    /// Writes the input of a fault to a file.
    fn keep(&self, name: &str, input: &[u8], problem: String, report: &mut Report) -> Result<()> {
        let file = self.kept.join(format!("{} {name}", report.target).replace(' ', "-"));
        files::write(&file, input)?;
        report.faults.push(format!("{} {name}: {problem} ({})", report.target, file.display()));
        Ok(())
    }
}

/// Ends the process if an input is read for far longer than it may.
fn watch(current: &Current) {
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let current = current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((name, begin)) = current.filter(|(_, begin)| begin.elapsed() > 3 * LONGEST) {
            eqim_cli::note(format_args!("{name} has been read for {} s", begin.elapsed().as_secs()));
            std::process::exit(1);
        }
    }
}

/// The problem with an error, if there is one: a bad input has to end with exit code 2 and a message that names the file.
fn wrong_refusal(error: &eqim::Error, path: Option<&Path>) -> Option<String> {
    let text = error.to_string();
    let is_named = path.is_none_or(|path| text.contains(&*path.to_string_lossy()));
    if !error.is_input() {
        return Some(format!("ended with exit code 1: {text}"));
    }
    if !is_named || text.len() > LONGEST_MESSAGE {
        return Some(format!("was refused without its file, or with a long message: {text}"));
    }
    None
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

/// The reports as a table, and the faults below it.
pub fn text(reports: &[Report]) -> String {
    let row = |report: &Report| {
        vec![
            report.target.to_string(),
            report.cases.to_string(),
            report.accepted.to_string(),
            (report.cases - report.accepted).to_string(),
            format!("{:.3}", report.slowest.as_secs_f64()),
            format!("{:.0}", report.largest as f64 / f64::from(1 << 20)),
            report.faults.len().to_string(),
        ]
    };
    let heads = ["reader", "inputs", "read", "refused", "slowest s", "memory MB", "faults"];
    let mut text = table::text(&heads, reports.iter().map(row)).to_string();
    for fault in reports.iter().flat_map(|report| &report.faults) {
        let _ = write!(text, "\n{fault}");
    }
    text
}
