//! `eqim-run --trace`: shows the effect of each token on the image. Tokens replace random tokens from left to right,
//! and the image is decoded after each replacement, as in the paper and in `demo/token_meaning.ipynb` of the reference.
//! One series uses the generated tokens, a second series uses the tokens of the encoder.

use std::path::Path;

use eqim::engine::Engine;
use eqim::generate::finish::Finish;
use eqim::picture::animation;
use eqim::picture::{self, Side};
use eqim::request::random::TorchRng;
use eqim::request::timing::CallTimes;
use eqim::request::{Generated, Request};
use eqim::temporary::Temporary;
use eqim::{Error, Result, ResultExt, files};
use ndarray::{Array2, Array3, ArrayView1, ArrayView2, Axis, s};
use serde::Serialize;

use eqim_cli::Progress;

/// Content of `trace.json`.
#[derive(Debug, Serialize)]
struct Trace {
    /// Tokens of the image. The class and the seed are in the report of the run.
    tokens: Vec<Token>,
    /// Series in which generated tokens replace random tokens.
    generated: View,
    /// Series in which tokens of the encoder replace random tokens.
    encoded: View,
}

/// A token of the image.
#[derive(Debug, Serialize)]
struct Token {
    index: usize,
    /// Whether the token belongs to the prefix.
    given: bool,
    /// Euclidean norm of the token.
    norm: f32,
    /// Euclidean norm of the noise that the token was sampled from.
    noise_norm: Option<f32>,
    /// Time in milliseconds of the transformer step before the token, for the whole batch.
    transformer_step_ms: Option<f64>,
    /// Time in milliseconds of the flow head, for the whole batch.
    flow_sampler_ms: Option<f64>,
}

/// A series of frames, and the change of the image for each token.
#[derive(Debug, Serialize)]
struct View {
    /// Source of the tokens.
    of: String,
    /// Folder of the frames. In frame n, the first n tokens are replaced.
    frames: String,
    /// File name of the animated PNG with all frames.
    animation: String,
    /// One change per token.
    changes: Vec<Change>,
}

/// Change of the image when a token replaces a random token.
#[derive(Debug, Serialize)]
struct Change {
    /// Mean absolute change of a channel in the columns of the token, on a scale of 0 to 255.
    mean: f32,
    /// Fraction of the change of the whole image that is in the columns of the token.
    own: f32,
    /// The same fraction for the columns of the token and its two neighbours.
    near: f32,
}

/// A run to trace.
pub struct Traced<'a> {
    /// Engine that ran the model.
    pub engine: &'a dyn Engine,
    /// Request of the run.
    pub request: &'a Request,
    /// Result of the run.
    pub generated: &'a Generated,
    /// Whether the prefix was encoded from a picture.
    pub has_picture: bool,
    /// Side on which images grow.
    pub side: Side,
    /// Seed of the random tokens.
    pub seed: u64,
}

/// Writes the traces of all images of a run to a folder. If there are several images, each has a sub-folder.
///
/// # Errors
/// If the engine fails or a file cannot be written. No folder is left in this case.
pub fn write(traced: &Traced, folder: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::run_caused(folder.display(), error);
    let beside = Temporary::new(files::folder(folder), 0o777).map_err(failed)?;
    let rows = traced.request.classes.len();
    for row in 0..rows {
        let place = if rows == 1 { beside.path().to_path_buf() } else { beside.path().join(row.to_string()) };
        std::fs::create_dir_all(&place).map_err(failed)?;
        write_row(traced, row, &place)?;
    }
    std::fs::rename(beside.path(), folder).map_err(failed)?;
    // The folder has been renamed, so it must not be removed.
    let _ = beside.keep();
    Ok(())
}

fn write_row(traced: &Traced, row: usize, folder: &Path) -> Result<()> {
    let Traced { engine, request, generated, .. } = *traced;
    let tokens = generated.tokens.index_axis(Axis(0), row);
    let prefix = request.prefix.as_ref().filter(|_| traced.has_picture).map(|prefix| prefix.index_axis(Axis(0), row));
    let (of, encoded) = match prefix {
        Some(tokens) => ("the picture of --prefix", tokens.to_owned()),
        None => {
            let image = engine.decode_tokens(tokens.insert_axis(Axis(0)))?.mapv(|value| value.clamp(-1.0, 1.0));
            ("the generated image", engine.encode_tokens(image.view())?.index_axis_move(Axis(0), 0))
        }
    };
    let trace = Trace {
        tokens: token_records(request, generated, row),
        generated: view(traced, folder, "generated", "the generated tokens", tokens)?,
        encoded: view(traced, folder, "encoded", of, encoded.view())?,
    };
    files::write_json(&folder.join("trace.json"), &trace)
}

/// Values of each token.
fn token_records(request: &Request, generated: &Generated, row: usize) -> Vec<Token> {
    let norm = |values: ArrayView1<f32>| values.dot(&values).sqrt();
    let given = request.tokens - generated.noise.dim().1;
    let times = &generated.times;
    let milliseconds = |calls: &CallTimes, call: Option<usize>| Some(1e3 * calls.0.get(call?)?.as_secs_f64());
    let token = |index: usize| {
        let sampled = index.checked_sub(given);
        Token {
            index,
            given: sampled.is_none(),
            norm: norm(generated.tokens.slice(s![row, index, ..])),
            noise_norm: sampled.map(|sampled| norm(generated.noise.slice(s![row, sampled, ..]))),
            transformer_step_ms: milliseconds(&times.step, index.checked_sub(1)),
            flow_sampler_ms: milliseconds(&times.flow, sampled),
        }
    };
    (0..request.tokens).map(token).collect()
}

/// Writes the frames in which tokens `[N, E]` replace random tokens.
fn view(traced: &Traced, folder: &Path, name: &str, of: &str, tokens: ArrayView2<f32>) -> Result<View> {
    let engine = traced.engine;
    let (count, embed) = tokens.dim();
    let (width, height) = engine.config().image_size(count);
    let token_width = engine.config().tokenizer.token_width();
    let finish = Finish { side: traced.side, token_width, kept: None };
    let frames = folder.join(name);
    std::fs::create_dir(&frames).or_run(frames.display())?;
    let mut latents = Array2::from_shape_vec((count, embed), TorchRng::new(traced.seed).randn(count * embed))
        .or_run("random tokens")?;
    let mut progress = Progress::new("traced", count + 1, "frames");
    let (mut before, mut changes) = (None, vec![]);
    let animation = format!("{name}.png");
    animation::write(&folder.join(&animation), (width, height), count + 1, |index| {
        if let Some(last) = index.checked_sub(1) {
            let latent = &tokens.row(last) / engine.config().generator.vae_norm as f32;
            latents.row_mut(last).assign(&latent);
        }
        let image = engine.decode(latents.view().insert_axis(Axis(0)))?.index_axis_move(Axis(0), 0);
        let image = image.mapv(|value| value.clamp(-1.0, 1.0));
        if let Some(before) = before.replace(image.clone()) {
            changes.push(change(&before, &image, index - 1, token_width));
        }
        let (_, frame) = finish.columns(0, image, width);
        picture::write_png(&frames.join(format!("{index:04}.png")), frame.view())?;
        progress.at(index + 1);
        Ok(frame)
    })?;
    Ok(View { of: of.into(), frames: name.into(), animation, changes })
}

/// Change of the image when token `index` replaces a random token.
fn change(before: &Array3<f32>, after: &Array3<f32>, index: usize, token_width: usize) -> Change {
    let columns = (after - before).mapv(f32::abs).sum_axis(Axis(0)).sum_axis(Axis(0));
    let tokens = columns.len() / token_width;
    let sum = |from: usize, to: usize| columns.slice(s![from * token_width..to.min(tokens) * token_width]).sum();
    let (own, near, all) = (sum(index, index + 1), sum(index.saturating_sub(1), index + 2), columns.sum());
    let values = (after.len() / tokens) as f32;
    // If the token equals the random token, nothing changes. The fraction is then 1.
    let part = |sum: f32| if all > 0.0 { sum / all } else { 1.0 };
    Change { mean: own / values * 127.5, own: part(own), near: part(near) }
}
