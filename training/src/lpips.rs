//! The learned perceptual distance LPIPS (Zhang et al., CVPR 2018), with which the reference trains
//! (`tokenizer/modules/losses/lpips.py`).

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use eqim::checkpoint::tensors::TensorFile;
use eqim::{Error, Result};

/// VGG16 up to its fifth block, with the LPIPS weights of its features.
#[derive(Debug)]
pub struct Lpips {
    blocks: Vec<Block>,
}

#[derive(Debug)]
struct Block {
    /// Weight `[output, input, 3, 3]` and bias `[1, output, 1, 1]` of each convolution.
    convolutions: Vec<(Tensor, Tensor)>,
    /// Weights of the block's features, `[1, channels, 1, 1]`.
    weights: Tensor,
}

/// A tensor by which the weights are recognized.
pub const ANCHOR: &str = "features.0.weight";

// Blocks of VGG16: number of channels, and indices of the convolutions in torchvision's `features`.
const BLOCKS: [(usize, &[usize]); 5] =
    [(64, &[0, 2]), (128, &[5, 7]), (256, &[10, 12, 14]), (512, &[17, 19, 21]), (512, &[24, 26, 28])];
// Mean and standard deviation of each channel of the network's training images, in -1..1.
const SHIFT: [f32; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f32; 3] = [0.458, 0.448, 0.450];

// The reference adds 1e-10 to the square root, whose gradient is infinite if all features are 0. Here it is added under
// the root.
const EPS: f64 = 1e-10;

impl Lpips {
    /// Reads the weights to `device`: `features.{i}.weight` and `.bias` of torchvision's VGG16, and
    /// `lin{k}.model.1.weight` of LPIPS.
    ///
    /// # Errors
    /// [`Error::input`] naming the tensor that is missing or has a wrong shape.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let mut file = TensorFile::open(path)?;
        let mut read = |name: String, shape: &[usize]| {
            let tensor = file.read(&name)?.to_dtype(DType::F32)?.to_device(device)?;
            if tensor.dims() != shape {
                let problem = format!("tensor {name} has shape {:?}, expected {shape:?}", tensor.dims());
                return Err(Error::input(path.display(), problem));
            }
            Ok(tensor)
        };
        let (mut blocks, mut input) = (vec![], 3);
        for (block, (channels, places)) in BLOCKS.into_iter().enumerate() {
            let mut convolutions = vec![];
            for place in places {
                let weight = read(format!("features.{place}.weight"), &[channels, input, 3, 3])?;
                let bias = read(format!("features.{place}.bias"), &[channels])?.reshape((1, channels, 1, 1))?;
                convolutions.push((weight, bias));
                input = channels;
            }
            let weights = read(format!("lin{block}.model.1.weight"), &[1, channels, 1, 1])?;
            blocks.push(Block { convolutions, weights });
        }
        Ok(Self { blocks })
    }

    /// The distance between reconstructions and images, a scalar: the mean over the batch. Both are
    /// `[batch, 3, height, width]` in -1..1, with at least 16 pixels on each side.
    ///
    /// # Errors
    /// If the shapes do not match.
    pub fn distance(&self, reconstruction: &Tensor, image: &Tensor) -> Result<Tensor> {
        let channels = |values: [f32; 3]| Tensor::from_slice(&values, (1, 3, 1, 1), image.device());
        let (shift, scale) = (channels(SHIFT)?, channels(SCALE)?);
        let prepared = |x: &Tensor| x.broadcast_sub(&shift)?.broadcast_div(&scale);
        let (mut a, mut b) = (prepared(reconstruction)?, prepared(image)?);
        let mut total = Tensor::zeros((), DType::F32, image.device())?;
        for (index, block) in self.blocks.iter().enumerate() {
            (a, b) = (block.features(&a, index > 0)?, block.features(&b, index > 0)?);
            let difference = (unit(&a)? - unit(&b)?)?.sqr()?.broadcast_mul(&block.weights)?;
            total = (total + difference.sum(1)?.mean_all()?)?;
        }
        Ok(total)
    }
}

impl Block {
    fn features(&self, x: &Tensor, pooled: bool) -> Result<Tensor> {
        let mut x = if pooled { x.max_pool2d(2)? } else { x.clone() };
        for (weight, bias) in &self.convolutions {
            x = x.conv2d(weight, 1, 1, 1, 1)?.broadcast_add(bias)?.relu()?;
        }
        Ok(x)
    }
}

/// Normalizes features `[batch, channels, rows, columns]` to length 1 at every place.
///
/// # Errors
/// If a Candle operation fails.
pub fn unit(x: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_div(&(x.sqr()?.sum_keepdim(1)? + EPS)?.sqrt()?)?)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Var;

    use super::*;

    fn write(path: &Path, leave_out: &str) {
        let (mut stored, mut input) = (vec![], 3);
        for (block, (channels, places)) in BLOCKS.into_iter().enumerate() {
            for place in places {
                let weight = Tensor::randn(0f32, 0.05, (channels, input, 3, 3), &Device::Cpu).unwrap();
                let bias = Tensor::zeros(channels, DType::F32, &Device::Cpu).unwrap();
                stored.push((format!("features.{place}.weight"), weight));
                stored.push((format!("features.{place}.bias"), bias));
                input = channels;
            }
            let weights = Tensor::ones((1, channels, 1, 1), DType::F32, &Device::Cpu).unwrap();
            stored.push((format!("lin{block}.model.1.weight"), weights));
        }
        stored.retain(|(name, _)| name != leave_out);
        let stored: Vec<(&str, Tensor)> = stored.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
        eqim::checkpoint::tensors::write(path, &stored, HashMap::new()).unwrap();
    }

    #[test]
    fn distance_is_nothing_for_equal_images_and_grows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lpips.safetensors");
        write(&path, "");
        let lpips = Lpips::open(&path, &Device::Cpu).unwrap();
        let image = Tensor::rand(-1f32, 1f32, (1, 3, 32, 32), &Device::Cpu).unwrap();
        let noise = Tensor::rand(-1f32, 1f32, (1, 3, 32, 32), &Device::Cpu).unwrap();
        let distance = |share: f64| {
            let other = Var::from_tensor(&((&image * (1.0 - share)).unwrap() + (&noise * share).unwrap()).unwrap());
            let other = other.unwrap();
            let distance = lpips.distance(&other, &image).unwrap();
            let gradient = distance.backward().unwrap().get(&other).unwrap().sqr().unwrap().sum_all().unwrap();
            assert!(gradient.to_scalar::<f32>().unwrap().is_finite());
            distance.to_scalar::<f32>().unwrap()
        };
        assert_eq!(distance(0.0), 0.0);
        assert!(0.0 < distance(0.1) && distance(0.1) < distance(0.5));
    }

    #[test]
    fn a_missing_tensor_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lpips.safetensors");
        write(&path, "features.21.bias");
        let error = Lpips::open(&path, &Device::Cpu).unwrap_err();
        assert!(error.is_input() && error.to_string().contains("features.21.bias"), "{error}");
    }
}
