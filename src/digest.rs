//! SHA-256 hashes, which identify files, weights and models.

use std::io::Read;

use sha2::{Digest, Sha256};

/// An incremental SHA-256 hash.
#[derive(Clone, Debug, Default)]
pub struct Hash(Sha256);

impl Hash {
    /// Adds bytes to the hash.
    pub fn add(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.update(bytes);
    }

    /// Adds the little-endian bytes of values to the hash.
    pub fn add_values<'a>(&mut self, values: impl IntoIterator<Item = &'a f32>) {
        values.into_iter().for_each(|value| self.add(value.to_le_bytes()));
    }

    /// The hash in hexadecimal.
    pub fn hex(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// SHA-256 of bytes in hexadecimal.
pub fn sha256(bytes: impl AsRef<[u8]>) -> String {
    let mut hash = Hash::default();
    hash.add(bytes);
    hash.hex()
}

/// Length and SHA-256, in hexadecimal, of all bytes of a reader.
///
/// # Errors
/// Errors of the reader.
pub fn sha256_of(mut reader: impl Read) -> std::io::Result<(u64, String)> {
    let mut hash = Hash::default();
    let (mut block, mut length) = (vec![0; 1 << 20], 0);
    loop {
        match reader.read(&mut block)? {
            0 => return Ok((length, hash.hex())),
            read => {
                hash.add(&block[..read]);
                length += read as u64;
            }
        }
    }
}

/// The first characters of a hash, for messages.
pub fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_the_standard() {
        // FIPS 180-2, appendix B.1.
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256("abc"), expected);
        assert_eq!(sha256_of(&b"abc"[..]).unwrap(), (3, expected.to_string()));
    }
}
