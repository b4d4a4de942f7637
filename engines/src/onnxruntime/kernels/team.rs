//! Threads that work on the same phases of a kernel, and the buffers that they share.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Number of times that a worker looks for the end of a phase before it lets other threads run. Looking takes some tens of
/// microseconds, longer than most parts.
const MOST_SPINS: u32 = 1000;

/// State that the workers of one call of a kernel share.
pub struct Team {
    /// Number of workers that are expected.
    workers: usize,
    /// The next part of any phase that no worker has taken.
    next: AtomicUsize,
    /// Number of parts that are done.
    done: AtomicUsize,
}

impl Team {
    /// A team of `workers` workers.
    pub fn new(workers: usize) -> Self {
        Self { workers: workers.max(1), next: AtomicUsize::new(0), done: AtomicUsize::new(0) }
    }
}

/// One thread of a team. All workers run the same phases in the same order.
///
/// Parts are numbered through all phases, and every worker takes the next number. A worker that takes a part of the next
/// phase waits until the current phase is done. The worker with the lowest number never waits, so a team is done even if
/// only one of its workers runs.
pub struct Worker<'a> {
    team: &'a Team,
    /// Number of the first part of the current phase.
    first: usize,
    /// Number of the part that this worker has taken.
    taken: usize,
}

impl<'a> Worker<'a> {
    /// Joins a team.
    pub fn new(team: &'a Team) -> Self {
        Self { team, first: 0, taken: team.next.fetch_add(1, Ordering::Relaxed) }
    }

    /// Number of workers of the team.
    pub fn workers(&self) -> usize {
        self.team.workers
    }

    /// Runs a phase as [`Worker::phase`] does, with the parts in another order: workers that take turns take neighbouring
    /// parts, so that each of them reads memory as one stream.
    pub fn streams(&mut self, count: usize, mut part: impl FnMut(usize)) {
        let workers = self.team.workers;
        let (each, more) = (count / workers, count % workers);
        self.phase(count, |index| {
            let (stream, place) = (index % workers, index / workers);
            part(stream * each + stream.min(more) + place);
        });
    }

    /// Runs a phase of `count` parts: this worker's share of them. Returns when all parts are done. What they wrote is
    /// then visible.
    pub fn phase(&mut self, count: usize, mut part: impl FnMut(usize)) {
        let end = self.first + count;
        while self.taken < end {
            part(self.taken - self.first);
            self.team.done.fetch_add(1, Ordering::Release);
            self.taken = self.team.next.fetch_add(1, Ordering::Relaxed);
        }
        self.first = end;
        let mut spins = 0;
        while self.team.done.load(Ordering::Acquire) < end {
            // If the other workers wait for a core, this one must not keep it.
            if spins < MOST_SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// A buffer that the workers of a team write in parts.
pub struct Shared<'a, T> {
    data: *mut T,
    length: usize,
    buffer: PhantomData<&'a mut [T]>,
}

// SAFETY: this is a mutable slice that several threads use. The methods require that no two of them use an element at
// the same time.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Shares a buffer.
    pub fn new(buffer: &'a mut [T]) -> Self {
        Self { data: buffer.as_mut_ptr(), length: buffer.len(), buffer: PhantomData }
    }

    /// Shares a buffer of `length` elements, with any values.
    pub fn fit(buffer: &'a mut Vec<T>, length: usize) -> Self
    where
        T: Clone + Default,
    {
        buffer.resize(length, T::default());
        Self::new(buffer)
    }

    /// The elements of a range, for reading.
    ///
    /// # Safety
    /// No worker writes these elements in the current phase.
    pub unsafe fn get(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.length);
        // SAFETY: the range is inside of the buffer, and the caller promises that nothing writes it.
        unsafe { std::slice::from_raw_parts(self.data.add(range.start), range.len()) }
    }

    /// The elements of a range, for writing.
    ///
    /// # Safety
    /// No other worker uses these elements in the current phase, and the caller holds no other reference to them.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn get_mut(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.length);
        // SAFETY: the range is inside of the buffer, and the caller promises that nothing else uses it.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }

    /// Row `row` of a matrix of `width` columns, for reading.
    ///
    /// # Safety
    /// As for [`Shared::get`].
    pub unsafe fn row(&self, row: usize, width: usize) -> &[T] {
        // SAFETY: the caller promises it.
        unsafe { self.get(row * width..(row + 1) * width) }
    }

    /// `count` columns of a row of a matrix of `width` columns, from `column` on, for writing.
    ///
    /// # Safety
    /// As for [`Shared::get_mut`].
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn columns_mut(&self, row: usize, width: usize, column: usize, count: usize) -> &mut [T] {
        let start = row * width + column;
        // SAFETY: the caller promises it.
        unsafe { self.get_mut(start..start + count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every phase adds the sum of what the phase before it wrote, so that an early start changes the result.
    fn sums(workers: usize) -> Vec<u64> {
        let mut buffer = vec![1u64; 64];
        let mut next = vec![0u64; 64];
        let (a, b) = (Shared::new(&mut buffer), Shared::new(&mut next));
        let team = Team::new(workers);
        let run = || {
            let mut worker = Worker::new(&team);
            for phase in 0..200 {
                let (from, to) = if phase % 2 == 0 { (&a, &b) } else { (&b, &a) };
                let sum = |part: usize| {
                    // SAFETY: a phase reads one buffer, and its parts write different elements of the other.
                    let (from, to) = unsafe { (from.get(0..64), to.get_mut(part..part + 1)) };
                    to[0] = from.iter().sum::<u64>() % 1_000_003 + part as u64;
                };
                if phase % 3 == 0 { worker.streams(64, sum) } else { worker.phase(64, sum) }
            }
        };
        std::thread::scope(|scope| {
            (1..workers).for_each(|_| drop(scope.spawn(run)));
            run();
        });
        buffer
    }

    #[test]
    fn phases_follow_one_another_with_any_number_of_workers() {
        let alone = sums(1);
        assert!(alone.iter().any(|&sum| sum != alone[0]));
        for workers in [2, 3, 7] {
            assert_eq!(sums(workers), alone, "{workers} workers");
        }
    }

    #[test]
    fn streams_are_neighbouring_parts() {
        let (team, mut order) = (Team::new(3), vec![]);
        Worker::new(&team).streams(8, |part| order.push(part));
        assert_eq!(order, [0, 3, 6, 1, 4, 7, 2, 5]);
    }

    #[test]
    fn a_worker_that_comes_late_has_nothing_to_do() {
        let team = Team::new(2);
        let mut count = 0;
        Worker::new(&team).phase(5, |_| count += 1);
        Worker::new(&team).phase(5, |_| panic!("is done"));
        assert_eq!(count, 5);
    }
}
