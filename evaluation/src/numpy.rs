//! Statistics in NumPy's `.npz` files.

use std::path::Path;

use candle_core::npy::NpzTensors;
use candle_core::{DType, Tensor};
use eqim::{Error, Result, ResultExt};
use ndarray::{Array1, Array2};

use crate::frechet::Moments;

/// The mean `mu` and covariance `sigma` of a file. Other arrays, such as the images of ADM's files, are not read.
///
/// # Errors
/// [`Error::input`] naming the array that is missing or of a wrong shape.
pub fn moments(path: &Path) -> Result<Moments> {
    let bad = |problem: String| Error::input(path.display(), problem);
    let file = NpzTensors::new(path).map_err(|error| bad("cannot be read as an .npz file".into()).because(error))?;
    let read = |name: &str| -> Result<Tensor> {
        let found = file.get(name).map_err(|error| bad(format!("array {name} cannot be read")).because(error))?;
        let names = || file.names().into_iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        let tensor = found.ok_or_else(|| bad(format!("has no array {name} (found: {})", names())))?;
        Ok(tensor.to_dtype(DType::F64)?)
    };
    let (mean, covariance) = (read("mu")?, read("sigma")?);
    let width = mean.elem_count();
    if mean.rank() != 1 || covariance.dims() != [width, width] {
        let problem = format!("has mu {:?} and sigma {:?}, expected [n] and [n, n]", mean.dims(), covariance.dims());
        return Err(bad(problem));
    }
    let covariance = Array2::from_shape_vec((width, width), covariance.flatten_all()?.to_vec1()?).or_run("sigma")?;
    Ok(Moments { count: None, mean: Array1::from_vec(mean.to_vec1()?), covariance })
}
