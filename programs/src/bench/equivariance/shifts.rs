//! Comparison of the tokens of a shifted image with the shifted tokens of the image.

use eqim::engine::Engine;
use eqim::{Error, Result};
use ndarray::{Array2, ArrayView1, s};
use serde::Serialize;

use super::super::photos::Photo;
use super::subject::Subject;

/// Shifts in sixteenths of a token.
const SIXTEENTHS: [usize; 9] = [1, 2, 4, 8, 12, 16, 32, 64, 128];
/// Number of tokens at each edge that the edge affects most. The tokenizer mirrors at the edge.
const EDGE: usize = 2;

/// Equivariance of the tokenizer for one shift.
#[derive(Clone, Debug, Serialize)]
pub struct Shift {
    /// Shift to the left in pixels.
    pub pixels: usize,
    /// Shift to the left in tokens.
    pub tokens: f64,
    /// Number of pictures that are wide enough.
    pub images: usize,
    /// Distance between the tokens of the shifted image and the shifted tokens, relative to the norm of the shifted
    /// tokens. If the shift is not a whole number of tokens, the shifted tokens are interpolated linearly.
    pub all: f64,
    /// The same distance for tokens away from the edges of both windows; `None` if there are no such tokens.
    pub inside: Option<f64>,
    /// The same distance for tokens that are not shifted, for comparison.
    pub unshifted: f64,
}

/// Sums of squares of a distance and of the norm that it is relative to.
#[derive(Clone, Copy, Default)]
struct Part {
    distance: f64,
    norm: f64,
}

impl Part {
    fn add(&mut self, found: ArrayView1<f32>, expected: ArrayView1<f32>) {
        self.distance += found.iter().zip(expected).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        self.norm += expected.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
    }

    fn part(self) -> Option<f64> {
        (self.norm > 0.0).then(|| (self.distance / self.norm).sqrt())
    }
}

/// Measures all shifts that the pictures are wide enough for. The windows have the length that the model was trained
/// on.
///
/// # Errors
/// [`Error::input`] if no picture is wide enough; [`Error::run`] if the engine fails.
pub fn measure(subject: &Subject, photos: &[Photo], progress: &mut dyn FnMut(String)) -> Result<Vec<Shift>> {
    let width = subject.engine.config().tokenizer.token_width();
    let window = subject.trained * width;
    let mut pixels: Vec<usize> =
        SIXTEENTHS.map(|part| part * width / 16).into_iter().filter(|&it| 0 < it && it < window).collect();
    pixels.dedup();
    let mut sums = vec![(0, [Part::default(); 3]); pixels.len()];
    for (index, photo) in photos.iter().enumerate() {
        let room = photo.pixels.dim().2.saturating_sub(window);
        if room < pixels[0] {
            continue;
        }
        progress(format!("shifting picture {} of {}", index + 1, photos.len()));
        let tokens = encode(subject.engine, photo, 0, window)?;
        for (&shift, (images, parts)) in pixels.iter().zip(&mut sums).filter(|(shift, _)| **shift <= room) {
            let found = encode(subject.engine, photo, shift, window)?;
            *images += 1;
            compare(&found, &tokens, (shift / width, (shift % width) as f32 / width as f32), parts);
        }
    }
    let shift = |(&pixels, &(images, [all, inside, unshifted])): (&usize, &(usize, [Part; 3]))| {
        let (tokens, inside) = (pixels as f64 / width as f64, inside.part());
        Some(Shift { pixels, tokens, images, all: all.part()?, inside, unshifted: unshifted.part()? })
    };
    let found: Vec<Shift> = pixels.iter().zip(&sums).filter_map(shift).collect();
    if found.is_empty() {
        let widest = photos.iter().max_by_key(|photo| photo.pixels.dim().2);
        let widest = widest.map_or(String::new(), |photo| {
            format!(" ({} is the widest, with {} at the model's height)", photo.path.display(), photo.pixels.dim().2)
        });
        let problem = format!("contains no picture wider than {window} pixels, the width of --trained tokens{widest}");
        return Err(Error::input(format!("--images {}", subject.images.display()), problem));
    }
    Ok(found)
}

/// Latents `[N, E]` of the window of a picture that begins at pixel `x`. They are proportional to the tokens.
fn encode(engine: &dyn Engine, photo: &Photo, x: usize, window: usize) -> Result<Array2<f32>> {
    let pixels = photo.pixels.slice(s![.., .., x..x + window]);
    Ok(engine.encode(pixels.insert_axis(ndarray::Axis(0)))?.index_axis_move(ndarray::Axis(0), 0))
}

/// Adds the distances of the tokens `found` of an image that was shifted by `whole` tokens and a fraction `part` of a
/// token.
fn compare(found: &Array2<f32>, tokens: &Array2<f32>, (whole, part): (usize, f32), sums: &mut [Part; 3]) {
    let count = tokens.dim().0;
    let between = usize::from(part > 0.0);
    for index in 0..count - whole - between {
        let from = index + whole;
        let next = from + between;
        let expected = &tokens.row(from) * (1.0 - part) + &tokens.row(next) * part;
        let away = |place: usize| (EDGE..count - EDGE).contains(&place);
        let [all, inside, unshifted] = sums;
        all.add(found.row(index), expected.view());
        if count > 2 * EDGE && away(index) && away(from) && away(next) {
            inside.add(found.row(index), expected.view());
        }
        unshifted.add(found.row(index), tokens.row(index));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_follow_are_at_no_distance() {
        let token = |n: f32| [n.sin(), (2.0 * n).cos(), n];
        let tokens = |from: f32| Array2::from_shape_fn((9, 3), |(n, e)| token(from + n as f32)[e]);
        let parts = |shift: f32| {
            let mut sums = [Part::default(); 3];
            compare(&tokens(shift), &tokens(0.0), (shift as usize, shift.fract()), &mut sums);
            sums.map(|sum| sum.part().unwrap_or(f64::NAN))
        };
        for shift in [1.0, 2.0, 4.0] {
            let [all, inside, unshifted] = parts(shift);
            assert!(all == 0.0 && inside == 0.0 && unshifted > 0.1, "{shift}");
        }
        // Interpolation has an error too. It is largest at half a token.
        let [quarter, half] = [0.25, 0.5].map(|shift| parts(shift)[0]);
        assert!(0.0 < quarter && quarter < half && half < 0.2, "{quarter}, {half}");
        assert!(parts(8.0)[1].is_nan(), "one token is left, and that is at an edge");
    }

    #[test]
    fn a_distance_is_a_part_of_the_norm() {
        let (tokens, found) = (Array2::from_elem((6, 4), 2.0), Array2::from_elem((6, 4), 2.5));
        let mut sums = [Part::default(); 3];
        compare(&found, &tokens, (1, 0.0), &mut sums);
        assert_eq!(sums.map(Part::part), [Some(0.25); 3]);
    }
}
