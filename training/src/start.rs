//! The checkpoint from which the training of a generator starts, and what of it is trained.

use std::path::Path;

use candle_core::Tensor;
use eqim::bundle::FileRecord;
use eqim::checkpoint::{self, CLASS_TABLE, Hints};
use eqim::config::GeneratorConfig;
use eqim::weights::Weights;
use eqim::{Error, Result};
use regex::Regex;

/// A generator from which a training starts.
#[derive(Debug)]
pub struct Start {
    /// Sizes of the generator, with the classes of the checkpoint.
    pub config: GeneratorConfig,
    weights: Weights,
    /// Hash of the file.
    hash: String,
    /// Classes of the photographs, and the class of the checkpoint from which each starts.
    classes: Vec<(String, usize)>,
    /// Names of the weights that are not trained.
    frozen: Option<Regex>,
}

impl Start {
    /// Reads a generator: its moving averages, unless the file only has other weights. `classes` are `NAME=CLASS`, where
    /// NAME is a class of the photographs, and CLASS a name or number of a class of the checkpoint.
    ///
    /// # Errors
    /// Those of [`checkpoint::load`]; [`Error::setting`] if a class is not one of the checkpoint.
    pub fn open(path: &Path, hints: &Hints, classes: &[String], frozen: Option<Regex>) -> Result<Self> {
        let (config, weights) = checkpoint::load_generator_alone(path, None, hints)?;
        let hash = FileRecord::at(path)?.sha256;
        let class = |text: &String| {
            let bad = |problem: String| Error::setting("classes", format!("has {text:?}: {problem}"));
            let (name, class) = text.rsplit_once('=').ok_or_else(|| bad("expected NAME=CLASS".into()))?;
            let class = config.class(class).map_err(|error| bad(error.to_string()))?;
            let class = class.ok_or_else(|| bad("the image without a class is not one of the table".into()))?;
            Ok((name.to_string(), class))
        };
        let classes = classes.iter().map(class).collect::<Result<_>>()?;
        Ok(Self { config, weights, hash, classes, frozen })
    }

    /// The settings that must be equal for a run to be resumed, as text.
    pub fn identity(&self) -> String {
        let frozen = self.frozen.as_ref().map_or("", Regex::as_str);
        format!("from = {}\nclasses = {:?}\nfrozen = {frozen:?}\n", self.hash, self.classes)
    }

    /// The configuration for photographs of these classes and latents of width `embed`. The scale of the latents stays that
    /// of the checkpoint.
    ///
    /// # Errors
    /// [`Error::input`] if the tokenizer does not fit; [`Error::setting`] if a class to start is none of the photographs'.
    pub fn config(&self, classes: &[String], embed: usize) -> Result<GeneratorConfig> {
        if self.config.embed != embed {
            let problem = format!(
                "has latents of width {embed}, expected {}, that of the generator it starts from",
                self.config.embed
            );
            return Err(Error::input("tokenizer", problem));
        }
        if let Some((name, _)) = self.classes.iter().find(|(name, _)| !classes.contains(name)) {
            let problem = format!("has {name:?}, expected a class of the photographs: {}", classes.join(", "));
            return Err(Error::setting("classes", problem));
        }
        Ok(GeneratorConfig { class_num: classes.len(), ..self.config.clone() })
    }

    /// The weights for photographs of these classes. A class starts as the one that was given for it, else as the class of
    /// its name, else as the mean of all classes.
    ///
    /// # Errors
    /// If a Candle operation fails.
    pub fn weights(&self, classes: &[String]) -> Result<Weights> {
        let table = self.weights.get(CLASS_TABLE, &[self.config.class_num, self.config.dim])?;
        let mean = table.mean_keepdim(0)?;
        let row = |class: &String| -> Result<Tensor> {
            let given = self.classes.iter().find(|(name, _)| name == class).map(|(_, class)| *class);
            let row = given.or_else(|| self.config.class_names.iter().position(|name| name == class));
            Ok(row.map_or_else(|| Ok(mean.clone()), |row| table.narrow(0, row, 1))?)
        };
        let rows = classes.iter().map(row).collect::<Result<Vec<_>>>()?;
        let mut weights = self.weights.clone();
        weights.insert(CLASS_TABLE.into(), &Tensor::cat(&rows, 0)?)?;
        Ok(weights)
    }

    /// Whether the weight of this name is trained.
    pub fn is_trained(&self, name: &str) -> bool {
        self.frozen.as_ref().is_none_or(|frozen| !frozen.is_match(name))
    }
}
