//! The inception score (Salimans et al. 2016): how sure a classifier is of every image, and how many classes it sees in
//! all images.

use eqim::{Error, Result};
use ndarray::{Array1, ArrayView2};

use crate::linear::mean_and_deviation;
use crate::random::Random;

/// Settings of the score. The default is that of torch-fidelity.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Number of parts of the set; the score is the mean over them.
    pub splits: usize,
    /// Seed of the order of the images; `None` keeps it.
    pub seed: Option<u32>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { splits: 10, seed: Some(2020) }
    }
}

/// Mean and deviation of the score over the splits, for logits `[images, classes]`.
///
/// # Errors
/// [`Error::input`] if there are fewer images than splits.
pub fn score(logits: ArrayView2<f32>, settings: Settings) -> Result<(f64, f64)> {
    let (count, Settings { splits, seed }) = (logits.nrows(), settings);
    if splits == 0 || count < splits {
        return Err(Error::input("images", format!("are {count}, expected at least one for each of {splits} splits")));
    }
    let order = match seed {
        Some(seed) => Random::new(seed).permutation(count),
        None => (0..count).collect(),
    };
    let part = |split: usize| of_part(logits, &order[split * count / splits..(split + 1) * count / splits]);
    Ok(mean_and_deviation(&(0..splits).map(part).collect::<Vec<_>>()))
}

/// The exponential of the mean divergence of the images' class probabilities from their mean.
fn of_part(logits: ArrayView2<f32>, rows: &[usize]) -> f64 {
    let of_rows: Vec<Array1<f64>> = rows.iter().map(|&row| log_softmax(logits.row(row).mapv(f64::from))).collect();
    let mut mean = Array1::<f64>::zeros(logits.ncols());
    of_rows.iter().for_each(|row| mean += &row.mapv(f64::exp));
    mean /= rows.len() as f64;
    let divergence = |row: &Array1<f64>| -> f64 {
        let terms = row.iter().zip(&mean).map(|(log, mean)| match log.exp() {
            0.0 => 0.0,
            probability => probability * (log - mean.ln()),
        });
        terms.sum()
    };
    (of_rows.iter().map(divergence).sum::<f64>() / rows.len() as f64).exp()
}

fn log_softmax(logits: Array1<f64>) -> Array1<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
    logits - largest - sum.ln()
}
