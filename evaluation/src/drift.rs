//! Quality over the length of panoramas: the distance of their squares at every position to real images.

use eqim::{Error, Result};
use serde::Serialize;

use crate::features::{Features, Origin, outputs};
use crate::frechet::Target;
use crate::network::Network;
use crate::pictures::{Pictures, batches};
use crate::resize::Protocol;

/// Distance of the squares at one position.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Place {
    /// First token of the squares.
    pub token: usize,
    /// Number of panoramas that reach this far.
    pub images: usize,
    /// Fréchet distance.
    pub frechet_distance: f64,
}

/// The tokens at which squares are compared.
#[derive(Clone, Copy, Debug)]
pub struct Steps {
    /// Width of a token in pixels.
    pub token_width: usize,
    /// Distance of two positions in tokens.
    pub every: usize,
}

/// Compares the squares of panoramas at every position with real images. The panoramas have the same height; positions
/// that fewer than two of them reach are left out.
///
/// # Errors
/// [`Error::input`] if no position is left; errors of the network.
pub fn curve(
    panoramas: &Pictures,
    real: &Features,
    network: &dyn Network,
    (steps, protocol): (Steps, Protocol),
    origin: &Origin,
    mut done: impl FnMut(usize),
) -> Result<Vec<Place>> {
    let (width, height) = panoramas.size()?;
    let target = Target::new(&real.moments)?;
    let mut places = vec![];
    for token in (0..).step_by(steps.every) {
        let column = token * steps.token_width;
        if column + height > width {
            break;
        }
        let views = panoramas.at(column);
        if views.len() < 2 {
            continue;
        }
        let made = outputs(network, batches(&views, network, protocol), |_| {})?;
        let features = Features::new(origin.clone(), &made)?;
        features.check_comparable(real)?;
        let frechet_distance = target.distance(&features.moments)?;
        places.push(Place { token, images: views.len(), frechet_distance });
        done(places.len());
    }
    match places.is_empty() {
        true => Err(Error::input(&origin.images, "has no two pictures that are at least as wide as high")),
        false => Ok(places),
    }
}

/// Means of the distances at seams and elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Seams {
    /// Mean distance of the squares that contain a seam.
    pub with_seam: f64,
    /// Mean distance of the others.
    pub without_seam: f64,
}

/// Splits a curve by whether a seam lies in the middle half of the squares, which are `tokens` wide. Seams are at multiples
/// of `distance` tokens. `None` if all squares are of one kind.
pub fn seams(places: &[Place], tokens: usize, distance: usize) -> Option<Seams> {
    let has_seam = |place: &&Place| {
        let (first, last) = (place.token + tokens / 4, place.token + tokens - tokens / 4);
        (first..last).any(|token| token > 0 && token.is_multiple_of(distance))
    };
    let (with, without): (Vec<&Place>, Vec<&Place>) = places.iter().partition(has_seam);
    let mean = |places: &[&Place]| places.iter().map(|place| place.frechet_distance).sum::<f64>() / places.len() as f64;
    let known = !with.is_empty() && !without.is_empty();
    known.then(|| Seams { with_seam: mean(&with), without_seam: mean(&without) })
}
