//! Random numbers of a training.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Purpose of random numbers. Each purpose has its own stream, so that its numbers do not depend on how many numbers
/// are drawn for other purposes.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// Initial weights.
    Initial,
    /// Choice of the validation photographs.
    Split,
    /// Order of the photographs in an epoch.
    Order,
    /// Crops.
    Crop,
    /// Samples of the tokenizer's posterior.
    Posterior,
    /// Dropped labels.
    Labels,
    /// Noise and times of flow matching.
    Flow,
    /// Dropout.
    Dropout,
    /// Positions of the first token.
    Shift,
    /// Photographs in the place of those that cannot be used.
    Replacement,
}

/// The random number generator of a sample, counted over all steps, or of a step. It depends on the arguments only, so that a
/// resumed run needs no saved state, and every rank draws the numbers of its own samples.
pub fn randomness(seed: u64, purpose: Purpose, number: usize) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(((purpose as u64) << 48) | number as u64);
    random
}
