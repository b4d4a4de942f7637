//! Recognises a file by its first bytes, so that a reader of another format can say what it was given.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Number of bytes from which a file is recognised. A tar archive has its mark in the first 512 bytes.
const FIRST: u64 = 512;

/// A format that files of weights, tokens or pictures are mistaken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    name: &'static str,
    advice: &'static str,
}

impl Kind {
    /// Says what a file is instead of `expected`: `is a tar archive, expected a PNG or JPEG: unpack it`.
    pub fn instead_of(self, expected: &str) -> String {
        match (self.is_pointer(), self.advice) {
            (true, _) => format!("is {self}"),
            (false, "") => format!("is {}, expected {expected}", self.name),
            (false, advice) => format!("is {}, expected {expected}: {advice}", self.name),
        }
    }

    /// Whether the file stands in the place of another one, which Git LFS fetches.
    pub fn is_pointer(self) -> bool {
        self.name == POINTER
    }
}

/// The name of the format and what to do: `a tar archive: unpack it`.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        if self.advice.is_empty() { Ok(()) } else { write!(f, ": {}", self.advice) }
    }
}

const AGAIN: &str = "the download failed, so download the file again";
const UNPACK: &str = "unpack it and give the file inside";
const CONVERT: &str = "convert it to PNG or JPEG";
const OTHER: &str = "";
const POINTER: &str = "a Git LFS pointer, not the file itself";

/// Formats that begin with fixed bytes at an offset.
const MARKS: [(usize, &[u8], &str, &str); 28] = [
    (0, b"version https://git-lfs", POINTER, "run git lfs pull"),
    (0, b"\x1f\x8b", "a gzip archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"PK\x03\x04", "a zip archive", OTHER),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (0, b"Rar!", "a RAR archive", UNPACK),
    (0, b"BZh", "a bzip2 archive", UNPACK),
    (0, b"\xfd7zXZ", "an xz archive", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture", OTHER),
    (0, b"\xff\xd8\xff", "a JPEG picture", OTHER),
    (8, b"WEBP", "a WebP picture", CONVERT),
    (0, b"GIF8", "a GIF picture", CONVERT),
    (0, b"II*\0", "a TIFF picture", CONVERT),
    (0, b"MM\0*", "a TIFF picture", CONVERT),
    (4, b"ftypavif", "an AVIF picture", CONVERT),
    (4, b"ftypavis", "an AVIF picture", CONVERT),
    (4, b"ftyphei", "a HEIC picture", CONVERT),
    (4, b"ftyphev", "a HEIC picture", CONVERT),
    (4, b"ftypmif1", "a HEIF picture", CONVERT),
    (4, b"ftypmsf1", "a HEIF picture", CONVERT),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 picture", CONVERT),
    (0, b"%PDF-", "a PDF document", OTHER),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", OTHER),
    (0, b"\x93NUMPY", "a NumPy array (.npy)", OTHER),
    (0, b"GGUF", "a GGUF file", OTHER),
    (0, b"\xff\xfe", "text in UTF-16", OTHER),
    (0, b"\xfe\xff", "text in UTF-16", OTHER),
];

/// The format of a file that begins with these bytes. `None` if it is not known.
pub fn recognise(first: &[u8]) -> Option<Kind> {
    let marked =
        |&(offset, mark, ..): &(usize, &[u8], _, _)| first.get(offset..).is_some_and(|at| at.starts_with(mark));
    if first.is_empty() {
        return Some(Kind { name: "empty", advice: AGAIN });
    }
    match MARKS.iter().find(|entry| marked(entry)) {
        Some(&(_, _, name, advice)) => Some(Kind { name, advice }),
        None if is_bitmap(first) => Some(Kind { name: "a BMP picture", advice: CONVERT }),
        None => text(first),
    }
}

/// The format of a file; `None` if it is not known or the file cannot be read.
pub fn of(path: &Path) -> Option<Kind> {
    if !std::fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut first = vec![];
    File::open(path).ok()?.take(FIRST).read_to_end(&mut first).ok()?;
    recognise(&first)
}

/// Whether the bytes begin a BMP: its mark has only two bytes, so its reserved fields are checked too.
fn is_bitmap(first: &[u8]) -> bool {
    first.starts_with(b"BM") && first.get(6..10) == Some(&[0; 4])
}

/// The format of a text file. Binary files of weights have control characters in their first bytes.
fn text(first: &[u8]) -> Option<Kind> {
    let first = first.strip_prefix(b"\xef\xbb\xbf").unwrap_or(first);
    if first.iter().any(|byte| *byte < b' ' && !byte.is_ascii_whitespace()) {
        return None;
    }
    let start = first.trim_ascii_start();
    let begins = |marks: &[&str]| {
        marks
            .iter()
            .any(|mark| start.get(..mark.len()).is_some_and(|start| start.eq_ignore_ascii_case(mark.as_bytes())))
    };
    let (name, advice) = match start.first() {
        Some(b'<') if begins(&["<!doctype html", "<html", "<head", "<body", "<script"]) => ("an HTML page", AGAIN),
        Some(b'<') => ("XML or HTML", AGAIN),
        Some(b'{') => ("JSON", AGAIN),
        // Tables of TOML and sections of INI files begin with a bracket and a name.
        Some(b'[') if start.get(1).is_some_and(|next| !next.is_ascii_alphabetic()) => ("JSON", AGAIN),
        _ if std::str::from_utf8(first).map_or_else(|error| error.error_len().is_none(), |_| true) => ("text", OTHER),
        _ => return None,
    };
    Some(Kind { name, advice })
}

#[cfg(test)]
mod tests {
    use super::recognise;

    fn name(first: &[u8]) -> Option<&'static str> {
        recognise(first).map(|kind| kind.name)
    }

    #[test]
    fn formats_are_recognised_by_their_first_bytes() {
        let tar = [&[b'a'; 257][..], b"ustar"].concat();
        let cases: [(&[u8], Option<&str>); 18] = [
            (b"version https://git-lfs.github.com/spec/v1\n", Some("a Git LFS pointer, not the file itself")),
            (b"\n<!DOCTYPE html><html>", Some("an HTML page")),
            (b"\xef\xbb\xbf<HTML>", Some("an HTML page")),
            (b"<?xml version='1.0'?>", Some("XML or HTML")),
            (b"{\"error\":\"Repository not found\"}", Some("JSON")),
            (b"RIFF\x10\0\0\0WEBPVP8 ", Some("a WebP picture")),
            (b"\0\0\0\x18ftypheic", Some("a HEIC picture")),
            (b"\0\0\0\x18ftypavif", Some("an AVIF picture")),
            (b"BM\x10\0\0\0\0\0\0\0", Some("a BMP picture")),
            (b"BMW and others", Some("text")),
            (b"[tokenizer.model]\nrows = 8\n", Some("text")),
            (b"[{\"error\": 404}]", Some("JSON")),
            (b"\xff\xfe{\0", Some("text in UTF-16")),
            (b"\x1f\x8b\x08", Some("a gzip archive")),
            (&tar, Some("a tar archive")),
            (b"", Some("empty")),
            // A .safetensors file: the length of its header, then the header.
            (b"{\x02\0\0\0\0\0\0{\"a\":", None),
            (b"\x80\x02\0\0\0\0\0\0{\"a\":", None),
        ];
        for (first, expected) in cases {
            assert_eq!(name(first), expected, "{:?}", String::from_utf8_lossy(first));
        }
    }

    #[test]
    fn a_kind_says_what_to_do() {
        let pointer = recognise(b"version https://git-lfs.github.com/spec/v1\n").unwrap();
        assert_eq!(pointer.to_string(), "a Git LFS pointer, not the file itself: run git lfs pull");
        assert_eq!(pointer.instead_of("weights"), "is a Git LFS pointer, not the file itself: run git lfs pull");
        assert_eq!(recognise(b"plain").unwrap().instead_of("weights"), "is text, expected weights");
        let archive = recognise(b"BZh9").unwrap();
        assert_eq!(
            archive.instead_of("weights"),
            "is a bzip2 archive, expected weights: unpack it and give the file inside"
        );
    }
}
