//! A job that fits the model, and the record next to its image.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use eqim::bundle::{Bundle, FileRecord};
use eqim::digest::sha256_of;
use eqim::generate::plan;
use eqim::generate::tiles::Tiling;
use eqim::request::Request;
use eqim::request::record::{Origin, Record};
use eqim::request::settings::Settings;
use eqim::{Error, Result, ResultExt, files};

use super::arguments::Arguments;
use super::inputs;

/// A valid job. Its prefix has not been read.
#[derive(Debug)]
pub struct Job {
    /// Name of the image.
    pub id: String,
    /// What makes the image. The hash of the prefix is not known yet.
    pub origin: Origin,
    /// Tiling of the decoder.
    pub tiling: Option<Tiling>,
    /// The request, without its prefix.
    pub request: Request,
}

impl Job {
    /// A job with these settings, and with those of the flags where they are missing.
    ///
    /// # Errors
    /// [`Error::setting`] if a setting does not fit the model, or if the file of the prefix cannot be opened.
    pub fn new(arguments: &Arguments, bundle: &Bundle, id: String, settings: Settings) -> Result<Self> {
        let settings = settings.over(&arguments.settings);
        // The folder of all images is not a folder of tiles, so it is not passed as the output.
        let (request, tiling) = plan::check(&settings, false, &bundle.manifest.model)?;
        if request.classes.len() > 1 {
            return Err(Error::setting("class", format!("names {} classes, expected one", request.classes.len())));
        }
        if let Some(path) = &settings.prefix {
            files::open(path).map_err(inputs::about("prefix"))?;
        }
        let settings = plan::recorded(settings, &request, tiling);
        let origin = Origin { settings, weights: bundle.manifest.weights.sha256.clone(), prefix_sha256: None };
        Ok(Self { id, origin, tiling, request })
    }

    /// Whether the image in `folder` is the one that this job makes: the record has the same settings, weights and
    /// prefix, and the image has the length and the hash of the record. `hash` computes the hash of a file.
    pub fn is_done(&self, folder: &Path, hash: impl FnOnce(&Path) -> Result<String>) -> bool {
        let Some(Record { origin, image }) = self.record(folder) else { return false };
        let found = Origin { prefix_sha256: None, ..origin.clone() };
        if found != self.origin {
            return false;
        }
        let prefix = self.origin.settings.prefix.as_ref().map(|path| hash(path).ok());
        let is_same = prefix.is_none_or(|hash| hash.is_some() && hash == origin.prefix_sha256);
        is_same && self.image_record(folder).is_ok_and(|found| found == image)
    }

    /// Path of the image.
    pub fn image_path(&self, folder: &Path) -> PathBuf {
        Self::path(folder, &self.id)
    }

    /// Path of the image of a job.
    pub fn path(folder: &Path, id: &str) -> PathBuf {
        folder.join(format!("{id}.png"))
    }

    fn record_path(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.json", self.id))
    }

    fn record(&self, folder: &Path) -> Option<Record> {
        let text = files::read(&self.record_path(folder)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Length and hash of the image.
    fn image_record(&self, folder: &Path) -> Result<FileRecord> {
        let path = self.image_path(folder);
        let (bytes, sha256) = sha256_of(files::open(&path)?).or_run(path.display())?;
        Ok(FileRecord { file: format!("{}.png", self.id), bytes, sha256 })
    }

    /// Removes the record of an older image, before a new image is written: the job is then not done.
    ///
    /// # Errors
    /// [`Error::run`] if it cannot be removed.
    pub fn remove_record(&self, folder: &Path) -> Result<()> {
        let path = self.record_path(folder);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed.or_run(path.display()),
        }
    }

    /// Writes the record of the image that was written: the job is then done.
    ///
    /// # Errors
    /// [`Error::run`] if the image cannot be read or the record cannot be written.
    pub fn write_record(&self, folder: &Path) -> Result<()> {
        let record = Record { origin: self.origin.clone(), image: self.image_record(folder)? };
        files::write_json(&self.record_path(folder), &record)
    }
}
