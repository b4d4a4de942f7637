//! Memory use of this process.

/// Resets the peak resident size that the kernel records, if the kernel supports it.
pub fn forget_peak() {
    // If this fails, the peak is the peak of the whole process, which is an upper bound.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Peak resident size of this process in bytes; 0 if the kernel does not report it.
pub fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kilobytes| kilobytes << 10)
}
