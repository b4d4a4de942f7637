//! Limits of this process, against which sizes are checked before anything is allocated.

use std::sync::LazyLock;

use crate::{Error, Result};

/// Number of bytes that this process can use: the memory of the machine, or less if its control group or its address
/// space is limited. `u64::MAX` if the system does not say.
pub fn memory() -> u64 {
    // Read once: it is asked for at every request, and a file of jobs has up to a million.
    static MEMORY: LazyLock<u64> = LazyLock::new(read_memory);
    *MEMORY
}

fn read_memory() -> u64 {
    let number = |path: &str, label: &str| {
        let text = std::fs::read_to_string(path).ok()?;
        let words = text.lines().find_map(|line| line.strip_prefix(label))?;
        words.split_whitespace().next()?.parse::<u64>().ok()
    };
    let machine = number("/proc/meminfo", "MemTotal:").map(|kilobytes| kilobytes << 10);
    let group = number("/sys/fs/cgroup/memory.max", "");
    let address_space = number("/proc/self/limits", "Max address space");
    [machine, group, address_space].into_iter().flatten().min().unwrap_or(u64::MAX)
}

/// Checks that tensors of 32-bit numbers take at most `most` bytes. Each is given by its sizes; `what` names them.
///
/// # Errors
/// [`Error::input`] about `subject`, with the needed and the available memory.
pub fn check_memory<'a>(
    subject: &str,
    what: &str,
    shapes: impl IntoIterator<Item = &'a [usize]>,
    most: u64,
) -> Result<()> {
    let needed = shapes.into_iter().fold(0u64, |sum, shape| sum.saturating_add(bytes(shape)));
    if needed <= most {
        return Ok(());
    }
    let (needed, most) = (gigabytes(needed), gigabytes(most));
    Err(Error::input(subject, format!("{what} would take {needed} of memory, expected at most {most}")))
}

/// Bytes of a tensor of 32-bit numbers with these sizes; `u64::MAX` if they overflow.
pub fn bytes(shape: &[usize]) -> u64 {
    shape.iter().fold(4u64, |bytes, &size| bytes.saturating_mul(size as u64))
}

/// A number of bytes for messages.
pub fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / f64::from(1u32 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_added_without_overflow() {
        let check = |shapes: &[&[usize]]| check_memory("file", "its weights", shapes.iter().copied(), 24);
        check(&[&[2, 2], &[], &[0, usize::MAX]]).unwrap();
        assert!(check(&[&[2, 3], &[]]).is_err());
        let error = check(&[&[usize::MAX, usize::MAX], &[1]]).unwrap_err();
        assert!(error.is_input() && error.to_string().starts_with("file: its weights would take "), "{error}");
    }
}
