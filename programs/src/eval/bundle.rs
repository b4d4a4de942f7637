//! Generates the images of a bundle, each with the next class and seed.

use std::path::PathBuf;

use clap::Args;
use eqim::bundle::Bundle;
use eqim::request::settings::{ClassName, Settings};
use eqim::{Error, Result, ResultExt, files};
use eqim_engines::Options;
use serde_json::json;

use super::sets::is_occupied;
use crate::run::{Jobs, run_jobs};

/// How images are generated.
#[derive(Args)]
pub struct Generation {
    /// Folder of the exported model, as written by `eqim-export onnx`
    #[arg(long, value_name = "BUNDLE")]
    engine: PathBuf,

    /// Number of images, in equal shares of the classes: those of --class, or all of the model. The first has the seed
    /// --seed, the next one the next seed
    #[arg(long, value_name = "N", default_value_t = 400, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    count: u32,

    /// Folder of the images. Those that are there with the same settings are not generated again
    #[arg(short, long, value_name = "FOLDER")]
    pub output: PathBuf,

    /// Maximum number of images in a batch
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_batch: u32,

    /// Settings of the images and of their sampling.
    #[command(flatten)]
    settings: Settings,

    /// How to run the bundle.
    #[command(flatten)]
    options: Options,
}

impl Generation {
    /// The jobs of the images, one per line. They are kept in the folder of the images.
    ///
    /// # Errors
    /// [`Error::input`] if a setting does not fit the bundle, or if the folder has images of other jobs.
    pub fn jobs(&self) -> Result<String> {
        let bundle = Bundle::open(&self.engine)?;
        let config = &bundle.manifest.model;
        self.settings.request(config)?;
        let classes: Vec<ClassName> = match self.settings.class.is_empty() {
            true => (0..config.generator.class_num).map(|class| ClassName::of(Some(class))).collect(),
            false => self.settings.class.clone(),
        };
        let first = self.settings.sampling.seed.unwrap_or_default();
        let line = |index: u32| {
            let (id, seed) = (format!("{index:06}"), first.wrapping_add(u64::from(index)));
            let class = &classes[index as usize % classes.len()];
            let job = match self.settings.classes {
                Some(_) => json!({ "id": id, "seed": seed }),
                None => json!({ "id": id, "class": class, "seed": seed }),
            };
            format!("{job}\n")
        };
        let jobs: String = (0..self.count).map(line).collect();
        let file = self.file();
        let is_ours = file.exists() && jobs.starts_with(&String::from_utf8_lossy(&files::read(&file)?)[..]);
        if !is_ours && is_occupied(&self.output)? {
            let problem = "has other files than the images of these jobs: choose another folder, or remove it";
            return Err(Error::input(self.output.display(), problem).with_field("output"));
        }
        Ok(jobs)
    }

    /// Generates the images of `jobs` that are missing.
    ///
    /// # Errors
    /// Those of `eqim-run --jobs`.
    pub fn run(&self, jobs: &str) -> Result<()> {
        std::fs::create_dir_all(&self.output).or_input(self.output.display())?;
        files::write(&self.file(), jobs.as_bytes())?;
        run_jobs(Jobs {
            engine: self.engine.clone(),
            settings: Settings { class: vec![], ..self.settings.clone() },
            options: self.options.clone(),
            file: self.file(),
            folder: self.output.clone(),
            max_batch: self.max_batch as usize,
        })
    }

    fn file(&self) -> PathBuf {
        self.output.join("jobs.jsonl")
    }
}
