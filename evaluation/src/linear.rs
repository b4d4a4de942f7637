//! Arithmetic in double precision: products and decompositions of matrices, means.

use eqim::{Error, Result};
use faer::{Mat, MatRef, Side};
use ndarray::{Array2, ArrayView2};

/// Copies a matrix to faer's layout.
pub fn matrix<T: Copy + Into<f64>>(x: ArrayView2<T>) -> Mat<f64> {
    Mat::from_fn(x.nrows(), x.ncols(), |row, column| x[[row, column]].into())
}

/// Copies a matrix from faer's layout.
pub fn array(x: MatRef<f64>) -> Array2<f64> {
    Array2::from_shape_fn((x.nrows(), x.ncols()), |(row, column)| x[(row, column)])
}

// Covariances of other programs are rounded to single precision.
const NEGATIVE: f64 = 1e-4;

/// The symmetric root of a symmetric matrix without negative eigenvalues. Eigenvalues within the rounding error of 0 are
/// taken as 0.
///
/// # Errors
/// [`Error::input`] if an eigenvalue is negative; [`Error::run`] if the decomposition does not converge.
pub fn root(x: &Mat<f64>) -> Result<Mat<f64>> {
    let failed = |error| Error::run("covariance", format!("has no eigenvalues: {error:?}"));
    let eigen = x.self_adjoint_eigen(Side::Lower).map_err(failed)?;
    let (values, vectors) = (eigen.S(), eigen.U());
    let size = x.nrows();
    let largest = (0..size).map(|index| values[index]).fold(0.0, f64::max);
    let least = largest * size as f64 * f64::EPSILON;
    if (0..size).any(|index| values[index] < -largest * NEGATIVE) {
        return Err(Error::input("covariance", "has a negative eigenvalue: it is not the covariance of any features"));
    }
    let factor = |index: usize| if values[index] <= least { 0.0 } else { values[index].sqrt() };
    let scaled = Mat::from_fn(size, size, |row, column| vectors[(row, column)] * factor(column));
    Ok(&scaled * vectors.transpose())
}

/// The sum of the singular values of a matrix.
///
/// # Errors
/// [`Error::run`] if the decomposition does not converge.
pub fn nuclear_norm(x: &Mat<f64>) -> Result<f64> {
    let failed = |error| Error::run("covariances", format!("their product has no singular values: {error:?}"));
    Ok(x.singular_values().map_err(failed)?.iter().sum())
}

/// Mean and population deviation of values.
pub fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    (mean, (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt())
}
