//! The Fréchet distance of two sets of features, each taken as a normal distribution (Heusel et al. 2017: FID, if the
//! features are those of Inception).

use eqim::{Error, Result};
use faer::Mat;
use ndarray::{Array1, Array2, ArrayView2};

use crate::linear::{array, matrix, nuclear_norm, root};

/// Mean and covariance of a set of features.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// Number of images; `None` if it is not known.
    pub count: Option<usize>,
    /// Mean, `[width]`.
    pub mean: Array1<f64>,
    /// Covariance, `[width, width]`, divided by one less than the number of images.
    pub covariance: Array2<f64>,
}

impl Moments {
    /// The moments of features `[images, width]`.
    ///
    /// # Errors
    /// [`Error::input`] if there are fewer than two images.
    pub fn of<T: Copy + Into<f64>>(features: ArrayView2<T>) -> Result<Self> {
        let (count, width) = features.dim();
        if count < 2 {
            return Err(Error::input("images", format!("are {count}, expected at least 2 for a covariance")));
        }
        let mut mean = Array1::zeros(width);
        for row in features.rows() {
            mean.iter_mut().zip(row).for_each(|(sum, &value)| *sum += value.into());
        }
        mean /= count as f64;
        let centered = Mat::from_fn(count, width, |row, column| features[[row, column]].into() - mean[column]);
        let covariance = array((centered.transpose() * &centered).as_ref()) / (count as f64 - 1.0);
        Ok(Self { count: Some(count), mean, covariance })
    }

    /// Largest rank that the covariance can have, if it is smaller than the width: there are too few images.
    pub fn missing_rank(&self) -> Option<usize> {
        self.count.map(|count| count - 1).filter(|&rank| rank < self.mean.len())
    }
}

/// Moments to which the distances of several sets are measured: the root of their covariance is computed once.
#[derive(Debug)]
pub struct Target<'a> {
    moments: &'a Moments,
    root: Mat<f64>,
}

impl<'a> Target<'a> {
    /// Prepares the distances to `moments`.
    ///
    /// # Errors
    /// [`Error::input`] if the covariance has a negative eigenvalue; [`Error::run`] if the decomposition does not converge
    /// or a value is not finite.
    pub fn new(moments: &'a Moments) -> Result<Self> {
        Ok(Self { moments, root: moments.root()? })
    }

    /// The Fréchet distance `|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)`.
    ///
    /// The trace of the root is the sum of the singular values of `Σ₁^½ Σ₂^½`, which is exact for covariances without full
    /// rank too.
    ///
    /// # Errors
    /// [`Error::input`] if the widths differ; those of [`Target::new`].
    pub fn distance(&self, other: &Moments) -> Result<f64> {
        let moments = self.moments;
        if moments.mean.len() != other.mean.len() {
            let (found, expected) = (other.mean.len(), moments.mean.len());
            return Err(Error::input("features", format!("have {found} and {expected} values, expected equally many")));
        }
        let means: f64 = (&other.mean - &moments.mean).mapv(|difference| difference * difference).sum();
        let cross = nuclear_norm(&(other.root()? * &self.root))?;
        // Rounding can make the distance of equal sets slightly negative.
        Ok((means + other.covariance.diag().sum() + moments.covariance.diag().sum() - 2.0 * cross).max(0.0))
    }
}

/// The [Fréchet distance](Target::distance) of two sets.
///
/// # Errors
/// Those of [`Target::distance`].
pub fn distance(a: &Moments, b: &Moments) -> Result<f64> {
    Target::new(b)?.distance(a)
}

impl Moments {
    /// The root of the covariance.
    fn root(&self) -> Result<Mat<f64>> {
        match self.mean.iter().chain(&self.covariance).all(|value| value.is_finite()) {
            true => root(&matrix(self.covariance.view())),
            false => Err(Error::run("features", "their mean or covariance has a value that is not finite")),
        }
    }
}
