//! `eqim-run`: generates images with a bundle.

mod arguments;
mod decode;
mod inputs;
mod job;
mod jobs;
mod outputs;
mod report;
mod single;
mod stream;
mod trace;

use std::ffi::OsString;
use std::path::PathBuf;

use arguments::Arguments;
use clap::Parser;
use eqim::Result;
use eqim::request::settings::Settings;
use eqim_engines::Options;

/// Jobs that another program makes.
pub struct Jobs {
    /// Folder of the bundle.
    pub engine: PathBuf,
    /// Settings that a line of the file does not have.
    pub settings: Settings,
    /// How to run the bundle.
    pub options: Options,
    /// File of the jobs.
    pub file: PathBuf,
    /// Folder of the images.
    pub folder: PathBuf,
    /// Maximum number of jobs in a batch.
    pub max_batch: usize,
}

/// Does what `eqim-run --jobs` does, without its report.
///
/// # Errors
/// Those of `eqim-run --jobs`.
pub fn run_jobs(jobs: Jobs) -> Result<()> {
    let Jobs { engine, settings, options, file, folder, max_batch } = jobs;
    let arguments = Arguments {
        engine,
        settings,
        noise: None,
        save_tokens: None,
        trace: None,
        output: Some(folder),
        jobs: None,
        max_batch,
        shard: None,
        options,
        json: false,
    };
    jobs::run(&arguments, &file, |_| Ok(()))
}

/// Runs the program with its arguments, the first of which is its name. Returns the exit code of the process.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let arguments = Arguments::parse_from(arguments);
    eqim_cli::main(|| match &arguments.jobs {
        Some(file) => jobs::run(&arguments, file, eqim_cli::print),
        None => single::run(&arguments),
    })
}
