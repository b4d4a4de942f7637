//! The metrics file of a training run: one JSON line per logged step.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use eqim::{Result, ResultExt, files};
use serde::{Deserialize, Serialize};

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Number of steps taken.
    pub step: usize,
    /// Metrics by name; a value that is not finite is null.
    #[serde(flatten)]
    pub values: BTreeMap<String, Option<f64>>,
}

/// The records of a run and their file.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    records: Vec<Record>,
}

impl Metrics {
    /// Opens the records of a run that continues after `step` steps (0 for a new run). Later records, which a killed
    /// run wrote after its last checkpoint, are removed, and so is an incomplete last line.
    ///
    /// # Errors
    /// [`eqim::Error::input`] naming a line that is not a record; [`eqim::Error::run`] if the file cannot be written.
    pub fn open(path: &Path, step: usize) -> Result<Self> {
        let bytes = if path.exists() { files::read(path)? } else { vec![] };
        let text = String::from_utf8_lossy(&bytes);
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let mut records = vec![];
        for (number, line) in whole.lines().enumerate() {
            let record: Record =
                serde_json::from_str(line).or_input(format!("{}: line {}", path.display(), number + 1))?;
            if record.step <= step {
                records.push(record);
            }
        }
        let lines = records.iter().map(|record| line(path, record)).collect::<Result<String>>()?;
        files::write(path, lines.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).or_run(path.display())?;
        Ok(Self { path: path.to_path_buf(), file, records })
    }

    /// Adds a record to the file.
    ///
    /// # Errors
    /// [`eqim::Error::run`] if the file cannot be written.
    pub fn append(&mut self, record: Record) -> Result<()> {
        let text = line(&self.path, &record)?;
        self.file.write_all(text.as_bytes()).or_run(self.path.display())?;
        self.records.push(record);
        Ok(())
    }

    /// All records so far.
    pub fn records(&self) -> &[Record] {
        &self.records
    }
}

fn line(path: &Path, record: &Record) -> Result<String> {
    let text = serde_json::to_string(record).or_run(path.display())?;
    Ok(text + "\n")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn record(step: usize, values: &[(&str, f64)]) -> Record {
        let finite = |value: f64| value.is_finite().then_some(value);
        Record { step, values: values.iter().map(|&(name, value)| (name.to_string(), finite(value))).collect() }
    }

    #[test]
    fn records_are_kept_up_to_the_step() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = Metrics::open(&path, 0).unwrap();
        let written: Vec<Record> = (1..=40).map(|step| record(step, &[("loss", 1.0 / step as f64)])).collect();
        written.iter().for_each(|record| metrics.append(record.clone()).unwrap());
        assert_eq!(metrics.records(), written);
        assert_eq!(Metrics::open(&path, 40).unwrap().records(), written);
        let mut metrics = Metrics::open(&path, 25).unwrap();
        assert_eq!(metrics.records(), &written[..25]);
        metrics.append(written[30].clone()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 26);
        assert_eq!(Metrics::open(&path, 31).unwrap().records()[25], written[30]);
        assert!(Metrics::open(&path, 0).unwrap().records().is_empty());
    }

    #[test]
    fn values_that_are_not_finite_are_null() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        Metrics::open(&path, 0).unwrap().append(record(3, &[("l1", f64::NAN), ("loss", 2.0)])).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":3,\"l1\":null,\"loss\":2.0}\n");
        let metrics = Metrics::open(&path, 3).unwrap();
        assert_eq!(metrics.records()[0].values, BTreeMap::from([("l1".into(), None), ("loss".into(), Some(2.0))]));
    }

    #[test]
    fn half_a_last_line_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1,\"loss\":1}\n{\"step\":2,\"lo").unwrap();
        let mut metrics = Metrics::open(&path, 9).unwrap();
        assert_eq!(metrics.records(), [record(1, &[("loss", 1.0)])]);
        metrics.append(record(2, &[("loss", 0.5)])).unwrap();
        assert_eq!(Metrics::open(&path, 9).unwrap().records().len(), 2);
    }

    #[test]
    fn a_line_that_is_no_record_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        for line in ["{\"step\":2,\"lo", "", "[]", "{\"loss\":1}", "{\"step\":2,\"loss\":\"low\"}"] {
            let text = format!("{{\"step\":1,\"loss\":1}}\n{line}\n{{\"step\":3,\"loss\":1}}\n");
            fs::write(&path, &text).unwrap();
            let error = Metrics::open(&path, 9).unwrap_err();
            assert!(error.is_input() && error.to_string().contains("metrics.jsonl: line 2"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
