//! Memory use and memory limit of this process.

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

/// Number of bytes that this process can use: the memory of the machine, or less if its control group or its address
/// space is limited. `u64::MAX` if the system does not say.
pub fn limit() -> u64 {
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
