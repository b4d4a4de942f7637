//! Flow loss at every position of a row of tokens, including positions that training never saw.

use eqim::engine::Engine;
use eqim::request::random::TorchRng;
use eqim::request::solver::Tableau;
use eqim::{Error, Result};
use ndarray::{Array2, Array3, ArrayView2, Axis, concatenate, s};
use serde::Serialize;

use eqim::ResultExt;

use super::super::photos::Photo;
use super::subject::Subject;

/// Number of rows of tokens per picture. Each row begins at another place of the picture, so that a position has
/// different content in each row.
const VIEWS: usize = 8;
/// Number of tokens that are encoded after the last position and dropped. The tokenizer mirrors at the edge of an
/// image, and in training this edge is at another position.
const BEYOND: usize = 2;
/// Number of times of the flow: the midpoints of as many equal parts of 0..1.
const TIMES: usize = 8;
/// Number of shifts in training. Training shifts the positions of an image by 0 to `SHIFTS - 1` (`shift_num` of the
/// reference's `generator/equ_modeling.py`).
const SHIFTS: usize = 16;

/// Flow loss at a position.
#[derive(Clone, Debug, Serialize)]
pub struct Position {
    /// Position, from 0.
    pub position: usize,
    /// Mean squared error of the velocity against `noise - token`, over rows, times and the values of the token.
    pub loss: f64,
    /// Standard error of the loss over the rows.
    pub error: f64,
}

/// Flow loss of a range of positions that training has seen in the same way.
#[derive(Clone, Debug, Serialize)]
pub struct Band {
    /// First position.
    pub first: usize,
    /// Last position.
    pub last: usize,
    /// What training has seen of the positions, as text.
    pub what: &'static str,
    /// Mean loss.
    pub loss: f64,
    /// Standard error of the loss over the rows.
    pub error: f64,
    /// Loss divided by the loss at the positions that training sees with full context.
    pub ratio: f64,
}

/// Measures the loss at all positions, and summarizes it by range.
///
/// # Errors
/// [`Error::run`] if the engine fails, or if a loss is not finite.
pub fn measure(
    subject: &Subject,
    photos: &[Photo],
    progress: &mut dyn FnMut(String),
) -> Result<(Vec<Position>, Vec<Band>)> {
    let g = &subject.engine.config().generator;
    let mut losses = Array2::zeros((photos.len() * VIEWS, subject.positions));
    // All positions use the same noise, so that only the token to predict differs between them.
    let noise = noise(subject.seed, VIEWS, g.embed)?;
    for (index, photo) in photos.iter().enumerate() {
        progress(format!("the loss of picture {} of {}", index + 1, photos.len()));
        let label = photo.class.unwrap_or(g.unconditional()) as i64;
        let found = row_losses(subject.engine, label, &views(subject, photo)?, &noise)?;
        losses.slice_mut(s![index * VIEWS..(index + 1) * VIEWS, ..]).assign(&found);
    }
    if losses.iter().any(|loss| !loss.is_finite()) {
        return Err(Error::run("flow loss", "is not finite: the precision does not fit the model"));
    }
    let position = |(position, losses): (usize, ndarray::ArrayView1<f64>)| {
        let (loss, error) = mean(losses.iter().copied());
        Position { position, loss, error }
    };
    let positions = losses.columns().into_iter().enumerate().map(position).collect();
    Ok((positions, bands(losses.view(), subject.trained, g.window)))
}

/// Tokens `[VIEWS, N, E]` of a picture. To reach the length, the picture is repeated, mirrored each time. The rows
/// begin at equally spaced places.
fn views(subject: &Subject, photo: &Photo) -> Result<Array3<f32>> {
    let config = subject.engine.config();
    let (_, height, width) = photo.pixels.dim();
    let columns = (subject.positions + BEYOND) * config.tokenizer.token_width();
    let view = |view: usize| -> Result<Array3<f32>> {
        let begin = 2 * width * view / VIEWS;
        let pixels = Array3::from_shape_fn((3, height, columns), |(c, y, x)| {
            let place = (begin + x) % (2 * width);
            photo.pixels[[c, y, if place < width { place } else { 2 * width - 1 - place }]]
        });
        let tokens = subject.engine.encode_tokens(pixels.view().insert_axis(Axis(0)))?;
        Ok(tokens.slice_move(s![.., ..subject.positions, ..]))
    };
    let views = (0..VIEWS).map(view).collect::<Result<Vec<_>>>()?;
    let views: Vec<_> = views.iter().map(|view| view.view()).collect();
    concatenate(Axis(0), &views).or_run("tokens")
}

/// Loss of rows of tokens `[rows, N, E]` at every position, `[rows, N]`. Each token is predicted from the tokens before
/// it.
fn row_losses(engine: &dyn Engine, label: i64, tokens: &Array3<f32>, noise: &[Array2<f32>]) -> Result<Array2<f64>> {
    let (rows, count, _) = tokens.dim();
    let (mut session, mut z) = engine.start(&vec![label; rows])?;
    let mut losses = Array2::zeros((rows, count));
    for position in 0..count {
        let token = tokens.index_axis(Axis(1), position);
        let found = token_losses(engine, z.view(), token, noise)?;
        losses.column_mut(position).assign(&ndarray::Array1::from(found));
        if position + 1 < count {
            z = session.step(token, &vec![position as i64; rows])?;
        }
    }
    Ok(losses)
}

/// Noise `[rows, E]` for each time.
fn noise(seed: u64, rows: usize, embed: usize) -> Result<Vec<Array2<f32>>> {
    let mut random = TorchRng::new(seed);
    let draw = |_| Array2::from_shape_vec((rows, embed), random.randn(rows * embed));
    let draws: std::result::Result<_, _> = (0..TIMES).map(draw).collect();
    draws.or_run("noise")
}

/// Loss of one token per row: the mean over times of |v(z_t, t) - (noise - token)|² per value of the token, with
/// `z_t = t·noise + (1-t)·token` (the reference's `diffusion/flows.py`).
fn token_losses(
    engine: &dyn Engine,
    z: ArrayView2<f32>,
    token: ArrayView2<f32>,
    noise: &[Array2<f32>],
) -> Result<Vec<f64>> {
    let mut losses = vec![0.0; token.dim().0];
    for (index, noise) in noise.iter().enumerate() {
        let t = (index as f32 + 0.5) / TIMES as f32;
        // One evaluation. Its update sets x to the velocity.
        let tableau = Tableau { times: vec![t], updates: vec![0.0, 0.0, 1.0, 0.0, 1.0, 0.0] };
        let noised = noise * t + &token * (1.0 - t);
        let velocity = engine.sample(z, noised.view(), &vec![1.0; losses.len()], &tableau)?;
        let distance = velocity - (noise - &token);
        for (loss, distance) in losses.iter_mut().zip(distance.rows()) {
            let square: f64 = distance.iter().map(|value| f64::from(*value).powi(2)).sum();
            *loss += square / (distance.len() * TIMES) as f64;
        }
    }
    Ok(losses)
}

/// Summarizes losses `[rows, N]` by what training on images of `trained` tokens has seen of a position.
fn bands(losses: ArrayView2<f64>, trained: usize, window: usize) -> Vec<Band> {
    let count = losses.dim().1;
    let full = window.min(trained - 1).max(1);
    let ends = [
        (0, 1, "seen, without context"),
        (1, full, "seen, with a part of the context"),
        (full, trained, "seen"),
        (trained, trained + SHIFTS - 1, "seen in shifted images only"),
        (trained + SHIFTS - 1, count, "never seen"),
    ];
    let of = |first: usize, end: usize| {
        let end = end.min(count);
        (first < end).then(|| losses.slice(s![.., first..end]).mean_axis(Axis(1))).flatten()
    };
    let seen = of(full, trained).map_or(f64::NAN, |rows| mean(rows.iter().copied()).0);
    let band = |(first, end, what): (usize, usize, &'static str)| {
        let (loss, error) = mean(of(first, end)?.iter().copied());
        Some(Band { first, last: end.min(count) - 1, what, loss, error, ratio: loss / seen })
    };
    ends.into_iter().filter_map(band).collect()
}

/// The mean and its standard error.
fn mean(values: impl ExactSizeIterator<Item = f64> + Clone) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.clone().sum::<f64>() / count;
    let squares: f64 = values.map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / (count - 1.0).max(1.0) / count).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bands_are_apart_and_cover_everything() {
        let losses = Array2::from_shape_fn((4, 40), |(row, n)| (row % 2) as f64 + if n < 16 { 1.0 } else { 2.0 });
        let found = bands(losses.view(), 16, 3);
        let ranges: Vec<_> = found.iter().map(|band| (band.first, band.last)).collect();
        assert_eq!(ranges, [(0, 0), (1, 2), (3, 15), (16, 30), (31, 39)]);
        assert_eq!((found[2].loss, found[2].ratio, found[4].loss), (1.5, 1.0, 2.5));
        // Values 0, 1, 0, 1: the standard deviation is √(1/3), and the standard error of the mean is half of it.
        assert!((found[2].error - (1.0f64 / 3.0).sqrt() / 2.0).abs() < 1e-12);
        let ranges: Vec<_> =
            bands(losses.slice(s![.., ..10]), 16, 3).iter().map(|band| (band.first, band.last)).collect();
        assert_eq!(ranges, [(0, 0), (1, 2), (3, 9)]);
        let ranges: Vec<_> = bands(losses.view(), 2, 3).iter().map(|band| (band.first, band.last)).collect();
        assert_eq!(ranges, [(0, 0), (1, 1), (2, 16), (17, 39)]);
    }
}
