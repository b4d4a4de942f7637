//! Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020): whether images lie among
//! the nearest neighbours of the other set.

use eqim::{Error, Result};
use faer::Mat;
use ndarray::{ArrayView2, s};
use rayon::prelude::*;

use crate::linear::matrix;

/// The four shares of two sets of images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shares {
    /// Share of the generated images within the neighbourhood of a real one.
    pub precision: f64,
    /// Share of the real images within the neighbourhood of a generated one.
    pub recall: f64,
    /// How many neighbourhoods of real images contain a generated one, relative to the expectation for equal sets.
    pub density: f64,
    /// Share of the real images whose neighbourhood contains a generated one.
    pub coverage: f64,
}

// Rows of the matrix of distances that are in memory at a time.
const ROWS: usize = 512;

/// Compares features `[images, width]`. The neighbourhood of an image reaches to its `k`-th nearest neighbour in its own
/// set and does not contain the border, as in the Python package `prdc`.
///
/// # Errors
/// [`Error::input`] if the widths differ or a set has at most `k` images.
pub fn shares(real: ArrayView2<f32>, generated: ArrayView2<f32>, k: usize) -> Result<Shares> {
    if real.ncols() != generated.ncols() {
        let problem = format!("have {} and {} values, expected equally many", real.ncols(), generated.ncols());
        return Err(Error::input("features", problem));
    }
    let fewest = real.nrows().min(generated.nrows());
    if k == 0 || fewest <= k {
        let problem = format!("are {fewest}, expected at least {} for {k} nearest neighbours", k + 1);
        return Err(Error::input("images", problem));
    }
    let (real, generated) = (Points::new(real), Points::new(generated));
    let (of_real, of_generated) = (real.radii(k), generated.radii(k));
    let (mut in_real, mut in_generated) = (vec![0usize; generated.len()], 0);
    let mut covered = 0;
    real.distances(&generated, |first, distances| {
        let rows: Vec<(bool, bool, Vec<usize>)> = (0..distances.nrows())
            .into_par_iter()
            .map(|row| {
                let radius = of_real[first + row];
                let near = |&column: &usize| distances[(row, column)] < radius;
                let found: Vec<usize> = (0..distances.ncols()).filter(near).collect();
                let recalled = (0..distances.ncols()).any(|column| distances[(row, column)] < of_generated[column]);
                (recalled, !found.is_empty(), found)
            })
            .collect();
        for (recalled, is_covered, found) in rows {
            in_generated += usize::from(recalled);
            covered += usize::from(is_covered);
            found.into_iter().for_each(|column| in_real[column] += 1);
        }
    });
    let share = |count: usize, of: usize| count as f64 / of as f64;
    Ok(Shares {
        precision: share(in_real.iter().filter(|&&count| count > 0).count(), generated.len()),
        recall: share(in_generated, real.len()),
        density: share(in_real.iter().sum(), k * generated.len()),
        coverage: share(covered, real.len()),
    })
}

/// Features with their squared lengths.
struct Points<'a> {
    features: ArrayView2<'a, f32>,
    squares: Vec<f64>,
}

impl<'a> Points<'a> {
    fn new(features: ArrayView2<'a, f32>) -> Self {
        let square = |row: ndarray::ArrayView1<f32>| row.iter().map(|&value| f64::from(value).powi(2)).sum();
        Self { features, squares: features.rows().into_iter().map(square).collect() }
    }

    fn len(&self) -> usize {
        self.features.nrows()
    }

    /// Calls `each` with blocks of the matrix of squared distances, and the number of their first row.
    fn distances(&self, other: &Self, mut each: impl FnMut(usize, &Mat<f64>)) {
        let others = matrix(other.features);
        for first in (0..self.len()).step_by(ROWS) {
            let last = (first + ROWS).min(self.len());
            let mut block = matrix(self.features.slice(s![first..last, ..])) * others.transpose();
            for column in 0..block.ncols() {
                for row in 0..block.nrows() {
                    let squares = self.squares[first + row] + other.squares[column];
                    let distance = squares - 2.0 * block[(row, column)];
                    // The products of equal features differ from their squares by rounding.
                    block[(row, column)] = if distance <= squares * EQUAL { 0.0 } else { distance };
                }
            }
            each(first, &block);
        }
    }

    /// Squared distance of every point to its `k`-th nearest neighbour. The point itself does not count.
    fn radii(&self, k: usize) -> Vec<f64> {
        let mut radii = Vec::with_capacity(self.len());
        self.distances(self, |first, distances| {
            let of_row = |row: usize| {
                let others = (0..distances.ncols()).filter(|&column| column != first + row);
                let mut others: Vec<f64> = others.map(|column| distances[(row, column)]).collect();
                *others.select_nth_unstable_by(k - 1, f64::total_cmp).1
            };
            radii.extend((0..distances.nrows()).into_par_iter().map(of_row).collect::<Vec<_>>());
        });
        radii
    }
}

// Squared distances below this share of the squared lengths are rounding errors.
const EQUAL: f64 = 1e-13;
