//! Features of a set of images, and the files that keep them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::mpsc::sync_channel;

use candle_core::{DType, Device, Tensor};
use eqim::checkpoint::tensors::{self, TensorFile};
use eqim::{Error, Result, ResultExt};
use ndarray::{Array2, Array3, Axis, concatenate, stack};
use serde::{Deserialize, Serialize};

use crate::frechet::Moments;
use crate::network::{Network, Outputs};
use crate::numpy;
use crate::pictures::Crops;
use crate::resize::Protocol;

/// How features were made. Features are compared only if all of it but the images is equal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Where the images come from.
    pub images: String,
    /// Name of the network.
    pub network: String,
    /// Identity of the network.
    pub identity: String,
    /// How images are resized to the size of the network.
    pub resize: Protocol,
    /// How crops are drawn; `None` for whole images.
    pub crops: Option<Crops>,
}

/// What is known of a set of images.
#[derive(Clone, Debug)]
pub struct Features {
    /// The folder or file that the features come from.
    pub source: String,
    /// How the features were made; `None` for statistics of other programs.
    pub origin: Option<Origin>,
    /// Mean and covariance.
    pub moments: Moments,
    /// Features `[images, width]`; `None` if only their moments are kept.
    pub values: Option<Array2<f32>>,
    /// Logits `[images, classes]`, if the network has them.
    pub logits: Option<Array2<f32>>,
}

/// Metadata key for the [`Origin`] as JSON.
const KEY: &str = "eqim-features";

impl Features {
    /// Features of the images that batches of a network's outputs belong to.
    ///
    /// # Errors
    /// [`Error::run`] naming the first image with a feature that is not finite; errors of [`Moments::of`].
    pub fn new(origin: Origin, outputs: &[Outputs]) -> Result<Self> {
        let joined = |parts: Vec<_>| concatenate(Axis(0), &parts).or_run("features");
        let values = joined(outputs.iter().map(|outputs| outputs.features.view()).collect())?;
        let logits: Vec<_> = outputs.iter().filter_map(|outputs| Some(outputs.logits.as_ref()?.view())).collect();
        let logits = if logits.is_empty() { None } else { Some(joined(logits)?) };
        for rows in [Some(&values), logits.as_ref()].into_iter().flatten() {
            let bad = rows.rows().into_iter().position(|row| !row.iter().all(|value| value.is_finite()));
            if let Some(index) = bad {
                let problem = format!("the output of {} for image {index} is not finite", origin.network);
                return Err(Error::run(&origin.images, problem));
            }
        }
        let moments = Moments::of(values.view()).map_err(|error| error.about(&origin.images))?;
        Ok(Self { source: origin.images.clone(), moments, origin: Some(origin), values: Some(values), logits })
    }

    /// Number of images, if it is known.
    pub fn count(&self) -> Option<usize> {
        self.moments.count
    }

    /// Whether a file holds kept features, by the end of its name.
    pub fn is_file(path: &Path) -> bool {
        path.extension().is_some_and(|extension| extension == "safetensors" || extension == "npz")
    }

    /// Reads a file of [`Features::write`], or an `.npz` with `mu` and `sigma` (of ADM, pytorch-fid or clean-fid).
    ///
    /// # Errors
    /// [`Error::input`] naming the file and the tensor that is missing or of a wrong shape.
    pub fn read(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension == "npz") {
            let source = path.display().to_string();
            return Ok(Self { source, origin: None, moments: numpy::moments(path)?, values: None, logits: None });
        }
        let mut file = TensorFile::open(path)?;
        let bad = |problem: String| Error::input(path.display(), problem);
        let text = file.text(KEY).ok_or_else(|| bad(format!("has no `{KEY}` in its metadata")))?;
        let origin: Origin = serde_json::from_str(text)
            .map_err(|error| bad("holds no features of this version: make them again".into()).because(error))?;
        let has_logits = file.info("logits").is_some();
        let mut read = |name: &str| -> Result<Array2<f32>> {
            let tensor = file.read(name)?.to_dtype(DType::F32)?;
            let shape = tensor.dims2().map_err(|_| bad(format!("tensor {name} is not a matrix")))?;
            Array2::from_shape_vec(shape, tensor.flatten_all()?.to_vec1()?).or_run(name)
        };
        let values = read("features")?;
        let logits = if has_logits { Some(read("logits")?) } else { None };
        let outputs = Outputs { features: values, logits };
        if outputs.logits.as_ref().is_some_and(|logits| logits.nrows() != outputs.features.nrows()) {
            return Err(bad("has features and logits of different numbers of images".into()));
        }
        Self::new(origin, &[outputs]).map_err(|error| error.about(path.display()))
    }

    /// Keeps the features in a `.safetensors` file.
    ///
    /// # Errors
    /// [`Error::input`] if there are only moments; [`Error::run`] if the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let (Some(origin), Some(values)) = (&self.origin, &self.values) else {
            return Err(Error::input(path.display(), "cannot keep the statistics of another program"));
        };
        let tensor =
            |values: &Array2<f32>| Tensor::from_iter(values.iter().copied(), &Device::Cpu)?.reshape(values.dim());
        let mut stored = vec![("features", tensor(values)?)];
        if let Some(logits) = &self.logits {
            stored.push(("logits", tensor(logits)?));
        }
        let text = serde_json::to_string(origin).or_run(path.display())?;
        tensors::write(path, &stored, HashMap::from([(KEY.into(), text)]))
    }

    /// Checks that both sets were made in the same way.
    ///
    /// # Errors
    /// [`Error::input`] naming what differs.
    pub fn check_comparable(&self, other: &Self) -> Result<()> {
        let widths = [self, other].map(|set| set.moments.mean.len());
        if widths[0] != widths[1] {
            let problem = format!("have {} and {} values: they are of different networks", widths[0], widths[1]);
            return Err(Error::input("features", problem));
        }
        match (&self.origin, &other.origin) {
            (Some(a), Some(b)) => a.check_comparable(b),
            _ => Ok(()),
        }
    }
}

impl Origin {
    /// Checks that features of both origins can be compared.
    ///
    /// # Errors
    /// [`Error::input`] naming what differs.
    pub fn check_comparable(&self, other: &Self) -> Result<()> {
        let differ = |field: &'static str, a: &str, b: &str| {
            let problem = format!("differs: {a} for the first set, {b} for the second, expected the same for both");
            Err(Error::setting(field, problem))
        };
        if self.identity != other.identity {
            let named = |origin: &Self| format!("{} (SHA-256 {:.8})", origin.network, origin.identity);
            return differ("features", &named(self), &named(other));
        }
        if self.resize != other.resize {
            return differ("resize", &self.resize.to_string(), &other.resize.to_string());
        }
        if self.crops.map(|crops| crops.size) != other.crops.map(|crops| crops.size) {
            return differ("crops", &self.parts(), &other.parts());
        }
        Ok(())
    }

    /// Which parts of the images are measured, in words.
    pub fn parts(&self) -> String {
        self.crops.map_or("whole images".into(), |crops| format!("squares of {} pixels", crops.size))
    }
}

/// Makes the features of images `[3, height, width]` in batches of the same size. The next batch is prepared while the
/// network runs.
///
/// # Errors
/// Errors of `images` and of the network.
pub fn outputs(
    network: &dyn Network,
    images: impl Iterator<Item = Result<Vec<Array3<f32>>>> + Send,
    mut done: impl FnMut(usize),
) -> Result<Vec<Outputs>> {
    let (mut made, mut count) = (vec![], 0);
    std::thread::scope(|scope| {
        let (sender, batches) = sync_channel(0);
        // The thread ends when the receiver is dropped.
        scope.spawn(move || images.map(|batch| sender.send(batch)).all(|sent| sent.is_ok()));
        for batch in batches {
            let batch = batch?;
            let views: Vec<_> = batch.iter().map(|image| image.view()).collect();
            let stacked = stack(Axis(0), &views).or_run("images")?;
            made.push(network.run(stacked.view())?);
            count += batch.len();
            done(count);
        }
        Ok(made)
    })
}
