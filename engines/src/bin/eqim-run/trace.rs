//! `eqim-run --trace`: what each token means, as pictures. Tokens take the places of random ones from left to right, and the
//! image is decoded after each (the paper's and its reference's `demo/token_meaning.ipynb`): first those that were generated,
//! then those of the encoder.

use std::path::Path;

use eqim::engine::Engine;
use eqim::picture::animation;
use eqim::picture::{self, Side};
use eqim::request::random::TorchRng;
use eqim::request::timing::CallTimes;
use eqim::request::{Generated, Request};
use eqim::{Error, Result, ResultExt, files};
use ndarray::{Array2, Array3, ArrayView1, ArrayView2, Axis, s};
use serde::Serialize;

use super::finish::Finish;
use eqim_cli::Progress;

/// What `trace.json` says.
#[derive(Debug, Serialize)]
struct Trace {
    /// The model's class and seed stand in the run's report; here, each token of its image.
    tokens: Vec<Token>,
    /// Generated tokens in the places of random ones.
    generated: View,
    /// The encoder's tokens in the places of random ones.
    encoded: View,
}

/// A token of the image.
#[derive(Debug, Serialize)]
struct Token {
    index: usize,
    /// Whether it was the prefix's.
    given: bool,
    /// Euclidean.
    norm: f32,
    /// Of the noise that it was sampled from.
    noise_norm: Option<f32>,
    /// Milliseconds of the transformer's step before it, for the whole batch.
    transformer_step_ms: Option<f64>,
    /// Milliseconds of the flow head, for the whole batch.
    flow_sampler_ms: Option<f64>,
}

/// Frames, and what each token changed in them.
#[derive(Debug, Serialize)]
struct View {
    /// What the tokens are of.
    of: String,
    /// The folder of its frames; frame n has n tokens.
    frames: String,
    /// All of them as an animated PNG.
    animation: String,
    /// One a token.
    changes: Vec<Change>,
}

/// What changed in the image when a token came.
#[derive(Debug, Serialize)]
struct Change {
    /// Mean absolute change of a channel in the token's own columns, of 255.
    mean: f32,
    /// The part of the whole image's change that lies in the token's own columns.
    own: f32,
    /// And in those of its neighbours too.
    near: f32,
}

/// A run to trace.
pub struct Traced<'a> {
    /// What ran it.
    pub engine: &'a dyn Engine,
    /// What was asked for.
    pub request: &'a Request,
    /// What came out.
    pub generated: &'a Generated,
    /// The picture of the prefix was encoded to its tokens.
    pub has_picture: bool,
    /// Where images grow.
    pub side: Side,
    /// Seed of the random tokens.
    pub seed: u64,
}

/// Writes the traces of all images of a run to a folder, one in each of its folders where there are several.
///
/// # Errors
/// When the engine fails or a file cannot be written: nothing is left then.
pub fn write(traced: &Traced, folder: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::run_caused(folder.display(), error);
    let beside = files::temporary(0o777).tempdir_in(files::folder(folder)).map_err(failed)?;
    let rows = traced.request.classes.len();
    for row in 0..rows {
        let place = if rows == 1 { beside.path().to_path_buf() } else { beside.path().join(row.to_string()) };
        std::fs::create_dir_all(&place).map_err(failed)?;
        write_row(traced, row, &place)?;
    }
    std::fs::rename(beside.path(), folder).map_err(failed)?;
    // What was renamed is no longer to be removed.
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
            let latent = engine.encode(image.view())?.index_axis_move(Axis(0), 0);
            ("the generated image", latent * engine.config().generator.vae_norm as f32)
        }
    };
    let trace = Trace {
        tokens: token_records(request, generated, row),
        generated: view(traced, folder, "generated", "the generated tokens", tokens)?,
        encoded: view(traced, folder, "encoded", of, encoded.view())?,
    };
    files::write_json(&folder.join("trace.json"), &trace)
}

/// Each token's numbers.
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

/// Writes the frames of tokens `[N, E]` that take the places of random ones.
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

/// What token `index` changed.
fn change(before: &Array3<f32>, after: &Array3<f32>, index: usize, token_width: usize) -> Change {
    let columns = (after - before).mapv(f32::abs).sum_axis(Axis(0)).sum_axis(Axis(0));
    let tokens = columns.len() / token_width;
    let sum = |from: usize, to: usize| columns.slice(s![from * token_width..to.min(tokens) * token_width]).sum();
    let (own, near, all) = (sum(index, index + 1), sum(index.saturating_sub(1), index + 2), columns.sum());
    let values = (after.len() / tokens) as f32;
    // A token that is the random one changes nothing, and all of that in its own columns.
    let part = |sum: f32| if all > 0.0 { sum / all } else { 1.0 };
    Change { mean: own / values * 127.5, own: part(own), near: part(near) }
}
