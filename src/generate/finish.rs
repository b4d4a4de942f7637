//! Postprocessing of decoded columns: the columns of a photograph replace decoded columns, and images that grew to the
//! left are mirrored back.

use ndarray::{Array3, Axis, s};

use super::tiles;
use crate::picture::Side;

/// Number of tokens over which the columns of a photograph fade into decoded columns.
const EDGE: usize = 2;

/// Postprocessing of an image.
#[derive(Clone, Debug, Default)]
pub struct Finish {
    /// Columns `[3, height, n]` that are kept, in the order of generation. The last of them fade out.
    pub kept: Option<Array3<f32>>,
    /// Side on which the image grew.
    pub side: Side,
    /// Width of a token in pixels.
    pub token_width: usize,
}

impl Finish {
    /// Finishes columns `[3, height, n]` that were generated at pixel `x` of an image of `width` pixels. Returns the
    /// final position of the columns and the columns.
    pub fn columns(&self, x: usize, mut pixels: Array3<f32>, width: usize) -> (usize, Array3<f32>) {
        if let Some(kept) = &self.kept {
            self.keep(kept, x, &mut pixels);
        }
        match self.side {
            Side::Right => (x, pixels),
            Side::Left => {
                pixels.invert_axis(Axis(2));
                (width - x - pixels.dim().2, pixels)
            }
        }
    }

    /// Blends the kept columns over the columns of an image that begin at pixel `x`.
    fn keep(&self, kept: &Array3<f32>, x: usize, pixels: &mut Array3<f32>) {
        let end = kept.dim().2;
        let shared = end.saturating_sub(x).min(pixels.dim().2);
        let edge = (EDGE * self.token_width).min(end);
        let ramp = tiles::ramp(edge);
        for column in 0..shared {
            let from_edge = (x + column + edge).checked_sub(end);
            let decoded = from_edge.map_or(0.0, |place| ramp[place]);
            let kept = kept.slice(s![.., .., x + column]);
            pixels
                .slice_mut(s![.., .., column])
                .zip_mut_with(&kept, |pixel, &kept| *pixel = decoded * *pixel + (1.0 - decoded) * kept);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Finishes `count` decoded columns of zeros at pixel `x`, with a kept photograph of ones. Returns the position and
    /// one row of pixels.
    fn finished(side: Side, x: usize, count: usize) -> (usize, Vec<f32>) {
        let finish = Finish { kept: Some(Array3::from_elem((3, 2, 12), 1.0)), side, token_width: 4 };
        let (x, pixels) = finish.columns(x, Array3::zeros((3, 2, count)), 40);
        assert!(pixels.axis_iter(Axis(0)).all(|channel| channel == pixels.index_axis(Axis(0), 0)));
        (x, pixels.slice(s![0, 1, ..]).to_vec())
    }

    #[test]
    fn a_photograph_stays_and_fades_at_its_edge() {
        let (x, whole) = finished(Side::Right, 0, 40);
        assert_eq!((x, &whole[..4], &whole[12..]), (0, &[1.0; 4][..], &[0.0; 28][..]));
        assert!(whole[3..13].is_sorted_by(|a, b| a > b), "{whole:?}");
        // Strips are finished in the same way as the whole image.
        let strips: Vec<f32> = [(0, 5), (5, 6), (11, 20), (31, 9)]
            .into_iter()
            .flat_map(|(x, count)| {
                let (at, columns) = finished(Side::Right, x, count);
                assert_eq!(at, x);
                columns
            })
            .collect();
        assert_eq!(strips, whole);
    }

    #[test]
    fn what_grew_to_the_left_is_the_mirror_of_what_grew_to_the_right() {
        let (x, mut mirrored) = finished(Side::Left, 0, 40);
        mirrored.reverse();
        assert_eq!((x, mirrored), finished(Side::Right, 0, 40));
        let (x, mut strip) = finished(Side::Left, 5, 6);
        strip.reverse();
        assert_eq!((x, strip), (40 - 5 - 6, finished(Side::Right, 5, 6).1));
    }
}
