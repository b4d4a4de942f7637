//! `torch.randn` on the CPU. The same seed gives the same noise as in the reference, and so the same image.
//!
//! No library provides this function. `rand_mt` generates the bits of `mt19937`; this module converts them to numbers
//! as PyTorch does.
//!
//! The bits are the same as PyTorch's. Values can differ in the last place, because PyTorch's logarithm and cosine are
//! vectorized. PyTorch fills tensors of at least 16 elements with another algorithm than smaller ones
//! (`aten/src/ATen/native/cpu/DistributionTemplates.h`, `aten/src/ATen/core/DistributionsHelper.h`).

use std::f64::consts::TAU;

use rand_mt::Mt;

/// PyTorch's CPU generator.
#[derive(Clone, Debug)]
pub struct TorchRng {
    engine: Mt,
    // The sine half of the last pair of normal values, for the next single draw.
    spare: Option<f64>,
}

const BLOCK: usize = 16;

impl TorchRng {
    /// The generator in its state after `torch.manual_seed(seed)`.
    pub fn new(seed: u64) -> Self {
        // PyTorch seeds its mt19937 with the low 32 bits.
        Self { engine: Mt::new(seed as u32), spare: None }
    }

    /// The values of `torch.randn` for a tensor of `count` elements.
    pub fn randn(&mut self, count: usize) -> Vec<f32> {
        if count < BLOCK {
            return (0..count).map(|_| self.normal() as f32).collect();
        }
        let mut values: Vec<f32> = (0..count).map(|_| self.uniform24()).collect();
        for block in values.chunks_exact_mut(BLOCK) {
            box_muller(block);
        }
        if !count.is_multiple_of(BLOCK) {
            let tail = &mut values[count - BLOCK..];
            tail.fill_with(|| self.uniform24());
            box_muller(tail);
        }
        values
    }

    fn uniform24(&mut self) -> f32 {
        (self.engine.next_u32() & 0xff_ffff) as f32 / (1 << 24) as f32
    }

    fn uniform53(&mut self) -> f64 {
        let (high, low) = (self.engine.next_u32() as u64, self.engine.next_u32() as u64);
        (((high << 32) | low) & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let (u1, u2) = (self.uniform53(), self.uniform53());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        self.spare = Some(radius * (TAU * u1).sin());
        radius * (TAU * u1).cos()
    }
}

/// Converts 16 uniform values to normal ones: cosines in the first half, sines in the second.
fn box_muller(block: &mut [f32]) {
    let (first, last) = block.split_at_mut(BLOCK / 2);
    for (a, b) in first.iter_mut().zip(last) {
        let radius = (-2.0 * (1.0 - *a).ln()).sqrt();
        let angle = TAU as f32 * *b;
        (*a, *b) = (radius * angle.cos(), radius * angle.sin());
    }
}
