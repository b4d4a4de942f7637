//! The kernel distance (Bińkowski et al. 2018: KID, if the features are those of Inception): the unbiased estimate of the
//! squared maximum mean discrepancy with the kernel `(x·y / width + 1)³`. It may be negative.

use eqim::{Error, Result};
use ndarray::{ArrayView2, Axis};

use crate::linear::{matrix, mean_and_deviation};
use crate::random::Random;

/// Settings of the distance. The default is that of torch-fidelity.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Number of random subsets; the distance is the mean over them.
    pub subsets: usize,
    /// Images of each set in a subset, fewer if a set has fewer.
    pub subset_size: usize,
    /// Seed of the subsets.
    pub seed: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { subsets: 100, subset_size: 1000, seed: 2020 }
    }
}

/// Mean and deviation of the distance over the subsets, for features `[images, width]` of two sets. There is no deviation
/// if the only subset is the whole of both sets.
///
/// # Errors
/// [`Error::input`] if the widths differ or a set has fewer than two images.
pub fn distance(a: ArrayView2<f32>, b: ArrayView2<f32>, settings: Settings) -> Result<(f64, Option<f64>)> {
    if a.ncols() != b.ncols() {
        let problem = format!("have {} and {} values, expected equally many", a.ncols(), b.ncols());
        return Err(Error::input("features", problem));
    }
    let size = settings.subset_size.min(a.nrows()).min(b.nrows());
    if size < 2 || settings.subsets == 0 {
        return Err(Error::input("images", format!("are {size}, expected at least 2 in each set")));
    }
    if size == a.nrows() && size == b.nrows() {
        return Ok((of_equal_sizes(a, b), None));
    }
    let mut random = Random::new(settings.seed);
    let mut draw = |set: ArrayView2<f32>| set.select(Axis(0), &random.permutation(set.nrows())[..size]);
    let of_subset = |_| {
        let (a, b) = (draw(a), draw(b));
        of_equal_sizes(a.view(), b.view())
    };
    let (mean, deviation) = mean_and_deviation(&(0..settings.subsets).map(of_subset).collect::<Vec<_>>());
    Ok((mean, Some(deviation)))
}

/// The estimate for two sets of the same size.
fn of_equal_sizes(a: ArrayView2<f32>, b: ArrayView2<f32>) -> f64 {
    let (size, width) = (a.nrows() as f64, a.ncols() as f64);
    let (a, b) = (matrix(a), matrix(b));
    let kernel = |product: f64| (product / width + 1.0).powi(3);
    let mut within = 0.0;
    for x in [&a, &b] {
        let products = x * x.transpose();
        for row in 0..products.nrows() {
            within += (0..row).map(|column| 2.0 * kernel(products[(row, column)])).sum::<f64>();
        }
    }
    let products = &a * b.transpose();
    let between: f64 = products.col_iter().map(|column| column.iter().map(|&x| kernel(x)).sum::<f64>()).sum();
    within / (size * (size - 1.0)) - 2.0 * between / (size * size)
}
