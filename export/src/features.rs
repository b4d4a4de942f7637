//! EfficientNet-Lite0 as a graph that makes features of images, for evaluation.

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use eqim::bundle::{Precision, WEIGHTS_FILE};
use eqim::checkpoint::tensors::{self, TensorFile};
use eqim::model::{Dimension, Symbol, ValueInfo, ValueKind};
use eqim::{Result, efficientnet, files};
use prost::Message;

use crate::lower::{Lower, NEWEST_OPSET, places};

/// Height and width of the images that the graph takes.
pub const SIZE: usize = 256;

/// Writes the network at `weights` (see [`efficientnet::load`]) as a graph with its weights to `folder`. Returns the path
/// of the graph. Its input `images` is `[batch, 3, SIZE, SIZE]`, from 0 to 255; its outputs are `features` and `logits`
/// (see [`efficientnet::describe`]).
///
/// # Errors
/// Those of [`efficientnet::load`]; [`eqim::Error::run`] if a file cannot be written.
pub fn write_efficientnet(weights: &Path, folder: &Path) -> Result<PathBuf> {
    let weights = efficientnet::load(weights)?;
    let stored: Vec<(&str, Tensor)> = weights.iter().map(|(name, tensor)| (name, tensor.clone())).collect();
    let file = folder.join(WEIGHTS_FILE);
    tensors::write(&file, &stored, Default::default())?;
    let places = places(&TensorFile::open(&file)?)?;
    let mut lower = Lower::new(&places, Precision::Fp32, NEWEST_OPSET, false);
    let images = lower.input(&info("images", &[3, SIZE, SIZE]));
    let (features, logits) = efficientnet::describe(&mut lower, &images)?;
    let outputs = [info("features", &[efficientnet::description_width()]), info("logits", &[efficientnet::CLASSES])];
    let model = lower.finish("efficientnet-lite0", &[features, logits], &outputs);
    let path = folder.join("efficientnet-lite0.onnx");
    files::write(&path, &model.encode_to_vec())?;
    Ok(path)
}

/// A value of a batch.
fn info(name: &str, sizes: &[usize]) -> ValueInfo {
    let mut shape = vec![Dimension::Symbolic(Symbol::Batch)];
    shape.extend(sizes.iter().map(|&size| Dimension::Fixed(size)));
    ValueInfo { name: name.into(), kind: ValueKind::Float, shape }
}
