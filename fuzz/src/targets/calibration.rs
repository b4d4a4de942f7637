//! Calibration tables, and states of unfinished calibrations.

use std::path::{Path, PathBuf};

use eqim::digest::sha256;
use eqim::weights::Weights;
use eqim::{Result, files};
use eqim_calibration::{Collection, Estimator, Samples, Table, fingerprint};

use super::{Place, write};
use crate::small;
use crate::target::{Hostile, Target};

/// All targets with calibrations.
pub(super) fn all() -> Result<Vec<Box<dyn Target>>> {
    let (config, weights) = (small::config(), small::weights()?);
    let samples =
        Samples { images: Default::default(), resized: false, rollouts: 3, tokens: 4, steps: 1, cfg: 2.0, seed: 0 };
    let place = Place::new()?;
    let model = fingerprint(&config, &weights)?;
    let path = place.path("table.json.partial");
    let mut collection = Collection::open(&path, &model, &samples)?;
    collection.next(&config, &weights, Path::new("."))?;
    collection.save(&path)?;
    let sealed = files::read(&path)?;
    let table = place.path("table.json");
    while collection.done() < collection.total() {
        collection.next(&config, &weights, Path::new("."))?;
    }
    collection.table(Estimator::Mse)?.write(&table)?;
    let seed = files::read(&table)?;
    let state = |name, is_sealed| -> Result<State> {
        let place = Place::new()?;
        let path = place.path("table.json.partial");
        let seed = match is_sealed {
            true => sealed.clone(),
            false => sealed.split(|&byte| byte == b'\n').nth(1).unwrap_or_default().to_vec(),
        };
        Ok(State { name, is_sealed, _place: place, path, model: model.clone(), samples: samples.clone(), seed })
    };
    Ok(vec![
        Box::new(Tables { _place: place, path: table, weights, seed }),
        Box::new(state("calibration-state", true)?),
        Box::new(state("calibration-state-with-its-hash", false)?),
    ])
}

/// Reads a calibration table for the small model.
struct Tables {
    _place: Place,
    path: PathBuf,
    weights: Weights,
    seed: Vec<u8>,
}

impl Target for Tables {
    fn name(&self) -> &'static str {
        "calibration-table"
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        vec![self.seed.clone()]
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn read(&mut self, input: &[u8]) -> Result<String> {
        write(&self.path, input)?;
        let table = Table::read(&self.path)?;
        table.check_model(&self.path, &small::config(), &self.weights)?;
        Ok(String::new())
    }
}

/// Resumes a calibration. The input is the file, or, if it is not sealed, the text below a correct hash.
struct State {
    name: &'static str,
    is_sealed: bool,
    _place: Place,
    path: PathBuf,
    model: String,
    samples: Samples,
    seed: Vec<u8>,
}

impl Target for State {
    fn name(&self) -> &'static str {
        self.name
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        vec![self.seed.clone()]
    }

    fn hostile(&self) -> Vec<Hostile> {
        if self.is_sealed {
            return vec![];
        }
        let text = String::from_utf8_lossy(&self.seed);
        let with = |key: &str, value: &str| {
            let Some(at) = text.find(&format!("\"{key}\":")) else { return vec![] };
            let begin = at + key.len() + 3;
            let end = begin + text[begin..].find([',', '}', ']']).unwrap_or_default();
            [&text[..begin], value, &text[end..]].concat().into_bytes()
        };
        vec![
            ("a negative end", with("end", "-1.0")),
            ("an end that is no power of two", with("end", "3.0")),
            ("a huge range", with("high", "3e38")),
            ("more rollouts than planned", with("rollouts", "9")),
            ("no counts", with("counts", "[]")),
        ]
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn read(&mut self, input: &[u8]) -> Result<String> {
        match self.is_sealed {
            true => write(&self.path, input)?,
            false => write(&self.path, &[sha256(input).as_bytes(), b"\n", input].concat())?,
        }
        let collection = Collection::open(&self.path, &self.model, &self.samples)?;
        // Saved again, since the contents of a state cannot be looked at.
        let copy = self.path.with_extension("copy");
        collection.save(&copy)?;
        Ok(sha256(files::read(&copy)?))
    }

    fn is_sealed(&self) -> bool {
        self.is_sealed
    }
}
