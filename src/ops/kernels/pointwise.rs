//! Functions of one value, with one pass forward and one backward.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::storage::{values, with_values};

const PART: usize = 1 << 15;

/// A function of one value.
pub trait Function: Send + Sync {
    /// Its name.
    const NAME: &'static str;

    /// Its value at `x`.
    fn value(&self, x: f32) -> f32;

    /// Its derivative at `x`.
    fn slope(&self, x: f32) -> f32;
}

/// Applies a function to every value of a tensor.
pub struct Pointwise<F>(pub F);

impl<F: Function> CustomOp1 for Pointwise<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(x, layout)?;
        let mut y = vec![0.0; x.len()];
        let parts = y.par_chunks_mut(PART).zip(x.par_chunks(PART));
        parts.for_each(|(y, x)| {
            Arch::new().dispatch(
                #[inline(always)]
                || y.iter_mut().zip(x).for_each(|(y, &x)| *y = self.0.value(x)),
            );
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        let of_x = with_values([x, &gradient], |[x, gradient]| {
            let mut of_x = vec![0.0; x.len()];
            let parts = of_x.par_chunks_mut(PART).zip(x.par_chunks(PART)).zip(gradient.par_chunks(PART));
            parts.for_each(|((of_x, x), gradient)| {
                Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        for ((of_x, &x), gradient) in of_x.iter_mut().zip(x).zip(gradient) {
                            *of_x = gradient * self.0.slope(x);
                        }
                    },
                );
            });
            Ok(of_x)
        })?;
        Ok(Some(Tensor::from_vec(of_x, x.shape(), x.device())?))
    }
}

/// x · sigmoid(x), also called swish.
pub struct Silu;

impl Function for Silu {
    const NAME: &'static str = "silu";

    #[inline(always)]
    fn value(&self, x: f32) -> f32 {
        x * sigmoid(x)
    }

    #[inline(always)]
    fn slope(&self, x: f32) -> f32 {
        let s = sigmoid(x);
        s + x * s * (1.0 - s)
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Exact GELU, x · Φ(x) with the distribution function Φ(x) = (1 + erf(x / √2)) / 2.
pub struct Gelu;

impl Function for Gelu {
    const NAME: &'static str = "gelu";

    #[inline(always)]
    fn value(&self, x: f32) -> f32 {
        x * distribution(x)
    }

    #[inline(always)]
    fn slope(&self, x: f32) -> f32 {
        // The density of Φ is e^(-x²/2) / √(2π).
        const SCALE: f32 = 0.398_942_3;
        distribution(x) + x * SCALE * exp(-0.5 * x * x)
    }
}

#[inline(always)]
fn distribution(x: f32) -> f32 {
    0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// Limits values to `low..=high`. The gradient is 0 outside of the range and at its ends.
pub struct Clamp {
    /// Smallest value.
    pub low: f32,
    /// Largest value.
    pub high: f32,
}

impl Function for Clamp {
    const NAME: &'static str = "clamp";

    // Unlike `f32::clamp`, it does not panic if a bound is not a number. A value that is not a number stays one.
    #[inline(always)]
    fn value(&self, x: f32) -> f32 {
        if x < self.low {
            self.low
        } else if x > self.high {
            self.high
        } else {
            x
        }
    }

    #[inline(always)]
    fn slope(&self, x: f32) -> f32 {
        f32::from(self.low < x && x < self.high)
    }
}

/// e^x within 2 units in the last place, in a form that compilers vectorize. The power of two is set through the bits
/// of the exponent, and a polynomial gives the rest (Cephes' `expf`). The standard library's function needs one call
/// per element.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let power = (x * std::f32::consts::LOG2_E + 0.5).floor();
    // ln 2 is split into two parts. The first has few bits, so that its product with `power` is exact.
    let x = x - power * 0.693_359_4 + power * 2.121_944_4e-4;
    let p = 1.987_569_1e-4f32;
    let p = p * x + 1.398_199_9e-3;
    let p = p * x + 8.333_452e-3;
    let p = p * x + 4.166_579_6e-2;
    let p = p * x + 0.166_666_66;
    let p = p * x + 0.5;
    let p = p * x * x + x + 1.0;
    p * f32::from_bits(((power as i32 + 127) as u32) << 23)
}

/// erf(x) within 1e-7, in a form that compilers vectorize: a polynomial up to 1, and 1 - e^p with a polynomial p beyond. Both have
/// the least largest error.
#[inline(always)]
fn erf(x: f32) -> f32 {
    // Beyond 4, erf is 1 in single precision.
    let t = x.abs().min(4.0);
    let square = t * t;
    let p = 7.889_119e-5f32;
    let p = p * square - 8.020_841e-4;
    let p = p * square + 5.189_535e-3;
    let p = p * square - 0.026_854_444;
    let p = p * square + 0.112_836;
    let p = p * square - 0.376_126_26;
    let p = p * square + 0.128_379_17;
    let small = t * p + t;
    let q = 1.864_578_8e-6f32;
    let q = q * t - 3.025_623_3e-5;
    let q = q * t + 1.921_845_8e-4;
    let q = q * t - 4.232_509_7e-4;
    let q = q * t - 2.000_989_4e-3;
    let q = q * t + 0.021_534_76;
    let q = q * t - 0.104_411_095;
    let q = q * t - 0.635_980_07;
    let q = q * t - 1.128_488_7;
    let large = 1.0 - exp(q * t);
    let erf = if t < 1.0 { small } else { large };
    // `min` above has turned a value that is not a number into 4.
    if x.is_nan() { x } else { erf.copysign(x) }
}
