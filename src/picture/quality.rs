//! Measures the similarity of two runs from the same noise: of their tokens, and of their images as bytes.

use super::to_byte;
use ndarray::{ArrayView, ArrayView1, ArrayView2, ArrayView3, ArrayView4, Axis, Dimension, s};

/// Cosine of the angle between two tokens.
pub fn cosine(found: ArrayView1<f32>, expected: ArrayView1<f32>) -> f32 {
    let dot = |a: ArrayView1<f32>, b: ArrayView1<f32>| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let size = (dot(found, found) * dot(expected, expected)).sqrt();
    (dot(found, expected) / size.max(f64::MIN_POSITIVE)) as f32
}

/// Peak signal-to-noise ratio in dB of images in -1..1, computed on their bytes. `None` for equal images, whose ratio
/// is infinite. If a value is not finite, its difference is the one between black and white.
pub fn psnr(found: ArrayView4<f32>, expected: ArrayView4<f32>) -> Option<f32> {
    let apart = |found: f32, expected: f32| match found.is_finite() && expected.is_finite() {
        true => to_byte(found).abs_diff(to_byte(expected)),
        false => u8::MAX,
    };
    let squared = |(&found, &expected): (&f32, &f32)| u64::from(apart(found, expected)).pow(2);
    let squares: u64 = found.iter().zip(expected).map(squared).sum();
    let peak = 255.0f64.powi(2) * expected.len() as f64;
    (squares > 0).then(|| (10.0 * (peak / squares as f64).log10()) as f32)
}

/// Peak signal-to-noise ratio in dB of values in -1..1 that are not rounded to bytes; infinite for equal values.
pub fn psnr_of_values<D: Dimension>(found: ArrayView<f32, D>, expected: ArrayView<f32, D>) -> f64 {
    let squares: f64 = found.iter().zip(&expected).map(|(&a, &b)| f64::from(a - b).powi(2)).sum();
    10.0 * (4.0 * expected.len() as f64 / squares).log10()
}

/// Side length of the windows that [`ssim`] compares, and the distance between windows.
const WINDOW: usize = 8;
const STRIDE: usize = 4;

/// Structural similarity of images `[B, 3, height, width]` in -1..1 (Wang et al., Image Quality Assessment, 2004, with
/// their constants). It is the mean over 8×8 windows of luma in bytes. The result is NaN if a value is not finite.
pub fn ssim(found: ArrayView4<f32>, expected: ArrayView4<f32>) -> f32 {
    let (mut sum, mut count) = (0.0, 0);
    for (found, expected) in found.axis_iter(Axis(0)).zip(expected.axis_iter(Axis(0))) {
        let (found, expected) = (luma(found), luma(expected));
        let (height, width) = found.dim();
        let corners = |length: usize| (0..=length.saturating_sub(WINDOW)).step_by(STRIDE);
        for (y, x) in corners(height).flat_map(|y| corners(width).map(move |x| (y, x))) {
            let window = s![y..(y + WINDOW).min(height), x..(x + WINDOW).min(width)];
            sum += window_similarity(found.slice(window), expected.slice(window));
            count += 1;
        }
    }
    (sum / f64::from(count.max(1))) as f32
}

/// Luma of an image `[3, height, width]` in the range of bytes (ITU-R BT.601).
fn luma(image: ArrayView3<f32>) -> ndarray::Array2<f64> {
    const WEIGHTS: [f64; 3] = [0.299, 0.587, 0.114];
    let (_, height, width) = image.dim();
    ndarray::Array2::from_shape_fn((height, width), |(y, x)| {
        let level = |value: f32| if value.is_finite() { f64::from(to_byte(value)) } else { f64::NAN };
        WEIGHTS.iter().enumerate().map(|(channel, weight)| weight * level(image[[channel, y, x]])).sum()
    })
}

fn window_similarity(a: ArrayView2<f64>, b: ArrayView2<f64>) -> f64 {
    const C1: f64 = (0.01 * 255.0) * (0.01 * 255.0);
    const C2: f64 = (0.03 * 255.0) * (0.03 * 255.0);
    let count = a.len() as f64;
    let mean = |values: ArrayView2<f64>| values.sum() / count;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let moment = |x: ArrayView2<f64>, y: ArrayView2<f64>, center: f64| {
        x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>() / count - center
    };
    let variance = moment(a, a, mean_a * mean_a) + moment(b, b, mean_b * mean_b);
    let covariance = moment(a, b, mean_a * mean_b);
    (2.0 * mean_a * mean_b + C1) * (2.0 * covariance + C2)
        / ((mean_a * mean_a + mean_b * mean_b + C1) * (variance + C2))
}
