//! Where the weights of a kernel are: in their file, or in a copy if the kernel has read them often.

use super::linear::Linear;
#[cfg(target_os = "linux")]
use crate::pages::LargePages;

/// Number of reads after which weights are copied. A copy takes as long as many reads, so the step of a short image reads
/// the file, and the sampler, which reads its weights in every evaluation, reads the copy after a few tokens.
const OFTEN: usize = 128;
/// Number of reads between the copies of two kernels, so that no token waits for all copies.
const APART: usize = 2;

/// The place of the weights of one call of a kernel.
pub struct Residence {
    /// Number of reads before the weights are copied.
    left: Option<usize>,
    /// The copies.
    #[cfg(target_os = "linux")]
    pages: Option<LargePages>,
}

impl Residence {
    /// Weights in their file. `index` is the number of the call in its graph.
    pub fn new(index: usize) -> Self {
        Self {
            left: Some(OFTEN + APART * index),
            #[cfg(target_os = "linux")]
            pages: None,
        }
    }

    /// Counts reads. Returns whether the weights are to be copied now.
    pub fn is_due(&mut self, reads: usize) -> bool {
        let Some(left) = &mut self.left else { return false };
        *left = left.saturating_sub(reads);
        if *left == 0 {
            self.left = None;
        }
        self.left.is_none()
    }

    /// Copies weights, if the system has large pages.
    ///
    /// # Safety
    /// The layers must not be used after this residence is dropped.
    #[cfg_attr(not(target_os = "linux"), expect(unused_variables))]
    pub unsafe fn settle(&mut self, layers: Vec<&mut Linear>) {
        #[cfg(target_os = "linux")]
        {
            let sizes = layers.iter().map(|layer| layer.bytes());
            let Some(mut pages) = LargePages::new(sizes) else { return };
            for layer in layers {
                // SAFETY: the caller promises it.
                unsafe { layer.move_to(&mut pages) };
            }
            self.pages = Some(pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnxruntime::kernels::linear::Weight;

    #[test]
    fn weights_are_copied_once_after_many_reads() {
        let values: Vec<f32> = (0..5000).map(|i| i as f32).collect();
        let mut linear = Linear { inputs: 50, outputs: 100, weight: Weight::Float(&values), bias: &values[..100] };
        let mut residence = Residence::new(3);
        let reads = (1..).find(|_| residence.is_due(1)).unwrap();
        assert_eq!(reads, OFTEN + 3 * APART);
        // SAFETY: the layer is not used after the residence.
        unsafe { residence.settle(vec![&mut linear]) };
        let Weight::Float(copy) = linear.weight else { panic!("{linear:?}") };
        assert_eq!(copy, values);
        assert!(!residence.is_due(OFTEN));
    }
}
