//! Tries the readers of eqim on mutated inputs, and reports what they did.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use eqim::{Error, Result};
use eqim_cli::{Progress, say};
use eqim_fuzz::runner::{Guard, text};
use eqim_fuzz::targets;

/// Try the readers of eqim on hostile and mutated inputs.
#[derive(Parser)]
struct Arguments {
    /// Number of mutations of all readers together
    #[arg(long, default_value_t = 1_000_000)]
    cases: u64,
    /// Seed of the mutations
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Try only this reader
    #[arg(long)]
    target: Option<String>,
    /// Try only the mutation with this number
    #[arg(long, requires = "target")]
    case: Option<u64>,
    /// Folder for the inputs that are read wrongly
    #[arg(long, default_value = "target/fuzz")]
    output: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // A panic is reported with its case.
    std::panic::set_hook(Box::new(|_| {}));
    eqim_cli::main(|| run(&arguments)).into()
}

fn run(arguments: &Arguments) -> Result<()> {
    /// Mutations between two updates of the progress.
    const AT_ONCE: u64 = 1000;
    let guard = Guard::new(&arguments.output)?;
    let mut all = targets::all()?;
    if let Some(name) = &arguments.target {
        let names: Vec<&str> = all.iter().map(|target| target.name()).collect();
        let unknown = || Error::setting("target", format!("is {name}, expected one of {}", names.join(", ")));
        let index = names.iter().position(|known| known == name).ok_or_else(unknown)?;
        all = vec![all.swap_remove(index)];
    }
    let each = arguments.cases.div_ceil(all.len() as u64);
    let mut progress = Progress::new("tried", each as usize * all.len(), "inputs");
    let mut reports = vec![];
    for (index, target) in all.iter_mut().enumerate() {
        let cases = arguments.case.map_or(0..each, |case| case..case + 1);
        let done = index * each as usize;
        reports.push(guard.run(target.as_mut(), arguments.seed, cases, &mut |cases| {
            if cases % AT_ONCE == 0 {
                progress.at(done + cases as usize);
            }
        })?);
    }
    drop(progress);
    say(text(&reports));
    match reports.iter().map(|report| report.faults.len()).sum::<usize>() {
        0 => Ok(()),
        faults => Err(Error::run("eqim-fuzz", format!("{faults} inputs were read wrongly"))),
    }
}
