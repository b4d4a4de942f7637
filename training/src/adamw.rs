//! AdamW with a moving average of the parameters (Loshchilov & Hutter 2019; PyTorch's `torch.optim.AdamW`).

use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Tensor, Var};
use eqim::Result;
use eqim::ops::kernels::storage::{values, values_mut};

/// Settings of one update.
pub struct Update<'a> {
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Decay rates of the moments.
    pub betas: [f64; 2],
    /// Weight decay of the parameters for which `decays` is true.
    pub weight_decay: f64,
    /// Whether weight decay applies to a parameter, from its name and number of axes.
    pub decays: &'a (dyn Fn(&str, usize) -> bool + Sync),
    /// Largest global norm of the gradients; gradients with a larger norm are scaled down to it.
    pub clip: Option<f64>,
    /// Decay rate of the moving average.
    pub average: f64,
}

const EPS: f64 = 1e-8;
// As in `torch.nn.utils.clip_grad_norm_`.
const CLIP_EPS: f64 = 1e-6;

impl Update<'_> {
    /// Factor of gradients with this global norm.
    pub fn clipping(&self, norm: f64) -> f64 {
        self.clip.map_or(1.0, |clip| (clip / (norm + CLIP_EPS)).min(1.0))
    }
}

/// What the updates of a parameter keep: the moments of its gradients, and its moving average.
#[derive(Debug)]
pub struct Kept {
    /// Moving average of the gradients.
    pub first_moment: Tensor,
    /// Moving average of the squares of the gradients.
    pub second_moment: Tensor,
    /// Moving average of the parameter.
    pub average: Tensor,
}

impl Kept {
    /// Moments of zero, and the value as its average.
    ///
    /// # Errors
    /// If a Candle operation fails.
    pub fn new(value: &Var) -> Result<Self> {
        let [first_moment, second_moment] = [value.zeros_like()?, value.zeros_like()?];
        Ok(Self { first_moment, second_moment, average: value.as_tensor().copy()? })
    }

    /// Update number `count`, from 1, of a parameter named `name`. Its gradient is multiplied by `factor`; without a gradient
    /// only its average changes.
    ///
    /// # Errors
    /// If a Candle operation fails.
    pub fn update(
        &mut self,
        (name, value): (&str, &Var),
        gradient: Option<&Tensor>,
        (update, factor, count): (&Update, f64, usize),
    ) -> Result<()> {
        let Update { learning_rate, betas: [beta1, beta2], weight_decay, decays, average, .. } = update;
        let bias = |beta: f64| 1.0 - beta.powi(count as i32);
        let decay = if decays(name, value.rank()) { learning_rate * weight_decay } else { 0.0 };
        let descent = Descent { keep: 1.0 - decay, rate: learning_rate / bias(*beta1), scale: 1.0 / bias(*beta2) };
        let first = Blend { keep: *beta1, add: factor * (1.0 - beta1), is_squared: false };
        let second = Blend { keep: *beta2, add: factor * factor * (1.0 - beta2), is_squared: true };
        let blend = Blend { keep: *average, add: 1.0 - average, is_squared: false };
        if let Some(gradient) = gradient {
            let gradient = gradient.contiguous()?;
            first.apply(&mut self.first_moment, &gradient)?;
            second.apply(&mut self.second_moment, &gradient)?;
            descent.apply(value, &self.first_moment, &self.second_moment)?;
        }
        blend.apply(&mut self.average, value)
    }
}

/// `a = keep·a + add·b`, or `b²` instead of `b`.
struct Blend {
    keep: f64,
    add: f64,
    is_squared: bool,
}

impl Blend {
    fn apply(&self, a: &mut Tensor, b: &Tensor) -> Result<()> {
        if a.device().is_cpu() {
            return Ok(a.inplace_op2(b, self)?);
        }
        let b = if self.is_squared { b.sqr()? } else { b.clone() };
        *a = ((&*a * self.keep)? + (b * self.add)?)?.detach();
        Ok(())
    }
}

/// `x = keep·x - rate·first / (√(scale·second) + ε)`
struct Descent {
    keep: f64,
    rate: f64,
    scale: f64,
}

impl Descent {
    fn apply(&self, x: &Var, first: &Tensor, second: &Tensor) -> Result<()> {
        if x.device().is_cpu() {
            return Ok(x.inplace_op3(first, second, self)?);
        }
        let spread = ((second * self.scale)?.sqrt()? + EPS)?;
        let new = ((x.as_tensor() * self.keep)? - ((first * self.rate)? / spread)?)?;
        Ok(x.set(&new.detach())?)
    }
}

impl InplaceOp2 for Blend {
    fn name(&self) -> &'static str {
        "blend"
    }

    fn cpu_fwd(&self, a: &mut CpuStorage, of_a: &Layout, b: &CpuStorage, of_b: &Layout) -> candle_core::Result<()> {
        let (a, b) = (values_mut(a, of_a)?, values(b, of_b)?);
        let (keep, add) = (self.keep as f32, self.add as f32);
        match self.is_squared {
            true => a.iter_mut().zip(b).for_each(|(a, b)| *a = keep * *a + add * (b * b)),
            false => a.iter_mut().zip(b).for_each(|(a, b)| *a = keep * *a + add * b),
        }
        Ok(())
    }
}

impl InplaceOp3 for Descent {
    fn name(&self) -> &'static str {
        "descent"
    }

    fn cpu_fwd(
        &self,
        x: &mut CpuStorage,
        of_x: &Layout,
        first: &CpuStorage,
        of_first: &Layout,
        second: &CpuStorage,
        of_second: &Layout,
    ) -> candle_core::Result<()> {
        let x = values_mut(x, of_x)?;
        let (first, second) = (values(first, of_first)?, values(second, of_second)?);
        let [keep, rate, scale, eps] = [self.keep, self.rate, self.scale, EPS].map(|value| value as f32);
        for ((x, first), second) in x.iter_mut().zip(first).zip(second) {
            *x = keep * *x - rate * first / ((scale * second).sqrt() + eps);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use eqim::close::largest_difference;

    use super::*;

    /// The formulas of AdamW, step by step in double precision.
    #[test]
    fn updates_are_those_of_the_formulas() {
        let update = Update {
            learning_rate: 0.01,
            betas: [0.9, 0.95],
            weight_decay: 0.1,
            decays: &|name, axes| name == "decays" && axes == 1,
            clip: None,
            average: 0.8,
        };
        for (name, decay) in [("decays", 0.001), ("stays", 0.0)] {
            let start = [0.5f64, -1.0, 2.0, 0.0];
            let (mut x, mut average, mut m, mut v) = (start, start, [0.0; 4], [0.0; 4]);
            let value = Var::from_tensor(&Tensor::new(&start.map(|x| x as f32), &Device::Cpu).unwrap()).unwrap();
            let mut kept = Kept::new(&value).unwrap();
            for count in 1..=3 {
                let gradient = [0.1, -0.3, 0.0, 1e-6].map(|x| x * count as f64);
                for index in 0..4 {
                    let gradient = gradient[index] * 0.5;
                    m[index] = 0.9 * m[index] + 0.1 * gradient;
                    v[index] = 0.95 * v[index] + 0.05 * gradient * gradient;
                    let [first, second] =
                        [m[index] / (1.0 - 0.9f64.powi(count)), v[index] / (1.0 - 0.95f64.powi(count))];
                    x[index] = x[index] * (1.0 - decay) - 0.01 * first / (second.sqrt() + 1e-8);
                    average[index] = 0.8 * average[index] + 0.2 * x[index];
                }
                let gradient = Tensor::new(&gradient.map(|x| x as f32), &Device::Cpu).unwrap();
                kept.update((name, &value), Some(&gradient), (&update, 0.5, count as usize)).unwrap();
            }
            // Without a gradient only the average changes.
            kept.update((name, &value), None, (&update, 0.5, 4)).unwrap();
            average.iter_mut().zip(x).for_each(|(average, x)| *average = 0.8 * *average + 0.2 * x);
            for (found, expected) in [(value.as_tensor(), x), (&kept.average, average), (&kept.first_moment, m)] {
                let difference = largest_difference(&found.to_vec1::<f32>().unwrap(), &expected.map(|x| x as f32));
                assert!(difference <= 1e-6, "{name}: {found}, expected {expected:?}");
            }
        }
    }
}
