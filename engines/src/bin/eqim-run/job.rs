//! A job: a line of a jobs file, and the record next to its image.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use eqim::bundle::{Bundle, FileRecord};
use eqim::digest::sha256_of;
use eqim::generate::tiles::Tiling;
use eqim::request::Request;
use eqim::request::settings::{Settings, TileSize};
use eqim::{Error, Result, ResultExt, files};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::arguments::Arguments;
use super::inputs;

/// Largest size of a jobs file in bytes.
const LARGEST_FILE: u64 = 64 << 20;
/// Largest number of jobs of a file.
const MOST_JOBS: usize = 1_000_000;

/// Reads the text of a jobs file, or of a pipe.
///
/// # Errors
/// [`Error::input`] if the file cannot be read, is larger than 64 MB, or is not UTF-8 text.
pub fn read_text(file: &Path) -> Result<String> {
    let subject = format!("--jobs {}", file.display());
    let bad = |problem: String| Error::input(&subject, problem);
    if std::fs::metadata(file).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        eqim_cli::note(format_args!("{subject}: is not a file and is read to its end"));
    }
    let mut bytes = vec![];
    let opened = File::open(file).or_input(&subject)?;
    opened.take(LARGEST_FILE + 1).read_to_end(&mut bytes).or_input(&subject)?;
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(bad(format!("has more than {} MB: split the jobs into several files", LARGEST_FILE >> 20)));
    }
    // ASCII text in UTF-16 has a zero in every second byte.
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") || bytes.iter().take(2).any(|&byte| byte == 0) {
        return Err(bad("is UTF-16 text, expected UTF-8: save it as UTF-8".into()));
    }
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        bad(format!("line {} is not UTF-8 text", 1 + valid.iter().filter(|&&byte| byte == b'\n').count()))
    })?;
    // Windows programs put a byte order mark at the beginning.
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// A line of a jobs file.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// Number of the line in the file, from 1.
    pub number: usize,
    text: &'a str,
}

impl<'a> Line<'a> {
    /// The lines of a jobs file that are not blank.
    ///
    /// # Errors
    /// [`Error::input`] if the text is a JSON array, or has too many jobs.
    pub fn all(file: &Path, text: &'a str) -> Result<Vec<Self>> {
        let bad = |problem: String| Error::input(format!("--jobs {}", file.display()), problem);
        if text.trim_start().starts_with('[') {
            return Err(bad("is a JSON array, expected one JSON object per line, without brackets and commas".into()));
        }
        let lines = text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty());
        let lines: Vec<Self> = lines.map(|(index, text)| Self { number: index + 1, text }).collect();
        if lines.len() > MOST_JOBS {
            return Err(bad(format!("has {} jobs, expected at most {MOST_JOBS}: split the file", lines.len())));
        }
        Ok(lines)
    }

    /// Reads the id and the settings. The default id is the number of the line.
    ///
    /// # Errors
    /// [`Error::input`] if the line is not a JSON object, or naming the key that does not fit.
    pub fn read(&self) -> Result<(String, Settings)> {
        let mut object: Map<String, Value> = serde_json::from_str(self.text).or_input("a job")?;
        let id = match object.remove("id") {
            None | Some(Value::Null) => self.number.to_string(),
            Some(Value::String(id)) => id,
            Some(Value::Number(id)) if id.is_u64() => id.to_string(),
            Some(other) => return Err(Error::input("id", format!("is {other}, expected text or a whole number"))),
        };
        Ok((id, Settings::from_json(object)?))
    }
}

/// Checks that an id is a valid file name.
///
/// # Errors
/// [`Error::input`] naming the id.
pub fn check_id(id: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if id.is_empty() || id.starts_with('.') || id.len() > 200 || !id.chars().all(fits) {
        let problem = format!("is {id:?}, expected letters, digits, '.', '_' and '-': it names the image");
        return Err(Error::input("id", problem));
    }
    Ok(())
}

/// What makes an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// Settings of the image.
    #[serde(flatten)]
    pub settings: Settings,
    /// SHA-256 of the weights.
    pub weights: String,
    /// SHA-256 of the file of the prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix_sha256: Option<String>,
}

/// The record of a finished job. It is written next to the image, so that a repeated run knows which jobs are done.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    origin: Origin,
    /// The image.
    image: FileRecord,
}

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
        let (request, tiling) = inputs::check(&settings, None, &bundle.manifest.model)?;
        if request.classes.len() > 1 {
            return Err(Error::setting("class", format!("names {} classes, expected one", request.classes.len())));
        }
        if let Some(path) = &settings.prefix {
            files::open(path).map_err(inputs::about("prefix"))?;
        }
        let tile = tiling.map_or(TileSize::Whole, |tiling| TileSize::Tokens(tiling.tile));
        let overlap = tiling.map(|tiling| tiling.overlap);
        let settings = Settings { tile: Some(tile), overlap, ..settings.resolved(&request, 0) };
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
        folder.join(format!("{}.png", self.id))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_of_files() {
        assert!(["a", "7", "x_1.b-2"].iter().all(|id| check_id(id).is_ok()));
        assert!(["", ".", ".hidden", "../up", "a/b", "a b", "ä"].iter().all(|id| check_id(id).is_err()));
    }

    #[test]
    fn ids_are_text_or_numbers() {
        let id = |text: &str| Line { number: 3, text }.read().map(|(id, _)| id).map_err(|error| error.to_string());
        assert_eq!(id(r#"{"id": "a"}"#), Ok("a".into()));
        assert_eq!(id(r#"{"id": 7}"#), Ok("7".into()));
        assert_eq!(id(r#"{"id": null}"#), Ok("3".into()));
        assert_eq!(id("{}"), Ok("3".into()));
        for bad in ["1.5", "-1", "true", "[1]"] {
            let expected = format!("id: is {bad}, expected text or a whole number");
            assert_eq!(id(&format!(r#"{{"id": {bad}}}"#)), Err(expected));
        }
    }

    #[test]
    fn files_of_windows_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("jobs.jsonl");
        let read = |bytes: &[u8]| {
            std::fs::write(&file, bytes).unwrap();
            let text = read_text(&file)?;
            let lines = Line::all(Path::new("jobs.jsonl"), &text)?;
            Ok::<_, Error>(lines.iter().map(|line| (line.number, line.text.to_string())).collect::<Vec<_>>())
        };
        let lines = read(b"\xef\xbb\xbf{}\r\n\r\n{\"class\": 1}\r\n \r\n\r\n").unwrap();
        assert_eq!(lines, [(1, "{}".into()), (3, "{\"class\": 1}".into())]);
        assert_eq!(read(b"\xef\xbb\xbf").unwrap(), []);
        let many = b"{}\n".repeat(MOST_JOBS + 1);
        for (bytes, problem) in [
            (&b"\xff\xfe{\0}\0"[..], "is UTF-16 text"),
            (b"\xfe\xff\0{\0}", "is UTF-16 text"),
            (b"{\0}\0", "is UTF-16 text"),
            (b"\xef\xbb\xbf[{}]", "is a JSON array, expected one JSON object per line"),
            (b"{}\n{\"id\": \"\xe4\"}", "line 2 is not UTF-8 text"),
            (&many, "has 1000001 jobs, expected at most 1000000"),
        ] {
            let error = read(bytes).unwrap_err();
            assert!(error.is_input() && error.to_string().contains(problem), "{error}");
        }
    }
}
