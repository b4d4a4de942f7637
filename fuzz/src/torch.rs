//! Writes checkpoints as `torch.save` does.

use std::io::{Cursor, Read, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// Names and contents of the files of an archive.
pub type Files = Vec<(String, Vec<u8>)>;

/// An archive of stored files.
pub fn zip_file(files: &[(&str, &[u8])]) -> Vec<u8> {
    packed(files, CompressionMethod::Stored)
}

/// An archive of compressed files.
pub fn deflated(files: &Files) -> Vec<u8> {
    let files: Vec<_> = files.iter().map(|(name, contents)| (&name[..], &contents[..])).collect();
    packed(&files, CompressionMethod::Deflated)
}

fn packed(files: &[(&str, &[u8])], method: CompressionMethod) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(vec![]));
    for (name, contents) in files {
        zip.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(contents).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// An archive of stored files.
pub fn stored(files: &Files) -> Vec<u8> {
    zip_file(&files.iter().map(|(name, contents)| (&name[..], &contents[..])).collect::<Vec<_>>())
}

/// An archive of stored files whose CRCs are all 0, as PyTorch writes it if it is told not to compute them.
pub fn without_crc(files: &Files) -> Vec<u8> {
    let mut archive = ZipArchive::new(Cursor::new(stored(files))).unwrap();
    let start = archive.central_directory_start() as usize;
    let headers: Vec<usize> =
        (0..archive.len()).map(|i| archive.by_index_raw(i).unwrap().header_start() as usize).collect();
    let mut bytes = archive.into_inner().into_inner();
    for header in headers {
        bytes[header + 14..header + 18].fill(0);
    }
    let mut at = start;
    while bytes[at..].starts_with(b"PK\x01\x02") {
        bytes[at + 16..at + 20].fill(0);
        let length = |field: usize| u16::from_le_bytes([bytes[at + field], bytes[at + field + 1]]) as usize;
        at += 46 + length(28) + length(30) + length(32);
    }
    bytes
}

/// The files of an archive.
pub fn files(archive: Vec<u8>) -> Files {
    let mut archive = ZipArchive::new(Cursor::new(archive)).unwrap();
    let mut files = vec![];
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).unwrap();
        let mut contents = vec![];
        entry.read_to_end(&mut contents).unwrap();
        files.push((entry.name().unwrap().into_owned(), contents));
    }
    files
}

// Pickles.

/// A class or function of a module.
pub fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

/// A text.
pub fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// An integer of eight bytes.
pub fn integer(value: i64) -> Vec<u8> {
    [&[0x8a, 8][..], &value.to_le_bytes()].concat()
}

/// A floating-point number.
pub fn float(value: f64) -> Vec<u8> {
    [b"G", &value.to_be_bytes()[..]].concat()
}

/// A tuple.
pub fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(".to_vec(), items.concat(), b"t".to_vec()].concat()
}

/// A list.
pub fn list(items: &[Vec<u8>]) -> Vec<u8> {
    [b"](".to_vec(), items.concat(), b"e".to_vec()].concat()
}

/// The result of a function.
pub fn call(function: Vec<u8>, arguments: &[Vec<u8>]) -> Vec<u8> {
    [function, tuple(arguments), b"R".to_vec()].concat()
}

/// A dictionary.
pub fn dict<K: AsRef<str>>(entries: &[(K, Vec<u8>)]) -> Vec<u8> {
    let entries =
        entries.iter().flat_map(|(key, value)| [text(key.as_ref()), value.clone()]).collect::<Vec<_>>().concat();
    [b"}(".to_vec(), entries, b"u".to_vec()].concat()
}

/// An `argparse.Namespace`.
pub fn namespace(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    [global("argparse", "Namespace"), b")\x81".to_vec(), dict(entries), b"b".to_vec()].concat()
}

/// A tensor in a storage, with its offset, shape and stride in values.
pub fn tensor(storage: Vec<u8>, offset: usize, shape: &[usize], stride: &[usize]) -> Vec<u8> {
    call(global("torch._utils", "_rebuild_tensor_v2"), &arguments(storage, offset, shape, stride))
}

/// The arguments of `_rebuild_tensor_v2`.
pub fn arguments(storage: Vec<u8>, offset: usize, shape: &[usize], stride: &[usize]) -> [Vec<u8>; 6] {
    let [shape, stride] = [shape, stride].map(|n| tuple(&n.iter().map(|&n| integer(n as i64)).collect::<Vec<_>>()));
    let hooks = call(global("collections", "OrderedDict"), &[]);
    [storage, integer(offset as i64), shape, stride, vec![0x89], hooks]
}

/// A reference to a storage of `values` numbers.
pub fn storage(kind: &str, key: &str, device: &str, values: usize) -> Vec<u8> {
    let place = [text("storage"), global("torch", kind), text(key), text(device), integer(values as i64)];
    [tuple(&place), b"Q".to_vec()].concat()
}

/// The strides of a contiguous tensor.
pub fn contiguous(shape: &[usize]) -> Vec<usize> {
    (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect()
}

/// An archive with this pickle and these storages, named by their index.
pub fn checkpoint(pickle: &[u8], storages: &[Vec<u8>]) -> Files {
    let pickle = ("archive/data.pkl".to_string(), [b"\x80\x02", pickle, b"."].concat());
    let storages = storages.iter().enumerate().map(|(key, bytes)| (format!("archive/data/{key}"), bytes.clone()));
    [pickle].into_iter().chain(storages).collect()
}

/// A checkpoint of the format before PyTorch 1.6.
pub fn stream(root: &[u8], storages: &[Vec<u8>]) -> Vec<u8> {
    let magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
    let machine = dict(&[("protocol_version", integer(1001)), ("little_endian", vec![0x88])]);
    let keys: Vec<_> = (0..storages.len()).map(|key| text(&key.to_string())).collect();
    let pickles =
        [integer(1001), machine, root.to_vec(), list(&keys)].map(|pickle| [b"\x80\x02", &pickle[..], b"."].concat());
    let values = storages.iter().flat_map(|bytes| [(bytes.len() as u64 / 4).to_le_bytes().to_vec(), bytes.clone()]);
    [magic.to_vec(), pickles.concat(), values.collect::<Vec<_>>().concat()].concat()
}

/// Little-endian bytes of numbers.
pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
