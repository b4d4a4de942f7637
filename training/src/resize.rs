//! Bicubic interpolation of images as in PyTorch, with gradients.

use candle_core::Tensor;
use eqim::Result;

/// Kernel of bicubic interpolation, in the two variants of PyTorch.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// Free parameter of the cubic.
    a: f64,
    /// Whether downscaling widens the kernel.
    antialias: bool,
}

impl Kernel {
    /// `torch.nn.functional.interpolate(mode="bicubic")`.
    pub const PYTORCH: Self = Self { a: -0.75, antialias: false };
    /// The same with `antialias=True`.
    pub const ANTIALIASED: Self = Self { a: -0.5, antialias: true };

    /// The matrix `[output, input]` that resizes an axis, with `align_corners` off. Positions outside the input take
    /// the border value; with antialiasing they are skipped.
    fn matrix(self, input: usize, output: usize) -> Vec<f32> {
        let scale = input as f64 / output as f64;
        let widened = if self.antialias { scale.max(1.0) } else { 1.0 };
        let mut matrix = vec![0.0; output * input];
        for (row, weights) in matrix.chunks_mut(input).enumerate() {
            let center = (row as f64 + 0.5) * scale - 0.5;
            let (first, last) = ((center - 2.0 * widened).floor() as i64, (center + 2.0 * widened).ceil() as i64);
            for place in first..=last {
                let inside = place.clamp(0, input as i64 - 1);
                if !self.antialias || inside == place {
                    weights[inside as usize] += self.weight((place as f64 - center) / widened) as f32;
                }
            }
            let sum: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        matrix
    }

    /// The cubic convolution kernel of Keys (1981).
    fn weight(self, x: f64) -> f64 {
        let (a, x) = (self.a, x.abs());
        match x {
            _ if x <= 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
            _ if x < 2.0 => ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a,
            _ => 0.0,
        }
    }
}

/// Resizes `x [batch, channels, any height, any width]`.
///
/// # Errors
/// If a Candle operation fails.
pub fn resize(x: &Tensor, height: usize, width: usize, kernel: Kernel) -> Result<Tensor> {
    let matrix = |input, output| Tensor::from_vec(kernel.matrix(input, output), (1, 1, output, input), x.device());
    let rows = matrix(x.dim(2)?, height)?.broadcast_matmul(&x.contiguous()?)?;
    Ok(rows.broadcast_matmul(&matrix(x.dim(3)?, width)?.t()?)?)
}
