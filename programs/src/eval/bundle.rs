//! Generates the images of a bundle, each with the next class and seed.

use std::path::PathBuf;

use clap::Args;
use eqim::bundle::Bundle;
use eqim::request::settings::{ClassName, Settings};
use eqim::{Result, files};
use eqim_engines::Options;
use serde_json::json;

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

    /// Folder of the images, which are resumed if they are there
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
    /// Generates the images that are missing.
    ///
    /// # Errors
    /// Those of `eqim-run --jobs`.
    pub fn run(&self) -> Result<()> {
        let bundle = Bundle::open(&self.engine)?;
        let classes: Vec<ClassName> = match self.settings.class.is_empty() {
            true => (0..bundle.manifest.model.generator.class_num).map(|class| ClassName::of(Some(class))).collect(),
            false => self.settings.class.clone(),
        };
        let first = self.settings.sampling.seed.unwrap_or_default();
        let line = |index: u32| {
            let class = &classes[index as usize % classes.len()];
            let seed = first.wrapping_add(u64::from(index));
            format!("{}\n", json!({ "id": format!("{index:06}"), "class": class, "seed": seed }))
        };
        let text: String = (0..self.count).map(line).collect();
        let file = self.output.with_extension("jsonl");
        files::write(&file, text.as_bytes())?;
        let settings = Settings { class: vec![], ..self.settings.clone() };
        run_jobs(Jobs {
            engine: self.engine.clone(),
            settings,
            options: self.options.clone(),
            file,
            folder: self.output.clone(),
            max_batch: self.max_batch as usize,
        })
    }
}
