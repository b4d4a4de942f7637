//! The two containers of `torch.save`: a zip archive with one entry per storage, and, before PyTorch 1.6, one stream.
//! Both hold a pickle and the bytes of the storages that it refers to.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use zip::ZipArchive;
use zip::read::ZipReadOptions;

use super::pickle::{self, Id, Pickle, Value};
use super::storage_type;
use crate::{Error, Result, ResultExt, files};

/// Largest pickle that is read. A pickle holds only names and numbers: the largest published one is smaller than 1 MB.
const LARGEST_PICKLE: u64 = 256 << 20;
/// Bytes at the start of a stream in which all of its pickles must end.
const STREAM_PICKLES: u64 = 64 << 20;
/// The number with which a stream begins, as a pickled integer.
const STREAM_MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;

/// Where the bytes of storages are.
#[derive(Debug)]
pub enum Container {
    /// A zip archive.
    Archive(Archive),
    /// A stream of the format before PyTorch 1.6.
    Stream(Stream),
}

/// A zip archive of `torch.save`.
#[derive(Debug)]
pub struct Archive {
    zip: ZipArchive<BufReader<File>>,
    /// Folder of all entries, with its slash.
    prefix: String,
    /// Whether the values are stored in big-endian order.
    big_endian: bool,
    /// Whether the archive was saved without CRCs: then all of them are 0.
    unchecked: bool,
}

/// A stream of the format before PyTorch 1.6.
#[derive(Debug)]
pub struct Stream {
    file: File,
    /// Position and length in bytes of the storages.
    places: HashMap<String, (u64, u64)>,
}

impl Container {
    /// Whether a file begins like one of the containers.
    ///
    /// # Errors
    /// [`Error::input`] if the file cannot be read.
    pub fn is_one(path: &Path) -> Result<bool> {
        let mut first = vec![];
        files::open(path)?.take(64).read_to_end(&mut first).or_input(path.display())?;
        Ok(first.starts_with(b"PK\x03\x04") || is_stream(&first))
    }

    /// Opens a container. Returns it with its pickle and the index of the pickle's root.
    ///
    /// # Errors
    /// [`Error::input`] if the file is truncated or not in one of the formats.
    pub fn open(path: &Path) -> Result<(Self, Pickle, Id)> {
        let mut file = files::open(path)?;
        let mut first = vec![];
        file.by_ref().take(64).read_to_end(&mut first).or_input(path.display())?;
        if is_stream(&first) {
            let (stream, pickle, root) = Stream::open(file).map_err(|error| not_one(path).because(error))?;
            return Ok((Self::Stream(stream), pickle, root));
        }
        let (archive, pickle, root) = Archive::open(path, file)?;
        Ok((Self::Archive(archive), pickle, root))
    }

    /// Whether the values are stored in big-endian order. A stream is always little-endian.
    pub fn is_big_endian(&self) -> bool {
        match self {
            Self::Archive(archive) => archive.big_endian,
            Self::Stream(_) => false,
        }
    }

    /// Reads a storage from its start to its end, so that its CRC is checked. `each` receives consecutive bytes.
    ///
    /// # Errors
    /// [`Error::input`] naming the storage, if it is missing, has fewer than `least` bytes or is damaged.
    pub fn read(&mut self, key: &str, least: u64, mut each: impl FnMut(&[u8])) -> Result<()> {
        let subject = format!("storage {key}");
        let short = |length: u64| Err(Error::input(&subject, format!("has {length} bytes, expected at least {least}")));
        match self {
            Self::Archive(archive) => {
                let name = format!("{}data/{key}", archive.prefix);
                let options = ZipReadOptions::new().ignore_crc32(archive.unchecked);
                let entry = archive.zip.by_name_with_options(&name, options).or_input(&subject)?;
                let length = entry.size();
                if length < least {
                    return short(length);
                }
                let read = copy(entry, &mut each);
                let read = read.map_err(|error| {
                    let problem =
                        "is damaged: its bytes are not those that were saved; copy or download the file again";
                    Error::input(&subject, problem).because(error)
                })?;
                if read == length { Ok(()) } else { short(read) }
            }
            Self::Stream(stream) => {
                let missing = || Error::input(&subject, "is missing");
                let &(start, length) = stream.places.get(key).ok_or_else(missing)?;
                if length < least {
                    return short(length);
                }
                stream.file.seek(SeekFrom::Start(start)).or_input(&subject)?;
                let read = copy((&stream.file).take(length), &mut each).or_input(&subject)?;
                if read == length { Ok(()) } else { short(read) }
            }
        }
    }
}

/// Passes all bytes of `from` to `each`. Returns their number.
fn copy(mut from: impl Read, each: &mut impl FnMut(&[u8])) -> std::io::Result<u64> {
    let (mut buffer, mut all) = (vec![0; CHUNK], 0);
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(all),
            Ok(read) => {
                each(&buffer[..read]);
                all += read as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn not_one(path: &Path) -> Error {
    Error::input(path.display(), "is not a PyTorch checkpoint")
}

impl Archive {
    fn open(path: &Path, file: File) -> Result<(Self, Pickle, Id)> {
        let mut zip = ZipArchive::new(BufReader::new(file)).map_err(|error| {
            let problem = "begins as a PyTorch checkpoint and is cut off or damaged: copy or download it again";
            Error::input(path.display(), problem).because(error)
        })?;
        let name = pickle_name(&zip).map_err(|problem| Error::input(path.display(), problem))?;
        let prefix = name.trim_end_matches("data.pkl").to_string();
        let is_zero = |index| zip.by_index_data(index).map_or(true, |entry| entry.crc32() == 0);
        let unchecked = (0..zip.len()).all(is_zero);
        let mut small = |name: &str| -> Result<Option<Vec<u8>>> {
            let options = ZipReadOptions::new().ignore_crc32(unchecked);
            let Some(index) = zip.index_for_name(name) else { return Ok(None) };
            let entry = zip.by_index_with_options(index, options).map_err(|error| not_one(path).because(error))?;
            if entry.size() > LARGEST_PICKLE {
                let problem = format!("{name} has {} bytes, at most {LARGEST_PICKLE} are read", entry.size());
                return Err(not_one(path).advise(format!(": {problem}")));
            }
            let mut bytes = vec![];
            entry.take(LARGEST_PICKLE).read_to_end(&mut bytes).map_err(|error| {
                Error::input(path.display(), format!("{name} is damaged: copy or download it again")).because(error)
            })?;
            Ok(Some(bytes))
        };
        let big_endian = match small(&format!("{prefix}byteorder"))?.as_deref() {
            None | Some(b"little") => false,
            Some(b"big") => true,
            Some(other) => {
                let other = String::from_utf8_lossy(&other[..other.len().min(40)]).into_owned();
                return Err(Error::input(
                    path.display(),
                    format!("has the byteorder {other:?}, expected little or big"),
                ));
            }
        };
        let bytes = small(&name)?.unwrap_or_default();
        let (pickle, root, _) = pickle::read(&bytes).map_err(|error| not_one(path).because(error))?;
        Ok((Self { zip, prefix, big_endian, unchecked }, pickle, root))
    }
}

/// Name of the entry with the pickle. Entries that macOS adds to archives are passed over.
fn pickle_name(zip: &ZipArchive<BufReader<File>>) -> Result<String, String> {
    let names: Vec<String> = zip.file_names().flatten().map(|name| name.into_owned()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let inside = |name: &str, file: &str| name.rsplit('/').next() == Some(file);
    if names.iter().any(|name| inside(name, "constants.pkl")) && names.iter().any(|name| name.contains("/code/")) {
        return Err("is a TorchScript program, not a checkpoint: save model.state_dict() with torch.save".into());
    }
    let found: Vec<&str> =
        names.iter().filter(|name| inside(name, "data.pkl") && !name.starts_with("__MACOSX")).copied().collect();
    let within = |ends: &[&str]| names.iter().find(|name| ends.iter().any(|end| name.ends_with(end)));
    match (&found[..], within(&[".pth", ".ckpt", ".pt", ".bin", ".safetensors"])) {
        ([name], _) => Ok((*name).to_string()),
        ([], Some(inner)) => Err(format!("is a zip archive that holds {inner}: unpack it and give the file inside")),
        ([], None) => Err("is a zip archive without data.pkl, not a PyTorch checkpoint".into()),
        (several, _) => Err(format!("has several pickles, expected one: {}", several.join(", "))),
    }
}

/// Whether a file begins with the pickled number of the format before PyTorch 1.6.
fn is_stream(first: &[u8]) -> bool {
    first.first() == Some(&0x80) && first.windows(STREAM_MAGIC.len()).any(|window| window == STREAM_MAGIC)
}

impl Stream {
    /// Reads the pickles at the start of the file: the magic number, the protocol, a description of the machine, the
    /// saved object, and the keys of the storages in the order in which they follow.
    fn open(mut file: File) -> Result<(Self, Pickle, Id)> {
        let length = file.metadata().or_input("length")?.len();
        let mut head = vec![];
        file.seek(SeekFrom::Start(0)).or_input("start")?;
        file.by_ref().take(STREAM_PICKLES).read_to_end(&mut head).or_input("start")?;
        let mut at = 0;
        let mut next = || -> Result<(Pickle, Id)> {
            let (pickle, root, length) = pickle::read(&head[at..])?;
            at += length;
            Ok((pickle, root))
        };
        for _ in 0..3 {
            next()?;
        }
        let (pickle, root) = next()?;
        let (keys, list) = next()?;
        let order = keys.sequence(list).ok_or_else(|| Error::input("storages", "are not listed"))?;
        let sizes = value_sizes(&pickle);
        let (mut places, mut at) = (HashMap::new(), at as u64);
        for &key in order {
            let key = keys.text(key).ok_or_else(|| Error::input("storages", "a key is not text"))?;
            let size = sizes.get(key).ok_or_else(|| Error::input(format!("storage {key}"), "has an unknown type"))?;
            let mut values = [0; 8];
            file.seek(SeekFrom::Start(at))
                .and_then(|_| file.read_exact(&mut values))
                .or_input(format!("storage {key}"))?;
            let bytes = u64::from_le_bytes(values).checked_mul(*size);
            let end = bytes.and_then(|bytes| bytes.checked_add(at + 8)).filter(|end| *end <= length);
            let end = end.ok_or_else(|| Error::input(format!("storage {key}"), "is cut off: copy the file again"))?;
            places.insert(key.to_string(), (at + 8, end - at - 8));
            at = end;
        }
        Ok((Self { file, places }, pickle, root))
    }
}

/// Bytes per value of every storage that a pickle refers to.
fn value_sizes(pickle: &Pickle) -> HashMap<&str, u64> {
    let storage = |value: &Value| {
        let Value::Persistent(storage) = value else { return None };
        let &[_, kind, key, ..] = pickle.sequence(*storage)? else { return None };
        Some((pickle.text(key)?, storage_type::size(pickle.global(kind)?)?))
    };
    pickle.values().filter_map(storage).collect()
}
