//! Products and decompositions of matrices in double precision.

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

/// The symmetric root of a symmetric matrix without negative eigenvalues. Eigenvalues within the rounding error of 0 are
/// taken as 0.
///
/// # Errors
/// [`Error::run`] if the decomposition does not converge.
pub fn root(x: &Mat<f64>) -> Result<Mat<f64>> {
    let failed = |error| Error::run("covariance", format!("has no eigenvalues: {error:?}"));
    let eigen = x.self_adjoint_eigen(Side::Lower).map_err(failed)?;
    let (values, vectors) = (eigen.S(), eigen.U());
    let size = x.nrows();
    let largest = (0..size).map(|index| values[index]).fold(0.0, f64::max);
    let least = largest * size as f64 * f64::EPSILON;
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
