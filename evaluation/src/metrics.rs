//! All distances of two sets that their features allow.

use eqim::Result;
use serde::Serialize;

use crate::features::Features;
use crate::{frechet, inception, kernel, neighbours};

/// Settings of the distances.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Settings of the kernel distance.
    pub kernel: kernel::Settings,
    /// Settings of the inception score.
    pub inception: inception::Settings,
    /// Nearest neighbours that span a neighbourhood.
    pub neighbours: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { kernel: kernel::Settings::default(), inception: inception::Settings::default(), neighbours: 3 }
    }
}

/// Distances of a set of images to a set of real images. What the sets do not allow is `None`.
#[derive(Clone, Debug, Serialize)]
pub struct Metrics {
    /// Number of values of a feature.
    pub width: usize,
    /// Fréchet distance.
    pub frechet_distance: f64,
    /// Kernel distance.
    pub kernel_distance: Option<f64>,
    /// Deviation of the kernel distance over its subsets, if there are several.
    pub kernel_distance_deviation: Option<f64>,
    /// Share of the first set within the second.
    pub precision: Option<f64>,
    /// Share of the second set within the first.
    pub recall: Option<f64>,
    /// Density.
    pub density: Option<f64>,
    /// Coverage.
    pub coverage: Option<f64>,
    /// Inception score of the first set.
    pub inception_score: Option<f64>,
    /// Deviation of the inception score over its splits.
    pub inception_score_deviation: Option<f64>,
}

impl Metrics {
    /// Compares images with real images.
    ///
    /// # Errors
    /// [`eqim::Error::input`] if the sets were made in different ways or are too small.
    pub fn new(images: &Features, real: &Features, settings: Settings) -> Result<Self> {
        images.check_comparable(real)?;
        let (mut kernel, mut shares) = (None, None);
        if let (Some(a), Some(b)) = (&images.values, &real.values) {
            kernel = Some(kernel::distance(a.view(), b.view(), settings.kernel)?);
            shares = Some(neighbours::shares(b.view(), a.view(), settings.neighbours)?);
        }
        let score = match &images.logits {
            Some(logits) => Some(inception::score(logits.view(), settings.inception)?),
            None => None,
        };
        Ok(Self {
            width: images.moments.mean.len(),
            frechet_distance: frechet::distance(&images.moments, &real.moments)?,
            kernel_distance: kernel.map(|(mean, _)| mean),
            kernel_distance_deviation: kernel.and_then(|(_, deviation)| deviation),
            precision: shares.map(|shares| shares.precision),
            recall: shares.map(|shares| shares.recall),
            density: shares.map(|shares| shares.density),
            coverage: shares.map(|shares| shares.coverage),
            inception_score: score.map(|(mean, _)| mean),
            inception_score_deviation: score.map(|(_, deviation)| deviation),
        })
    }
}
