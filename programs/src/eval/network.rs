//! The networks of `eqim-eval`.

use std::path::PathBuf;

use clap::Args;
use eqim::Result;
use eqim::digest::sha256_of;
use eqim::{ResultExt, efficientnet, files};
use eqim_engines::native;
use eqim_engines::onnxruntime::{ImageNetwork, Runtime};
use eqim_evaluation::network::{Network, Outputs};
use eqim_evaluation::resize::Protocol;
use eqim_export::features::write_efficientnet;
use ndarray::ArrayView4;

/// Which network makes the features.
#[derive(Args)]
pub struct NetworkOptions {
    /// Network: an ONNX file with one input of images [batch, 3, height, width], 0 to 255, an output `features` and
    /// perhaps `logits`; or the weights of EfficientNet-Lite0 (.pth) [default: the ones that `cargo xtask setup
    /// --training` installed]
    #[arg(long, value_name = "FILE")]
    pub features: Option<PathBuf>,

    /// How images are resized to the size of the network: clean (bicubic with antialiasing, as clean-fid) or legacy
    /// (bilinear without, as TensorFlow 1 and ADM)
    #[arg(long, value_name = "PROTOCOL", default_value_t, value_parser = protocol)]
    pub resize: Protocol,

    /// Number of threads of ONNX Runtime [default: all cores]
    #[arg(id = "network_threads", long = "network-threads", value_name = "N")]
    pub threads: Option<usize>,
}

fn protocol(text: &str) -> std::result::Result<Protocol, &'static str> {
    text.parse().map_err(|_| "expected clean or legacy")
}

/// A network on ONNX Runtime.
pub struct OnnxNetwork {
    network: ImageNetwork,
    name: String,
    sha256: String,
}

impl OnnxNetwork {
    /// Loads the network.
    ///
    /// # Errors
    /// [`eqim::Error::input`] if the file is not such a network; [`eqim::Error::run`] if there is none, or no ONNX Runtime.
    pub fn open(options: &NetworkOptions) -> Result<Self> {
        let path = options.features.clone().map_or_else(native::find_efficientnet, Ok)?;
        let sha256 = sha256_of(files::open(&path)?).or_input(path.display())?.1;
        let runtime = Runtime::load(&native::find_onnxruntime()?, options.threads)?;
        if path.extension().is_some_and(|extension| extension == "onnx") {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Ok(Self { network: ImageNetwork::open(&path, runtime, options.threads)?, name, sha256 });
        }
        let folder = tempfile::tempdir().or_run("temporary folder")?;
        let graph = write_efficientnet(&path, folder.path())?;
        let width = efficientnet::description_width();
        let name = format!("EfficientNet-Lite0 ({width} pooled features of three depths)");
        Ok(Self { network: ImageNetwork::open(&graph, runtime, options.threads)?, name, sha256 })
    }
}

impl Network for OnnxNetwork {
    fn name(&self) -> &str {
        &self.name
    }

    fn identity(&self) -> &str {
        &self.sha256
    }

    fn size(&self) -> Option<(usize, usize)> {
        self.network.size()
    }

    fn run(&self, images: ArrayView4<f32>) -> Result<Outputs> {
        let (features, logits) = self.network.run(images)?;
        Ok(Outputs { features, logits })
    }
}
