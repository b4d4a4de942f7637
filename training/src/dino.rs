//! Semantic features of images from DINOv2 (Oquab et al. 2023), if its weights are given. The semantic decoder of the
//! reference learns to predict them (`tokenizer/modules/losses/contperceptual.py`).

use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use eqim::checkpoint::tensors::TensorFile;
use eqim::{Error, Result};

use crate::resize::{Kernel, resize};

/// DINOv2's vision transformer without registers.
#[derive(Debug)]
pub struct Dino {
    class: Tensor,
    /// Position embeddings of the patches, `[1, width, side, side]`.
    positions: Tensor,
    class_position: Tensor,
    patch: (Tensor, Tensor),
    blocks: Vec<Block>,
    norm: (Tensor, Tensor),
}

#[derive(Debug)]
struct Block {
    norms: [(Tensor, Tensor); 2],
    qkv: (Tensor, Tensor),
    projection: (Tensor, Tensor),
    hidden: [(Tensor, Tensor); 2],
    scales: [Tensor; 2],
}

/// A tensor by which the weights are recognized.
pub const ANCHOR: &str = "cls_token";

// Mean and standard deviation of the ImageNet channels, for values in 0..1.
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const DEVIATION: [f32; 3] = [0.229, 0.224, 0.225];
const HEAD: usize = 64;
const EPS: f64 = 1e-6;

impl Dino {
    /// Reads the weights to `device`. The tensors have the names of the `state_dict` of `facebookresearch/dinov2`.
    ///
    /// # Errors
    /// [`Error::input`] naming the tensor that is missing or has a wrong shape.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let mut file = Reader { file: TensorFile::open(path)?, device };
        let class = file.tensor("cls_token", 3)?;
        let width = class.dim(2)?;
        let stored = file.tensor("pos_embed", 3)?;
        let side = stored.dim(1)?.saturating_sub(1).isqrt();
        if side == 0 || stored.dims() != [1, side * side + 1, width] || !width.is_multiple_of(HEAD) {
            let problem = format!(
                "tensor pos_embed has shape {:?}, expected [1, n·n + 1, {width}] with a multiple of {HEAD} as the last axis",
                stored.dims()
            );
            return Err(Error::input(path.display(), problem));
        }
        let positions = stored.narrow(1, 1, side * side)?.transpose(1, 2)?.reshape((1, width, side, side))?;
        let depth = file.file.tensors().keys().filter(|name| name.ends_with(".attn.qkv.weight")).count();
        let blocks = (0..depth).map(|block| file.block(block)).collect::<Result<_>>()?;
        Ok(Self {
            class,
            positions,
            class_position: stored.narrow(1, 0, 1)?,
            patch: file.pair("patch_embed.proj", 4)?,
            blocks,
            norm: file.pair("norm", 1)?,
        })
    }

    /// Width of the features.
    pub fn width(&self) -> usize {
        self.class.dims()[2]
    }

    /// Features `[batch, width, rows, columns]` of images `[batch, 3, height, width]` in -1..1. The images are scaled
    /// so that each of the `rows` × `columns` cells becomes one patch.
    ///
    /// # Errors
    /// If the shapes do not match.
    pub fn features(&self, image: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
        let patch = self.patch.0.dim(2)?;
        let channels = |values: [f32; 3]| Tensor::from_slice(&values, (1, 3, 1, 1), image.device());
        let x = ((image + 1.0)? * 0.5)?.broadcast_sub(&channels(MEAN)?)?.broadcast_div(&channels(DEVIATION)?)?;
        let x = resize(&x, rows * patch, columns * patch, Kernel::PYTORCH)?;
        let x = x.conv2d(&self.patch.0, 0, patch, 1, 1)?.flatten_from(2)?.transpose(1, 2)?;
        let x = x.broadcast_add(&self.patch.1)?;
        let positions = resize(&self.positions, rows, columns, Kernel::ANTIALIASED)?;
        let x = x.broadcast_add(&positions.flatten_from(2)?.transpose(1, 2)?)?;
        let class = (&self.class + &self.class_position)?.broadcast_as((x.dim(0)?, 1, self.width()))?;
        let mut x = Tensor::cat(&[&class.contiguous()?, &x.contiguous()?], 1)?;
        for block in &self.blocks {
            x = block.run(&x)?;
        }
        let x = layer_norm(&x, &self.norm)?.narrow(1, 1, rows * columns)?;
        Ok(x.transpose(1, 2)?.reshape((image.dim(0)?, self.width(), rows, columns))?)
    }
}

/// Reads weights from a file to a device.
struct Reader<'a> {
    file: TensorFile,
    device: &'a Device,
}

impl Reader<'_> {
    fn tensor(&mut self, name: &str, rank: usize) -> Result<Tensor> {
        let tensor = self.file.read(name)?.to_dtype(DType::F32)?.to_device(self.device)?;
        if tensor.rank() != rank {
            let problem = format!("tensor {name} has shape {:?}, expected {rank} axes", tensor.dims());
            return Err(Error::input(self.file.path().display(), problem));
        }
        Ok(tensor)
    }

    /// Reads a weight and its bias.
    fn pair(&mut self, name: &str, rank: usize) -> Result<(Tensor, Tensor)> {
        Ok((self.tensor(&format!("{name}.weight"), rank)?, self.tensor(&format!("{name}.bias"), 1)?))
    }

    fn block(&mut self, block: usize) -> Result<Block> {
        let name = |part: &str| format!("blocks.{block}.{part}");
        Ok(Block {
            norms: [self.pair(&name("norm1"), 1)?, self.pair(&name("norm2"), 1)?],
            qkv: self.pair(&name("attn.qkv"), 2)?,
            projection: self.pair(&name("attn.proj"), 2)?,
            hidden: [self.pair(&name("mlp.fc1"), 2)?, self.pair(&name("mlp.fc2"), 2)?],
            scales: [self.tensor(&name("ls1.gamma"), 1)?, self.tensor(&name("ls2.gamma"), 1)?],
        })
    }
}

impl Block {
    fn run(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.attention(&layer_norm(x, &self.norms[0])?)?;
        let x = (x + h.broadcast_mul(&self.scales[0])?)?;
        let h = linear(&layer_norm(&x, &self.norms[1])?, &self.hidden[0])?.gelu_erf()?;
        let h = linear(&h, &self.hidden[1])?.broadcast_mul(&self.scales[1])?;
        Ok((x + h)?)
    }

    fn attention(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, n, width) = x.dims3()?;
        let qkv = linear(x, &self.qkv)?.reshape((batch, n, 3, width / HEAD, HEAD))?.permute((2, 0, 3, 1, 4))?;
        let [q, k, v] = [0, 1, 2].map(|part| qkv.get(part).and_then(|part| part.contiguous()));
        let scores = (q?.matmul(&k?.t()?.contiguous()?)? * (HEAD as f64).powf(-0.5))?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let h = weights.matmul(&v?)?.transpose(1, 2)?.reshape((batch, n, width))?;
        linear(&h, &self.projection)
    }
}

fn linear(x: &Tensor, (weight, bias): &(Tensor, Tensor)) -> Result<Tensor> {
    Ok(x.broadcast_matmul(&weight.t()?)?.broadcast_add(bias)?)
}

fn layer_norm(x: &Tensor, (weight, bias): &(Tensor, Tensor)) -> Result<Tensor> {
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let deviation = (x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
    Ok(x.broadcast_div(&deviation)?.broadcast_mul(weight)?.broadcast_add(bias)?)
}

#[cfg(test)]
mod tests {
    use eqim::close::{Tolerance, close, values};

    use super::*;

    /// The expected features come from timm with the same weights (`tests/fixtures/make_dino.py`).
    #[test]
    fn features_are_those_of_pytorch() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let dino = Dino::open(&folder.join("dino.safetensors"), &Device::Cpu).unwrap();
        let expected = candle_core::safetensors::load(folder.join("dino_expected.safetensors"), &Device::Cpu).unwrap();
        let found = dino.features(&expected["image"], 16, 16).unwrap();
        assert_eq!(found.dims(), expected["features"].dims());
        let [found, expected] = [&found, &expected["features"]].map(|tensor| values(tensor).unwrap());
        println!("{:e}", close(&found, &expected, Tolerance::SAMPLING).unwrap());
    }

    #[test]
    fn a_missing_tensor_is_named() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let error = Dino::open(&folder.join("dino_expected.safetensors"), &Device::Cpu).unwrap_err();
        assert!(error.is_input() && error.to_string().contains("cls_token"), "{error}");
    }
}
