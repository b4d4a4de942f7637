//! Distance of solvers with few evaluations from many steps of Euler's method.

use std::fmt::Write;

use eqim::Result;
use eqim::close::relative_error;
use eqim::engine::Engine;
use eqim::generate::generate;
use eqim::picture::quality::psnr;
use eqim::request::Request;
use eqim::request::solver::Solver;
use eqim_cli::table;
use ndarray::{Array3, Array4, s};
use serde::Serialize;

/// Numbers of evaluations to try.
const EVALUATIONS: [usize; 7] = [5, 10, 15, 20, 25, 50, 100];
/// Number of Euler steps that count as the exact solution.
const MANY: usize = 1000;

/// Result of a solver with a number of steps.
#[derive(Clone, Debug, Serialize)]
pub struct Solved {
    /// Solver of the ODE.
    pub solver: Solver,
    /// Number of steps.
    pub steps: usize,
    /// Evaluations of the velocity per token.
    pub evaluations: usize,
    /// Distance from the tokens of 1000 Euler steps, relative to their norm.
    pub tokens: f32,
    /// PSNR of the image against the image of 1000 Euler steps, in dB; `None` if the images are equal.
    pub psnr_exact: Option<f32>,
    /// PSNR of the image against the image of the model's number of Euler steps, in dB; `None` if the images are equal.
    pub psnr_default: Option<f32>,
}

/// Runs a request with all solvers. `progress` receives a description of the next run.
///
/// # Errors
/// If the engine fails.
pub fn solve(engine: &dyn Engine, request: &Request, progress: &mut dyn FnMut(String)) -> Result<Vec<Solved>> {
    let mut run = |solver: Solver, steps: usize| -> Result<(Array3<f32>, Array4<f32>)> {
        progress(format!("{solver}, {steps} steps"));
        let tokens = generate(engine, &Request { solver, steps, ..request.clone() }, |_| {})?.tokens;
        let image = engine.decode_tokens(tokens.slice(s![..1, .., ..]))?;
        Ok((tokens, image))
    };
    let (exact, exact_image) = run(Solver::Euler, MANY)?;
    let (_, default_image) = run(Solver::Euler, engine.config().generator.steps)?;
    let mut all = vec![];
    for solver in Solver::ALL {
        for evaluations in EVALUATIONS {
            let Some(steps) = (1..=evaluations).rev().find(|&steps| solver.evaluations(steps) <= evaluations) else {
                continue;
            };
            let (tokens, image) = run(solver, steps)?;
            all.push(Solved {
                solver,
                steps,
                evaluations: solver.evaluations(steps),
                tokens: relative_error(&tokens, &exact),
                psnr_exact: psnr(image.view(), exact_image.view()),
                psnr_default: psnr(image.view(), default_image.view()),
            });
        }
    }
    Ok(all)
}

impl Solved {
    /// Writes the results as a table in Markdown.
    pub fn table(all: &[Self], text: &mut String) {
        if all.is_empty() {
            return;
        }
        let decibel = |value: &Option<f32>| value.map_or("same".into(), |value| format!("{value:.1}"));
        let row = |Self { solver, steps, evaluations, tokens, psnr_exact, psnr_default }: &Self| {
            let tokens = format!("{:.3} %", 100.0 * tokens);
            let (exact, default) = (decibel(psnr_exact), decibel(psnr_default));
            vec![solver.to_string(), steps.to_string(), evaluations.to_string(), tokens, exact, default]
        };
        let tokens = format!("tokens from {MANY} steps");
        let head = ["solver", "steps", "evaluations", &tokens, "image, dB", "from the default's, dB"];
        let _ = writeln!(text, "{}", table::markdown(&head, all.iter().map(row)));
    }
}
