//! Large pages of memory: for copies of weights that kernels read often.
//!
//! The weights of a bundle are mapped from their file, in pages of 4 KB. From pages of 2 MB, a processor reads memory faster:
//! it translates fewer addresses, and its prefetching ends at fewer borders.

use std::mem::MaybeUninit;

#[cfg(target_os = "linux")]
pub use linux::LargePages;

/// Asks the system for large pages for memory that has not been used yet.
#[cfg_attr(not(target_os = "linux"), expect(unused_variables))]
pub fn prefer_large<T>(memory: &mut [MaybeUninit<T>]) {
    #[cfg(target_os = "linux")]
    linux::advise(memory.as_mut_ptr().cast(), size_of_val(memory));
}

#[cfg(target_os = "linux")]
mod linux {
    use std::ffi::c_void;
    use std::fs;
    use std::ptr::{NonNull, null_mut};

    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

    /// Size of a large page.
    const LARGE: usize = 2 << 20;
    /// Alignment of every copy: a line of the cache.
    const LINE: usize = 64;

    /// Numbers that are copied byte by byte.
    pub trait Number: Copy {}
    impl Number for f32 {}
    impl Number for i8 {}

    /// Asks the system for large pages. Pages are only backed in another way: if it has none, nothing changes.
    pub(super) fn advise(start: *mut u8, bytes: usize) {
        let before = start.align_offset(LARGE).min(bytes);
        // SAFETY: this changes only how the system backs the memory, not what it holds.
        let _ = unsafe { madvise(start.wrapping_add(before).cast(), bytes - before, Advice::LinuxHugepage) };
    }

    /// Memory in large pages, in which slices are copied.
    #[derive(Debug)]
    pub struct LargePages {
        start: NonNull<u8>,
        length: usize,
        used: usize,
    }

    // SAFETY: this is memory that only this value owns.
    unsafe impl Send for LargePages {}

    impl LargePages {
        /// Memory for slices of these lengths in bytes. `None` if the system has no large pages, or no memory.
        pub fn new(slices: impl Iterator<Item = usize>) -> Option<Self> {
            let modes = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
            if modes.contains("[never]") {
                return None;
            }
            let length = slices.map(|bytes| bytes.next_multiple_of(LINE)).sum::<usize>().next_multiple_of(4096);
            let flags = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: this makes a new mapping.
            let start = unsafe { mmap_anonymous(null_mut(), length + LARGE, flags, MapFlags::PRIVATE) }.ok()?;
            let before = start.align_offset(LARGE);
            // SAFETY: these are the two ends of the new mapping, which nothing uses.
            let ends = unsafe {
                let first = if before > 0 { munmap(start, before) } else { Ok(()) };
                first.and(munmap(start.byte_add(before + length), LARGE - before))
            };
            // SAFETY: the offset is inside of the mapping.
            let start = unsafe { start.byte_add(before) };
            let pages = Self { start: NonNull::new(start.cast())?, length, used: 0 };
            ends.ok()?;
            advise(start.cast(), length);
            Some(pages)
        }

        /// Copies a slice, and tells the system that the process no longer uses the file that the slice is mapped from.
        ///
        /// # Safety
        /// The copy must not be used after these pages are dropped.
        ///
        /// # Panics
        /// If the pages have no room left.
        pub unsafe fn copy<'a, T: Number>(&mut self, slice: &'a [T]) -> &'a [T] {
            let bytes = size_of_val(slice);
            assert!(self.used + bytes <= self.length, "the copy has no room");
            // SAFETY: the copy is inside of the pages, after everything that was copied before. The caller promises that they
            // outlive the slice that is returned.
            let copy = unsafe {
                let copy = self.start.add(self.used).cast::<T>();
                copy.copy_from_nonoverlapping(NonNull::from(slice).cast(), slice.len());
                NonNull::slice_from_raw_parts(copy, slice.len()).as_ref()
            };
            self.used += bytes.next_multiple_of(LINE);
            release(slice.as_ptr().addr(), bytes);
            copy
        }
    }

    impl Drop for LargePages {
        fn drop(&mut self) {
            // SAFETY: this is the whole mapping, and its users promised not to use it any more. It cannot fail for a mapping
            // that exists.
            let _ = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
        }
    }

    /// Tells the system that the process does not use these bytes for now, if they are mapped from a file that the process
    /// only reads. The next access reads the file again.
    fn release(start: usize, bytes: usize) {
        const PAGE: usize = 4096;
        let (first, end) = (start.next_multiple_of(PAGE), (start + bytes) / PAGE * PAGE);
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        if first < end && maps.lines().any(|line| is_file(line, first, end)) {
            // SAFETY: the pages are those of a file, so their contents stay the same. An error changes nothing.
            let _ = unsafe { madvise(first as *mut c_void, end - first, Advice::LinuxDontNeed) };
        }
    }

    /// Whether a line of `/proc/self/maps` is a mapping that is only read, of a file, and contains a range of addresses.
    fn is_file(line: &str, first: usize, end: usize) -> bool {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [range, access, _offset, _device, inode, _path, ..] = words[..] else { return false };
        let address = |text| usize::from_str_radix(text, 16).ok();
        let range = range.split_once('-').and_then(|(low, high)| Some((address(low)?, address(high)?)));
        access.starts_with("r-") && inode != "0" && range.is_some_and(|(low, high)| low <= first && end <= high)
    }

    #[cfg(test)]
    mod tests {
        use std::io::Write;

        use rustix::mm::mmap;

        use super::*;

        #[test]
        fn copies_are_equal_and_aligned() {
            let (levels, floats) = ((0..100_000).map(|i| i as i8).collect::<Vec<_>>(), vec![1.5f32; 1000]);
            let bytes = [size_of_val(&levels[..]), size_of_val(&floats[..])];
            // A system without large pages has no copies.
            let Some(mut pages) = LargePages::new(bytes.into_iter()) else { return };
            // SAFETY: the copies are used only here.
            let (first, second) = unsafe { (pages.copy(&levels), pages.copy(&floats)) };
            assert!(first == levels && second == floats);
            assert!(first.as_ptr().addr().is_multiple_of(LARGE) && second.as_ptr().addr().is_multiple_of(LINE));
            // The originals are on the heap, and are not released.
            assert!(levels.iter().enumerate().all(|(i, &level)| level == i as i8));
        }

        #[test]
        fn a_file_is_released_and_can_be_read_again() {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&vec![7; 1 << 20]).unwrap();
            // SAFETY: this makes a new mapping, which is not removed.
            let start = unsafe { mmap(null_mut(), 1 << 20, ProtFlags::READ, MapFlags::PRIVATE, &file, 0) }.unwrap();
            // SAFETY: the mapping has these bytes, and nothing writes the file.
            let mapped: &[i8] = unsafe { std::slice::from_raw_parts(start.cast(), 1 << 20) };
            let resident = || {
                let statm = fs::read_to_string("/proc/self/smaps").unwrap();
                let of_mapping = statm.split_once(&format!("{:x}-", start.addr())).unwrap().1;
                of_mapping.split_once("Rss:").unwrap().1.split_whitespace().next().unwrap().parse::<usize>().unwrap()
            };
            assert!(mapped.iter().all(|&byte| byte == 7));
            assert_eq!(resident(), 1024);
            release(start.addr() + 100, (1 << 20) - 100);
            assert_eq!(resident(), 4);
            assert!(mapped.iter().all(|&byte| byte == 7));
        }

        #[test]
        fn only_files_that_are_read_are_released() {
            let line = "7f0000000000-7f0000100000 r--p 00000000 fe:00 123 /bundle/model.safetensors";
            assert!(is_file(line, 0x7f00_0000_0000, 0x7f00_0010_0000));
            assert!(!is_file(line, 0x7f00_0000_0000, 0x7f00_0010_1000));
            for other in [line.replace("r--p", "rw-p"), line.replace(" 123 ", " 0 "), "7f0000000000-".into()] {
                assert!(!is_file(&other, 0x7f00_0000_0000, 0x7f00_0010_0000), "{other}");
            }
        }
    }
}
