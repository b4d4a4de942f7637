//! The algorithm of the reference on Candle. It runs the whole sequence for every token, and computes the modulations
//! inside the loop of the ODE (`sample_tokens` in `generator/equ_modeling.py`). Bundles are compared with it where
//! PyTorch is not available.

use candle_core::{Device, Tensor};
use eqim::engine::candle::{CandleEngine, to_array, to_tensor};
use eqim::engine::{Engine, Session};
use eqim::model::{flow, transformer};
use eqim::ops::eager::Eager;
use eqim::request::solver::Tableau;
use eqim::request::timing::StageTimes;
use eqim::request::{PreparedRequest, check_finite};
use eqim::{Config, Error, Result};
use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView3, ArrayView4, Axis, Ix3, concatenate, s};

/// The model on Candle, with the algorithm of the reference.
pub struct Reference(pub CandleEngine);

impl Engine for Reference {
    fn config(&self) -> &Config {
        self.0.config()
    }

    fn name(&self) -> &str {
        "the reference's algorithm on Candle"
    }

    fn session(&self) -> Result<Box<dyn Session + '_>> {
        Err(Error::run("reference", "has no cache: it runs whole rollouts"))
    }

    fn sample(
        &self,
        z: ArrayView2<f32>,
        noise: ArrayView2<f32>,
        guidance: &[f32],
        tableau: &Tableau,
    ) -> Result<Array2<f32>> {
        let g = &self.config().generator;
        let mut o = Eager::new(self.0.weights());
        let streams = z.dim().0 / noise.dim().0;
        let (z, guidance) = (to_tensor(z)?, Tensor::from_slice(guidance, guidance.len(), &Device::Cpu)?);
        let mut x = noise.to_owned();
        let mut held = x.clone();
        for (&t, u) in tableau.times.iter().zip(tableau.updates.as_chunks::<6>().0) {
            let rows = to_tensor(concatenate(Axis(0), &vec![x.view(); streams]).map_err(shape)?.view())?;
            let t = Tensor::full(t, rows.dim(0)?, &Device::Cpu)?;
            let v = flow::velocity(&mut o, g, &rows, &t, &z)?;
            let v = v.reshape((streams, noise.dim().0, g.embed))?;
            let v: Array2<f32> = to_array(&flow::guide(&mut o, g, &v, &guidance)?)?;
            let next = &x * u[0] + &held * u[1] + &v * u[2];
            held = &x * u[3] + &held * u[4] + &v * u[5];
            x = next;
        }
        Ok(x)
    }

    fn decode(&self, latents: ArrayView3<f32>) -> Result<Array4<f32>> {
        self.0.decode(latents)
    }

    fn encode(&self, images: ArrayView4<f32>) -> Result<Array3<f32>> {
        self.0.encode(images)
    }

    fn fused_rollout(
        &self,
        prepared: &PreparedRequest,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Option<(Array3<f32>, StageTimes)>> {
        let g = &self.config().generator;
        let (n, batch) = (prepared.tokens, prepared.batch());
        let labels: Vec<i64> = prepared.conditions(self.config(), 0).iter().map(|condition| condition.label).collect();
        let streams = labels.len() / batch;
        let labels = Tensor::from_slice(&labels, labels.len(), &Device::Cpu)?;
        let mut tokens = Array3::zeros((batch, n, g.embed));
        tokens.slice_mut(s![.., ..prepared.given(), ..]).assign(&prepared.prefix);
        let mut times = StageTimes::default();
        for index in prepared.given()..n {
            let z = times.step.time(|| -> Result<Array3<f32>> {
                let streams = vec![tokens.view(); streams];
                let rows = to_tensor(concatenate(Axis(0), &streams).map_err(shape)?.view())?;
                let rows = rows.reshape(((), g.embed))?;
                let z = transformer::teacher_forced(&mut Eager::new(self.0.weights()), g, &labels, &rows, n, 0)?;
                to_array::<Ix3>(&z.reshape(((), n, g.dim))?)
            })?;
            let (z, noise) =
                (z.index_axis(Axis(1), index), prepared.noise.index_axis(Axis(1), index - prepared.given()));
            let guidance = vec![prepared.guidance[index]; batch];
            let token = times.flow.time(|| self.sample(z, noise, &guidance, &prepared.sampling.tableau))?;
            check_finite(self.name(), index, token.view())?;
            tokens.index_axis_mut(Axis(1), index).assign(&token);
            progress(index + 1);
        }
        Ok(Some((tokens, times)))
    }
}

fn shape(error: ndarray::ShapeError) -> Error {
    Error::run("reference", error)
}
