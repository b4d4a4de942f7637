//! Time and distance of solvers with few evaluations from many steps of Euler's method.

use std::fmt::Write;
use std::path::Path;
use std::time::Instant;

use eqim::close::relative_error;
use eqim::picture::quality::psnr;
use eqim::request::Request;
use eqim::request::solver::Solver;
use eqim::{Error, Result};
use eqim_cli::chart::{self, Chart, Scale, Series, Style};
use eqim_cli::table;
use ndarray::{Array3, Array4, s};
use serde::Serialize;

use super::contest::Candidate;
use super::workload::Workload;

/// Numbers of evaluations to try.
const EVALUATIONS: [usize; 7] = [5, 10, 15, 20, 25, 50, 100];
/// Number of Euler steps that count as the exact solution.
const MANY: usize = 1000;

/// Result of a candidate with a solver and a number of steps.
#[derive(Clone, Debug, Serialize)]
pub struct Solved {
    /// Name of the candidate.
    pub name: String,
    /// Solver of the ODE.
    pub solver: Solver,
    /// Number of steps.
    pub steps: usize,
    /// Evaluations of the velocity per token.
    pub evaluations: usize,
    /// Seconds per token of a batch, without decoding, of one run.
    pub seconds: f64,
    /// Distance from the tokens of 1000 Euler steps of the first bundle, relative to their norm.
    pub tokens: f32,
    /// PSNR of the image against the image of 1000 Euler steps, in dB; `None` if the images are equal. The first bundle
    /// decodes all images.
    pub psnr_exact: Option<f32>,
    /// PSNR of the image against the image of the model's number of Euler steps, in dB; `None` if the images are equal.
    pub psnr_default: Option<f32>,
}

/// Runs a request on every bundle with all solvers, and on every reference with its own. `seed` is the seed of the noise.
/// `progress` receives a description of the next run.
///
/// # Errors
/// If a candidate fails.
pub fn solve(
    candidates: &[Candidate],
    request: &Request,
    seed: u64,
    progress: &mut dyn FnMut(String),
) -> Result<Vec<Solved>> {
    let first = candidates.iter().find_map(|candidate| Some((candidate, candidate.bundle_engine()?)));
    let (first, engine) = first.ok_or_else(|| Error::run("solvers", "no bundle is measured"))?;
    let mut run = |candidate: &Candidate, solver: Solver, steps: usize| -> Result<(Array3<f32>, f64)> {
        progress(format!("{}: {solver}, {steps} steps", candidate.name()));
        let request = Request { solver, steps, ..request.clone() };
        let start = Instant::now();
        let tokens = candidate.run(&Workload { request, seed, decode: false }, None)?.tokens;
        let seconds = start.elapsed().as_secs_f64() / tokens.dim().1 as f64;
        Ok((tokens, seconds))
    };
    let image = |tokens: &Array3<f32>| -> Result<Array4<f32>> { engine.decode_tokens(tokens.slice(s![..1, .., ..])) };
    let default = engine.config().generator.steps;
    let exact = run(first, Solver::Euler, MANY)?.0;
    let [exact_image, default_image] = [image(&exact)?, image(&run(first, Solver::Euler, default)?.0)?];
    let mut all = vec![];
    for candidate in candidates {
        // The first run of a candidate allocates memory and reads files.
        run(candidate, Solver::Euler, 1)?;
        let ways = if candidate.is_reference() { vec![(Solver::Euler, default)] } else { ways() };
        for (solver, steps) in ways {
            let (tokens, seconds) = run(candidate, solver, steps)?;
            let image = image(&tokens)?;
            all.push(Solved {
                name: candidate.name(),
                solver,
                steps,
                evaluations: solver.evaluations(steps),
                seconds,
                tokens: relative_error(&tokens, &exact),
                psnr_exact: psnr(image.view(), exact_image.view()),
                psnr_default: psnr(image.view(), default_image.view()),
            });
        }
    }
    Ok(all)
}

/// Every solver, with the largest numbers of steps that take at most the numbers of evaluations to try.
fn ways() -> Vec<(Solver, usize)> {
    let steps = |solver: Solver, most: usize| (1..=most).rev().find(|&steps| solver.evaluations(steps) <= most);
    let all = Solver::ALL.into_iter().flat_map(|solver| EVALUATIONS.map(|most| Some((solver, steps(solver, most)?))));
    all.flatten().collect()
}

impl Solved {
    /// Writes the results as a table in Markdown.
    pub fn table(all: &[Self], text: &mut String) {
        let Some(first) = all.first() else { return };
        let several = all.iter().any(|solved| solved.name != first.name);
        let decibel = |value: &Option<f32>| value.map_or("same".into(), |value| format!("{value:.1}"));
        let row = |solved: &Self| {
            let Self { name, solver, steps, evaluations, seconds, tokens, psnr_exact, psnr_default } = solved;
            let name = several.then(|| name.clone());
            let (seconds, tokens) = (format!("{seconds:.4}"), format!("{:.3} %", 100.0 * tokens));
            let (exact, default) = (decibel(psnr_exact), decibel(psnr_default));
            let cells =
                [solver.to_string(), steps.to_string(), evaluations.to_string(), seconds, tokens, exact, default];
            name.into_iter().chain(cells).collect::<Vec<_>>()
        };
        let tokens = format!("tokens from {MANY} steps");
        let columns = ["solver", "steps", "evaluations", "s per token", &tokens, "image, dB", "from the default's, dB"];
        let head: Vec<&str> = several.then_some("candidate").into_iter().chain(columns).collect();
        let _ = writeln!(text, "{}", table::markdown(&head, all.iter().map(row)));
    }

    /// Draws time and distance of all results to a PNG: a series per candidate, with a line through its best results.
    ///
    /// # Errors
    /// [`Error::run`] if the file cannot be written.
    pub fn draw(all: &[Self], path: &Path) -> Result<()> {
        let mut series: Vec<Series> = vec![];
        for Self { name, seconds, tokens, .. } in all {
            let point = (*seconds, f64::from(*tokens));
            match series.last_mut().filter(|last| last.name == name) {
                Some(last) => last.points.push(point),
                None => series.push(Series { name, points: vec![point], style: Style::Front }),
            }
        }
        let y = &format!("distance of the tokens from {MANY} Euler steps");
        let title = "Time and distance of solvers";
        chart::draw(path, &[Chart { title, x: "seconds per token", x_scale: Scale::Logarithmic, y, series }])
    }
}
