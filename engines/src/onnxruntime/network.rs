//! Networks other than the model: an ONNX graph that makes features of images, for evaluation.

use std::path::Path;

use eqim::{Error, Result, ResultExt};
use ndarray::{Array2, ArrayView4};
use ort::value::{DynValue, Tensor, TensorElementType, ValueType};

use super::failure::failed;
use super::runtime::{Graph, GraphOptions, Runtime};
use super::values::{float_input, float_output};

/// A graph with one input `[batch, 3, height, width]`, red, green and blue from 0 to 255 as floating-point numbers or bytes,
/// and an output `features` `[batch, width]`. It may have an output `logits` `[batch, classes]`.
pub struct ImageNetwork {
    graph: Graph,
    /// Whether the input has bytes.
    is_byte: bool,
    /// Height and width of the images, if the graph takes one size only.
    size: Option<(usize, usize)>,
    features: usize,
    logits: Option<usize>,
}

impl ImageNetwork {
    /// Loads a graph.
    ///
    /// # Errors
    /// [`Error::input`] if the graph has another input, or no output `features`; [`Error::run`] if ONNX Runtime refuses it.
    pub fn open(path: &Path, runtime: Runtime, threads: Option<usize>) -> Result<Self> {
        let graph = runtime.graph(path, GraphOptions { threads, prepacking: true, ..GraphOptions::default() })?;
        let bad = |problem: String| Err(Error::input(path.display(), problem));
        let inputs = graph.inputs();
        let [(name, input)] = &inputs[..] else {
            return bad(format!("has {} inputs, expected one: images [batch, 3, height, width]", inputs.len()));
        };
        let expected = "expected images [batch, 3, height, width] of float32 or uint8, with any batch";
        let ValueType::Tensor { ty, shape, .. } = input else {
            return bad(format!("has the input {name}, which is no tensor; {expected}"));
        };
        let (is_byte, is_float) = (*ty == TensorElementType::Uint8, *ty == TensorElementType::Float32);
        if !(is_byte || is_float) || shape.len() != 4 || shape[0] >= 0 || shape[1] != 3 {
            return bad(format!("has the input {name} of {ty} {shape:?}; {expected}"));
        }
        let size = match (usize::try_from(shape[2]), usize::try_from(shape[3])) {
            (Ok(height), Ok(width)) => Some((height, width)),
            (Err(_), Err(_)) => None,
            _ => {
                return bad(format!(
                    "has the input {name} {shape:?}; expected both height and width fixed, or neither"
                ));
            }
        };
        let outputs = graph.outputs();
        let place = |name: &str| outputs.iter().position(|(output, _)| output == name);
        let Some(features) = place("features") else {
            let names: Vec<&str> = outputs.iter().map(|(name, _)| &name[..]).collect();
            return bad(format!("has no output features [batch, width] (found: {})", names.join(", ")));
        };
        let logits = place("logits");
        Ok(Self { graph, is_byte, size, features, logits })
    }

    /// Height and width of the images, if the graph takes one size only.
    pub fn size(&self) -> Option<(usize, usize)> {
        self.size
    }

    /// Features and logits of images `[batch, 3, height, width]`, from 0 to 255.
    ///
    /// # Errors
    /// [`Error::run`] if ONNX Runtime fails or an output is not a matrix.
    pub fn run(&self, images: ArrayView4<f32>) -> Result<(Array2<f32>, Option<Array2<f32>>)> {
        let input: DynValue = match self.is_byte {
            false => float_input(images)?,
            true => {
                let bytes: Vec<u8> = images.iter().map(|value| value.round().clamp(0.0, 255.0) as u8).collect();
                Tensor::from_array((images.shape().to_vec(), bytes)).map_err(failed("images"))?.into_dyn()
            }
        };
        let outputs = self.graph.run(&[input.into()])?;
        let matrix = |place: usize| float_output(&outputs[place]).or_run("output");
        Ok((matrix(self.features)?, self.logits.map(matrix).transpose()?))
    }
}
