//! SHA-256, by which files, weights and models are told apart.

use std::io::Read;

use sha2::{Digest, Sha256};

/// SHA-256 of what is added to it.
#[derive(Clone, Debug, Default)]
pub struct Hash(Sha256);

impl Hash {
    /// Adds bytes.
    pub fn add(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.update(bytes);
    }

    /// Adds the little-endian bytes of values.
    pub fn add_values<'a>(&mut self, values: impl IntoIterator<Item = &'a f32>) {
        values.into_iter().for_each(|value| self.add(value.to_le_bytes()));
    }

    /// The hash in hexadecimal.
    pub fn hex(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// SHA-256 of some bytes in hexadecimal.
pub fn sha256(bytes: impl AsRef<[u8]>) -> String {
    let mut hash = Hash::default();
    hash.add(bytes);
    hash.hex()
}

/// Length and SHA-256 in hexadecimal of all that a reader gives.
///
/// # Errors
/// Those of the reader.
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

/// The beginning of a hash, for messages.
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
