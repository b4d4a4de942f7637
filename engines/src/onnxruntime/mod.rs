//! The engine that runs the graphs of a bundle on the execution providers of ONNX Runtime.

mod device;
mod failure;
mod graphs;
mod kernels;
mod network;
mod placement;
mod ports;
mod provider;
mod register;
mod runtime;
mod session;
mod values;
mod version;

use std::path::Path;
use std::time::Duration;

use eqim::bundle::{Bundle, Precision};
use eqim::engine::{Engine, Session};
use eqim::model::{Sizes, Stage};
use eqim::request::solver::Tableau;
use eqim::{Config, Error, Result, ResultExt};
use half::f16;
use ndarray::{Array2, Array3, Array4, ArrayView, ArrayView2, ArrayView3, ArrayView4};

use graphs::Graphs;
pub use network::ImageNetwork;
pub use provider::{Provider, ProviderName, Providers};
pub use runtime::{Graph, GraphOptions, Runtime};
use session::OrtSession;
pub use values::{DynValue, float_input, float_output, half_input, integer_input};

/// A bundle on ONNX Runtime.
pub struct OrtEngine {
    graphs: Graphs,
    name: String,
}

impl OrtEngine {
    /// Creates an engine for a bundle with the given library. The graph of the encoder is loaded when it is first used.
    ///
    /// # Errors
    /// [`Error::run`] if the library or a graph cannot be loaded; [`Error::input`] if a graph is not the one of its stage,
    /// or if an execution provider is missing or does not run all nodes.
    pub fn new(bundle: &Bundle, library: &Path, threads: Option<usize>, providers: &Providers) -> Result<Self> {
        let name = if providers.is_cpu() { "ONNX Runtime".into() } else { format!("ONNX Runtime with {providers}") };
        Ok(Self { graphs: Graphs::new(bundle, library, threads, providers)?, name })
    }
}

impl Engine for OrtEngine {
    fn config(&self) -> &Config {
        self.graphs.config()
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn opening(&self) -> Vec<(Stage, Duration)> {
        self.graphs.opening()
    }

    fn session(&self) -> Result<Box<dyn Session + '_>> {
        match self.graphs.bundle.manifest.precision {
            Precision::Fp32 => Ok(Box::new(OrtSession::<f32>::new(&self.graphs))),
            Precision::Fp16 => Ok(Box::new(OrtSession::<f16>::new(&self.graphs))),
            Precision::Bf16 => Err(Error::run("cache", "ONNX Runtime's CPU has no kernels for BF16")),
        }
    }

    fn sample(
        &self,
        z: ArrayView2<f32>,
        noise: ArrayView2<f32>,
        guidance: &[f32],
        tableau: &Tableau,
    ) -> Result<Array2<f32>> {
        let updates = ArrayView::from_shape((tableau.evaluations(), 2, 3), &tableau.updates);
        let updates = updates.or_run("updates")?;
        let inputs = [
            float_input(z)?.into(),
            float_input(noise)?.into(),
            float_input(ArrayView::from(guidance))?.into(),
            float_input(ArrayView::from(&tableau.times))?.into(),
            float_input(updates)?.into(),
        ];
        self.graphs.run_one(Stage::Flow, &inputs, &Sizes::of_batch(noise.nrows()))
    }

    fn decode(&self, latents: ArrayView3<f32>) -> Result<Array4<f32>> {
        let (batch, tokens, _) = latents.dim();
        let (width, _) = self.config().image_size(tokens);
        let sizes = Sizes { tokens, width, ..Sizes::of_batch(batch) };
        self.graphs.run_one(Stage::Decoder, &[float_input(latents)?.into()], &sizes)
    }

    fn encode(&self, images: ArrayView4<f32>) -> Result<Array3<f32>> {
        let (batch, _, _, width) = images.dim();
        let tokens = width / self.config().tokenizer.token_width();
        let sizes = Sizes { tokens, width, ..Sizes::of_batch(batch) };
        self.graphs.run_one(Stage::Encoder, &[float_input(images)?.into()], &sizes)
    }
}
