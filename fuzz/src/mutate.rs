//! Mutations of inputs.

use std::ops::Range;

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

/// Numbers that readers handle wrongly most often.
const NUMBERS: [&str; 14] = [
    "0",
    "1",
    "-1",
    "255",
    "256",
    "65536",
    "2147483648",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "1e308",
    "1e999",
    "-0.0",
    "0.5",
];
/// Bytes with which fixed-size numbers are overwritten.
const EDGES: [u8; 6] = [0, 1, 0x7f, 0x80, 0xfe, 0xff];
/// Longest block that is copied, removed or inserted at once, in bytes.
const LONGEST: usize = 512;
/// Largest input, in bytes. Copies would let it grow without end.
const LARGEST: usize = 4 << 20;

/// A mutation of one of the seeds.
pub fn mutated(seeds: &[Vec<u8>], random: &mut ChaCha8Rng) -> Vec<u8> {
    let mut input = seeds.choose(random).cloned().unwrap_or_default();
    // Most inputs have one fault, so that the reader gets far.
    let count = *[1, 1, 1, 2, 4, 8].choose(random).unwrap_or(&1);
    for _ in 0..count {
        mutate(&mut input, seeds, random);
    }
    input.truncate(LARGEST);
    input
}

fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut ChaCha8Rng) {
    if input.is_empty() {
        input.push(random.random());
        return;
    }
    let at = random.random_range(0..input.len());
    match random.random_range(0..12) {
        0 => input[at] ^= 1 << random.random_range(0..8),
        1 => input[at] = random.random(),
        2 => overwrite(input, at, random),
        3 => input.truncate(at),
        4 => drop(input.drain(block(input, random))),
        5 => {
            let copied = input[block(input, random)].to_vec();
            input.splice(at..at, copied);
        }
        6 => {
            let copied = input[block(input, random)].to_vec();
            let end = (at + copied.len()).min(input.len());
            input[at..end].copy_from_slice(&copied[..end - at]);
        }
        7 => {
            let inserted: Vec<u8> = (0..random.random_range(1..16)).map(|_| random.random()).collect();
            input.splice(at..at, inserted);
        }
        8 => splice(input, at, seeds, random),
        9 => replace(input, &runs(input, is_numeric), NUMBERS.choose(random).unwrap_or(&"0").as_bytes(), random),
        10 => {
            let words = runs(input, |byte| byte.is_ascii_alphabetic() || byte == b'_');
            let word = words.choose(random).map(|word| input[word.clone()].to_vec()).unwrap_or_default();
            replace(input, &words, &word, random);
        }
        _ => remove_pair(input, at),
    }
}

/// Overwrites one to eight bytes with a number at the edge of its range.
fn overwrite(input: &mut [u8], at: usize, random: &mut ChaCha8Rng) {
    let edge = *EDGES.choose(random).unwrap_or(&0);
    let end = (at + (1 << random.random_range(0..4))).min(input.len());
    input[at..end].fill(edge);
}

/// Continues the input with the end of another seed.
fn splice(input: &mut Vec<u8>, at: usize, seeds: &[Vec<u8>], random: &mut ChaCha8Rng) {
    let Some(other) = seeds.choose(random).filter(|other| !other.is_empty()) else { return };
    input.truncate(at);
    input.extend_from_slice(&other[random.random_range(0..other.len())..]);
}

fn block(input: &[u8], random: &mut ChaCha8Rng) -> Range<usize> {
    let begin = random.random_range(0..input.len());
    let length = random.random_range(1..=LONGEST.min(input.len() - begin));
    begin..begin + length
}

fn is_numeric(byte: u8) -> bool {
    byte.is_ascii_digit() || matches!(byte, b'-' | b'.')
}

/// Longest runs of bytes of a kind. At most some thousand are returned.
fn runs(input: &[u8], is_kind: impl Fn(u8) -> bool) -> Vec<Range<usize>> {
    const MOST: usize = 4096;
    let (mut runs, mut begin) = (vec![], None);
    for (index, &byte) in input.iter().enumerate() {
        match (is_kind(byte), begin) {
            (true, None) => begin = Some(index),
            (false, Some(start)) => {
                runs.push(start..index);
                begin = None;
            }
            _ => {}
        }
        if runs.len() == MOST {
            break;
        }
    }
    runs.extend(begin.map(|start| start..input.len()));
    runs
}

fn replace(input: &mut Vec<u8>, places: &[Range<usize>], by: &[u8], random: &mut ChaCha8Rng) {
    if let Some(place) = places.choose(random) {
        input.splice(place.clone(), by.iter().copied());
    }
}

/// Removes the text between the commas around a byte: an entry of a list or of an object.
fn remove_pair(input: &mut Vec<u8>, at: usize) {
    let begin = input[..at].iter().rposition(|&byte| byte == b',').unwrap_or(0);
    let end = input[at..].iter().position(|&byte| byte == b',').map_or(input.len(), |length| at + length);
    input.drain(begin..end);
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn a_mutation_depends_on_nothing_but_its_number() {
        let seeds = [b"{\"tokens\": 16, \"class\": 3}".to_vec(), vec![0; 300], vec![]];
        let case = |number: u64| {
            let mut random = ChaCha8Rng::seed_from_u64(7);
            random.set_stream(number);
            mutated(&seeds, &mut random)
        };
        let all: std::collections::BTreeSet<Vec<u8>> = (0..2000).map(case).collect();
        assert!(all.len() > 1000, "{}", all.len());
        assert_eq!(case(5), case(5));
    }
}
