//! Solvers of the flow head's ODE, from noise at time 1 to a token at time 0.
//!
//! Every solver evaluates the velocity `v` at the point `x`, then updates `x` and a value `p`, which is kept for later
//! evaluations. The updates are linear combinations of `x`, `p` and `v`. A [`Tableau`] lists them, so that one graph
//! runs every solver.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// An ODE solver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Solver {
    /// Euler's method, one evaluation per step, as in the reference.
    #[default]
    Euler,
    /// The midpoint method, two evaluations per step.
    Midpoint,
    /// Heun's method, two evaluations per step but one in the last step, as in the reference's `diffusion/flows.py`.
    Heun,
    /// The second-order Adams–Bashforth method, one evaluation per step. It begins with a step of Euler's method.
    Ab2,
    /// DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) for a path of straight lines, one evaluation per step. It begins
    /// with two steps and ends with one step of Euler's method.
    Dpm2,
}

impl Solver {
    /// All solvers.
    pub const ALL: [Self; 5] = [Self::Euler, Self::Midpoint, Self::Heun, Self::Ab2, Self::Dpm2];

    /// Name of the solver on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Euler => "euler",
            Self::Midpoint => "midpoint",
            Self::Heun => "heun",
            Self::Ab2 => "ab2",
            Self::Dpm2 => "dpm2",
        }
    }

    /// Number of evaluations of the velocity in `steps` steps.
    pub fn evaluations(self, steps: usize) -> usize {
        match self {
            Self::Euler | Self::Ab2 | Self::Dpm2 => steps,
            Self::Midpoint => 2 * steps,
            Self::Heun => 2 * steps - 1,
        }
    }
}

impl fmt::Display for Solver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Solver {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|solver| solver.name() == name)
            .ok_or_else(|| Error::setting("solver", format!("is {name}, expected one of {}", names())))
    }
}

/// The evaluations and updates of a solver, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tableau {
    /// Times at which the velocity is evaluated, `[evaluations]`, decreasing from 1.
    pub times: Vec<f32>,
    /// The new `x` and the new `p` after each evaluation, as linear combinations of `x`, `p` and `v`: their factors,
    /// `[evaluations, 2, 3]`.
    pub updates: Vec<f32>,
}

/// A sum of `x`, `p` and `v`, by their factors.
type Sum = [f64; 3];

/// The sums that are equal to `x`, to `p` and to `v`.
const X: Sum = [1.0, 0.0, 0.0];
const P: Sum = [0.0, 1.0, 0.0];
const V: Sum = [0.0, 0.0, 1.0];

/// `sum` plus `factor` times the velocity.
fn along(sum: Sum, factor: f64) -> Sum {
    [sum[0], sum[1], sum[2] + factor]
}

impl Tableau {
    /// The tableau of `steps` equal steps.
    pub fn new(solver: Solver, steps: usize) -> Self {
        let mut tableau = Self::default();
        let dt = -1.0 / steps as f64;
        let time = |i: usize| (steps - i) as f64 / steps as f64;
        for i in 0..steps {
            let (t, first, last) = (time(i), i == 0, i + 1 == steps);
            match solver {
                Solver::Euler => tableau.push(t, along(X, dt), P),
                Solver::Midpoint => {
                    tableau.push(t, along(X, dt / 2.0), X);
                    tableau.push(t + dt / 2.0, along(P, dt), P);
                }
                Solver::Heun if last => tableau.push(t, along(X, dt), P),
                Solver::Heun => {
                    tableau.push(t, along(X, dt), along(X, dt / 2.0));
                    tableau.push(time(i + 1), along(P, dt / 2.0), P);
                }
                Solver::Ab2 if first => tableau.push(t, along(X, dt), V),
                Solver::Ab2 => tableau.push(t, [1.0, -dt / 2.0, 1.5 * dt], V),
                Solver::Dpm2 => {
                    let correction = if i < 2 || last { 0.0 } else { correction(time(i - 1), t, time(i + 1)) };
                    tableau.push(t, extrapolated(t, time(i + 1), correction), along(X, -t));
                }
            }
        }
        tableau
    }

    fn push(&mut self, time: f64, x: Sum, p: Sum) {
        self.times.push(time as f32);
        self.updates.extend(x.iter().chain(&p).map(|&factor| factor as f32));
    }

    /// Number of evaluations of the velocity.
    pub fn evaluations(&self) -> usize {
        self.times.len()
    }
}

/// Factor by which DPM-Solver++(2M) extrapolates the predicted token from the previous prediction: `h / (2 h_before)`.
/// The values h are steps of half the logarithm of the signal-to-noise ratio, `ln((1-t)/t)`.
fn correction(before: f64, t: f64, next: f64) -> f64 {
    let lambda = |t: f64| ((1.0 - t) / t).ln();
    (lambda(next) - lambda(t)) / (2.0 * (lambda(t) - lambda(before)))
}

/// The next point of DPM-Solver++(2M). `x - t·v` is the predicted token, and `p` is the previous prediction.
fn extrapolated(t: f64, next: f64, correction: f64) -> Sum {
    let kept = next / t;
    let token = (1.0 - next) - (1.0 - t) * kept;
    let now = token * (1.0 + correction);
    [kept + now, -token * correction, -now * t]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Integrates `velocity(x, t)` from `x` at time 1.
    fn integrate(solver: Solver, steps: usize, mut x: f64, velocity: impl Fn(f64, f64) -> f64) -> f64 {
        let tableau = Tableau::new(solver, steps);
        assert_eq!(tableau.evaluations(), solver.evaluations(steps));
        let mut p = f64::from(f32::MAX);
        for (&t, update) in tableau.times.iter().zip(tableau.updates.as_chunks::<6>().0) {
            let u = update.map(f64::from);
            let v = velocity(x, f64::from(t));
            (x, p) = (u[0] * x + u[1] * p + u[2] * v, u[3] * x + u[4] * p + u[5] * v);
        }
        x
    }

    #[test]
    fn errors_shrink_as_the_order_says() {
        // dx/dt = x (1 + t) has the solution x(0) = x(1) exp(-3/2).
        let exact = (-1.5f64).exp();
        for solver in Solver::ALL {
            let error = |steps| (integrate(solver, steps, 1.0, |x, t| x * (1.0 + t)) - exact).abs();
            let ratio = error(32) / error(64);
            let expected = match solver {
                Solver::Euler => 1.9..2.1,
                // On the solver's logarithmic scale, the steps next to both ends do not shrink.
                Solver::Dpm2 => 2.8..4.2,
                Solver::Midpoint | Solver::Heun | Solver::Ab2 => 3.8..4.4,
            };
            assert!(expected.contains(&ratio), "{solver}: {ratio}, expected {expected:?}");
        }
    }

    #[test]
    fn every_solver_is_exact_on_a_straight_line() {
        for solver in Solver::ALL {
            for steps in [1, 2, 3, 7] {
                let end = integrate(solver, steps, 0.5, |_, _| 2.0);
                assert!((end - -1.5).abs() < 1e-6, "{solver}, {steps} steps: {end}");
            }
        }
    }

    #[test]
    fn names() {
        for solver in Solver::ALL {
            assert_eq!(solver.to_string().parse::<Solver>().unwrap(), solver);
        }
        assert!("rk4".parse::<Solver>().unwrap_err().to_string().contains("euler, midpoint, heun, ab2, dpm2"));
    }
}
