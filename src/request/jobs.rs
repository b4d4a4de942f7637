//! Files of jobs: each line is a JSON object that describes one image.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::settings::Settings;
use crate::{Error, Result, ResultExt};

/// Largest size of a jobs file in bytes.
const LARGEST_FILE: u64 = 64 << 20;
/// Largest number of jobs of a file.
const MOST_JOBS: usize = 1_000_000;

/// Reads the text of a jobs file, or of a pipe.
///
/// # Errors
/// [`Error::input`] if the file cannot be read, is larger than 64 MB, or is not UTF-8 text.
pub fn read(path: &Path) -> Result<String> {
    let mut bytes = vec![];
    let opened = File::open(path).or_input(path.display())?;
    opened.take(LARGEST_FILE + 1).read_to_end(&mut bytes).or_input(path.display())?;
    text(bytes).map_err(|problem| Error::input(path.display(), problem))
}

/// The text of a file, without a byte order mark.
fn text(bytes: Vec<u8>) -> Result<String, String> {
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(format!("has more than {} MB: split the jobs into several files", LARGEST_FILE >> 20));
    }
    // ASCII text in UTF-16 has a zero in every second byte.
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") || bytes.iter().take(2).any(|&byte| byte == 0) {
        return Err("is UTF-16 text, expected UTF-8: save it as UTF-8".into());
    }
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        format!("line {} is not UTF-8 text", 1 + valid.iter().filter(|&&byte| byte == b'\n').count())
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
    /// A line by itself, with its number.
    pub fn new(number: usize, text: &'a str) -> Self {
        Self { number, text }
    }

    /// The lines of the jobs file `path` that are not blank.
    ///
    /// # Errors
    /// [`Error::input`] if the text is a JSON array, or has too many jobs.
    pub fn all(path: &Path, text: &'a str) -> Result<Vec<Self>> {
        let bad = |problem: String| Error::input(path.display(), problem);
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
            let text = super::read(&file)?;
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
