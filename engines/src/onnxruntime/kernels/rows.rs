//! Functions of one row, in forms that compilers turn into vector instructions.

use eqim::ops::kernels::exp;
use pulp::Arch;

/// Weight and bias of a norm.
pub type Norm<'a> = (&'a [f32], &'a [f32]);

/// Number of sums that are computed side by side.
const SUMS: usize = 16;

/// Sum of `term` over the elements of `x`.
#[inline(always)]
fn sum(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let (blocks, rest) = x.as_chunks::<SUMS>();
    let mut sums = [0.0; SUMS];
    for block in blocks {
        for (sum, &x) in sums.iter_mut().zip(block) {
            *sum += term(x);
        }
    }
    sums.iter().sum::<f32>() + rest.iter().map(|&x| term(x)).sum::<f32>()
}

/// Smallest and largest element, or 0 if it is beyond them. NaN if an element is not finite.
#[inline(always)]
fn range(x: &[f32]) -> (f32, f32) {
    let (blocks, rest) = x.as_chunks::<SUMS>();
    let (mut low, mut high) = ([0.0f32; SUMS], [0.0f32; SUMS]);
    for block in blocks {
        for (low, &x) in low.iter_mut().zip(block) {
            *low = if x < *low { x } else { *low };
        }
        for (high, &x) in high.iter_mut().zip(block) {
            *high = if x > *high { x } else { *high };
        }
    }
    let low = low.iter().chain(rest).copied().fold(0.0, f32::min);
    let high = high.iter().chain(rest).copied().fold(0.0, f32::max);
    // Comparisons skip NaN. This sum is 0 for finite elements, and NaN for all others.
    let finite = sum(x, |x| x * 0.0);
    (low + finite, high + finite)
}

/// Normalizes `x` to mean 0 and variance 1.
#[inline(always)]
fn normalize(x: &[f32], eps: f32, y: &mut [f32]) {
    let count = x.len() as f32;
    let mean = sum(x, |x| x) / count;
    let variance = sum(x, |x| (x - mean) * (x - mean)) / count;
    let scale = 1.0 / (variance + eps).sqrt();
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = (x - mean) * scale);
}

/// Layer normalization with weight and bias (ONNX `LayerNormalization`).
pub fn layer_norm(x: &[f32], (weight, bias): Norm, eps: f32, y: &mut [f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            normalize(x, eps, y);
            for ((y, weight), bias) in y.iter_mut().zip(weight).zip(bias) {
                *y = *y * weight + bias;
            }
        },
    );
}

/// `y · (1 + scale) + shift`, in place.
pub fn modulate(y: &mut [f32], shift: &[f32], scale: &[f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for ((y, scale), shift) in y.iter_mut().zip(scale).zip(shift) {
                *y = *y * (1.0 + scale) + shift;
            }
        },
    );
}

/// Layer normalization without weight and bias.
pub fn plain_norm(x: &[f32], eps: f32, y: &mut [f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || normalize(x, eps, y),
    );
}

/// Scale and zero point of a row in 8 bits: the level `q` represents `(q - zero) · scale`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Levels {
    /// Step between two neighbouring levels.
    pub scale: f32,
    /// Level of 0.
    pub zero: i32,
}

/// Quantizes a row by its range (ONNX `DynamicQuantizeLinear`). The scale is NaN if an element is not finite.
pub fn quantize(x: &[f32], levels: &mut [u8]) -> Levels {
    /// The sum of this number and a number of at most 2^22 has no bits for fractions, so it is rounded to the nearest
    /// integer, and to the even one of two.
    const ROUND: f32 = 12_582_912.0;
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let (low, high) = range(x);
            let scale = if low == high { 1.0 } else { (high - low) / 255.0 };
            let zero = (-low / scale).round_ties_even().clamp(0.0, 255.0);
            for (level, &x) in levels.iter_mut().zip(x) {
                let rounded = (x / scale + ROUND) - ROUND;
                *level = ((rounded + zero).clamp(0.0, 255.0) + ROUND).to_bits() as u8;
            }
            Levels { scale, zero: zero as i32 }
        },
    )
}

/// x · sigmoid(x), in place.
pub fn silu(x: &mut [f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || x.iter_mut().for_each(|x| *x /= 1.0 + exp(-*x)),
    );
}

/// Exact GELU, x · (1 + erf(x / √2)) / 2, in place.
pub fn gelu(x: &mut [f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || x.iter_mut().for_each(|x| *x = 0.5 * *x * (1.0 + erf(*x * std::f32::consts::FRAC_1_SQRT_2))),
    );
}

/// The error function within 2e-7: a rational function of `x`, which is limited to the range in which the result is not
/// 1 (the minimax approximation of Eigen's `generic_fast_erf_float`).
#[inline(always)]
fn erf(x: f32) -> f32 {
    // Beyond this limit, the result is 1.
    const LIMIT: f32 = 4.0;
    let x = x.clamp(-LIMIT, LIMIT);
    let square = x * x;
    let polynomial = |coefficients: &[f32]| coefficients.iter().fold(0.0, |sum, c| sum * square + c);
    let numerator = polynomial(&[
        -2.726_142_3e-10,
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_4e-5,
        -7.349_906_3e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ]);
    let denominator = polynomial(&[-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329_2e-3, -1.426_473_9e-2]);
    x * numerator / denominator
}

/// Attention of the query `q` of one head: `y` becomes the sum of the values, weighted by the softmax of the scores. The
/// score of a key is its scaled product with the query, and its bias if there is one.
pub fn attend<'a>(
    q: &[f32],
    keys: impl Iterator<Item = &'a [f32]>,
    values: impl Iterator<Item = &'a [f32]>,
    bias: &[f32],
    y: &mut [f32],
) {
    let scale = (q.len() as f32).powf(-0.5);
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let bias = bias.iter().copied().chain(std::iter::repeat(0.0));
            let mut scores: Vec<f32> = keys.zip(bias).map(|(key, bias)| dot(q, key) * scale + bias).collect();
            softmax(&mut scores);
            y.fill(0.0);
            for (score, value) in scores.into_iter().zip(values) {
                y.iter_mut().zip(value).for_each(|(y, value)| *y += score * value);
            }
        },
    );
}

/// Softmax, in place.
#[inline(always)]
fn softmax(x: &mut [f32]) {
    let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|x| *x = exp(*x - most));
    let sum: f32 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
}

/// Inner product.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<SUMS>(), b.as_chunks::<SUMS>());
    let mut sums = [0.0; SUMS];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// `y + x`, in place.
pub fn add(y: &mut [f32], x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers between -`most` and `most`, in a length that no vector divides.
    fn row(most: f32) -> Vec<f32> {
        (0..103).map(|i| most * (i as f32 * 0.37).sin()).collect()
    }

    fn close(found: f32, expected: f64, tolerance: f64) {
        assert!((f64::from(found) - expected).abs() <= tolerance * expected.abs().max(1.0), "{found} {expected}");
    }

    #[test]
    fn norms_are_their_formula() {
        let x = row(3.0);
        let (weight, bias) = (row(2.0), row(0.5));
        let mut y = vec![f32::NAN; x.len()];
        layer_norm(&x, (&weight, &bias), 1e-3, &mut y);
        modulate(&mut y, &bias, &weight);
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / x.len() as f64;
        for (i, &y) in y.iter().enumerate() {
            let [x, weight, bias] = [x[i], weight[i], bias[i]].map(f64::from);
            let normed = (x - mean) / (variance + 1e-3).sqrt() * weight + bias;
            close(y, normed * (1.0 + weight) + bias, 2e-6);
        }
    }

    #[test]
    fn activations_are_their_formula() {
        // The error function by its Taylor series, which converges for these numbers.
        let erf = |x: f64| {
            let terms = (0..200).scan(x, |term, n| {
                let now = *term / f64::from(2 * n + 1);
                *term *= -x * x / f64::from(n + 1);
                Some(now)
            });
            terms.sum::<f64>() * std::f64::consts::FRAC_2_SQRT_PI
        };
        for most in [0.1, 1.0, 4.0] {
            let x = row(most);
            let (mut by_silu, mut by_gelu) = (x.clone(), x.clone());
            silu(&mut by_silu);
            gelu(&mut by_gelu);
            for ((x, silu), gelu) in x.iter().map(|&x| f64::from(x)).zip(by_silu).zip(by_gelu) {
                close(silu, x / (1.0 + (-x).exp()), 4e-7);
                close(gelu, 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)), 4e-7);
            }
        }
        let mut far = [-100.0, 100.0, f32::NAN, f32::NEG_INFINITY];
        gelu(&mut far);
        // The error function is off by at most 2e-7, and its factor is x / 2.
        assert!(far[0].abs() <= 1e-5 && (far[1] - 100.0).abs() <= 1e-5, "{far:?}");
        assert!(far[2].is_nan() && !far[3].is_finite(), "{far:?}");
    }

    #[test]
    fn levels_represent_the_row() {
        for x in [row(3.0), row(1e-20), vec![0.0; 5], vec![2.0; 19], vec![-2.0; 19]] {
            let mut levels = vec![0; x.len()];
            let Levels { scale, zero } = quantize(&x, &mut levels);
            for (&x, level) in x.iter().zip(levels) {
                let found = (i32::from(level) - zero) as f32 * scale;
                assert!((found - x).abs() <= 0.5001 * scale, "{x} {found}, scale {scale}");
            }
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, 15, 102] {
                let mut x = row(1.0);
                x[place] = bad;
                assert!(quantize(&x, &mut vec![0; x.len()]).scale.is_nan(), "{bad} at {place}");
            }
        }
    }

    #[test]
    fn ties_are_rounded_to_even() {
        let mut x: Vec<f32> = (0..256).map(|i| i as f32).collect();
        (x[1], x[2], x[3]) = (0.5, 1.5, 2.5);
        let mut levels = vec![0; 256];
        assert_eq!(quantize(&x, &mut levels), Levels { scale: 1.0, zero: 0 });
        assert_eq!(levels[..5], [0, 0, 2, 2, 4]);
    }

    #[test]
    fn attention_is_its_formula() {
        let (q, keys, values, bias) =
            (row(1.0), [row(2.0), row(0.5), row(1.5)], [row(0.1), row(1.0), row(4.0)], [0.0, -1.0, 0.5]);
        let mut y = vec![f32::NAN; q.len()];
        attend(&q, keys.iter().map(Vec::as_slice), values.iter().map(Vec::as_slice), &bias, &mut y);
        let product = |key: &[f32]| q.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>();
        let scores =
            keys.iter().zip(bias).map(|(key, bias)| (product(key) / (q.len() as f64).sqrt() + f64::from(bias)).exp());
        let scores: Vec<f64> = scores.collect();
        for (i, &y) in y.iter().enumerate() {
            let blended: f64 = scores.iter().zip(&values).map(|(score, value)| score * f64::from(value[i])).sum();
            close(y, blended / scores.iter().sum::<f64>(), 2e-6);
        }
    }
}
