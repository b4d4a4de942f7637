//! Resizing of images to the size of a network. Published figures depend on how this is done (Parmar et al. 2022).

use std::fmt;
use std::str::FromStr;

use eqim::{Error, Result};
use ndarray::{Array1, Array3, ArrayView1, ArrayView3, Axis, Zip};
use serde::{Deserialize, Serialize};

/// A protocol of resizing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Bicubic with antialiasing, as in clean-fid: Pillow's filter in floating-point numbers.
    #[default]
    Clean,
    /// Bilinear without antialiasing, as in TensorFlow 1: what ADM, torch-fidelity and most published FIDs use.
    Legacy,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Clean => "clean",
            Self::Legacy => "legacy",
        })
    }
}

impl FromStr for Protocol {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "clean" => Ok(Self::Clean),
            "legacy" => Ok(Self::Legacy),
            _ => Err(Error::setting("resize", format!("is {text:?}, expected clean or legacy"))),
        }
    }
}

impl Protocol {
    /// Resizes an image `[3, height, width]` with values from 0 to 255.
    pub fn resize(self, image: ArrayView3<f32>, (height, width): (usize, usize)) -> Array3<f32> {
        match self {
            Self::Clean => {
                let columns = along(image, Axis(2), width, cubic);
                along(columns.view(), Axis(1), height, cubic).mapv(|value| value.clamp(0.0, 255.0))
            }
            // In the order of TensorFlow: two pixels of a row, then two rows.
            Self::Legacy => {
                let columns = along(image, Axis(2), width, linear);
                along(columns.view(), Axis(1), height, linear)
            }
        }
    }
}

/// Resizes one axis. An axis of the right size stays as it is.
fn along(
    image: ArrayView3<f32>,
    axis: Axis,
    size: usize,
    filter: impl Fn(ArrayView1<f32>, usize) -> Array1<f32>,
) -> Array3<f32> {
    if image.len_of(axis) == size {
        return image.to_owned();
    }
    let mut shape = image.raw_dim();
    shape[axis.index()] = size;
    let mut resized = Array3::zeros(shape);
    Zip::from(resized.lanes_mut(axis)).and(image.lanes(axis)).for_each(|mut to, from| to.assign(&filter(from, size)));
    resized
}

/// Pillow's bicubic filter, whose kernel widens when it shrinks an image.
fn cubic(from: ArrayView1<f32>, size: usize) -> Array1<f32> {
    const A: f64 = -0.5;
    let kernel = |x: f64| match x.abs() {
        x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
        _ => 0.0,
    };
    let scale = from.len() as f64 / size as f64;
    let widened = scale.max(1.0);
    (0..size)
        .map(|place| {
            let center = (place as f64 + 0.5) * scale;
            let first = (center - 2.0 * widened + 0.5).max(0.0) as usize;
            let last = ((center + 2.0 * widened + 0.5) as usize).min(from.len());
            let (mut sum, mut weights) = (0.0, 0.0);
            for at in first..last {
                let weight = kernel((at as f64 - center + 0.5) / widened);
                weights += weight;
                sum += weight * f64::from(from[at]);
            }
            (sum / weights) as f32
        })
        .collect()
}

/// TensorFlow's bilinear filter without half-pixel centres.
fn linear(from: ArrayView1<f32>, size: usize) -> Array1<f32> {
    let scale = (from.len() as f64 / size as f64) as f32;
    (0..size)
        .map(|place| {
            let at = place as f32 * scale;
            let low = at as usize;
            let high = (low + 1).min(from.len() - 1);
            from[low] + (from[high] - from[low]) * (at - low as f32)
        })
        .collect()
}
