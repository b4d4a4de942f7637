//! The random numbers by which published tools draw subsets.

use rand_mt::Mt;

/// The permutations of NumPy's `RandomState`.
pub struct Random(Mt);

impl Random {
    /// The generator of a seed.
    pub fn new(seed: u32) -> Self {
        Self(Mt::new(seed))
    }

    /// A permutation of `0..count` (NumPy: `RandomState.permutation`). Its beginning is `choice` without replacement.
    pub fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for last in (1..count).rev() {
            order.swap(last, self.at_most(last as u32) as usize);
        }
        order
    }

    /// A number in `0..=most`: random bits, drawn again while they are too large.
    fn at_most(&mut self, most: u32) -> u32 {
        let mask = u32::MAX >> most.leading_zeros();
        loop {
            let drawn = self.0.next_u32() & mask;
            if drawn <= most {
                return drawn;
            }
        }
    }
}
