//! An image on its way to a client.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use eqim::engine::Engine;
use eqim::generate::finish::Finish;
use eqim::generate::scheduler::Event;
use eqim::picture::{self, Format};
use eqim::request::{Noise, Request};
use ndarray::{Array2, Array3, Axis};
use serde_json::{Value, json};

use crate::app::App;
use crate::failure::Failure;
use crate::model::{Model, Received};
use crate::output::{Pixels, blocking, encode};
use crate::request::Wanted;

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// An image that is being generated for a client.
pub struct Image {
    app: Arc<App>,
    model: Arc<Model>,
    id: String,
    received: Received,
    pixels: Pixels,
    finish: Finish,
    format: Format,
    seed: u64,
    /// The tokens so far, if the image is decoded as a whole in the end.
    tokens: Option<Array2<f32>>,
    begun: Instant,
}

impl Drop for Image {
    fn drop(&mut self) {
        self.app.forget(&self.id);
    }
}

impl Image {
    /// An image of `wanted`, whose events are `received`.
    pub fn new(
        app: &Arc<App>,
        wanted: &Wanted,
        number: usize,
        received: Received,
        request: &Request,
        previewed: bool,
    ) -> Self {
        let config = &wanted.model.manifest.model;
        let id = app.remember(&wanted.model, number);
        let seed = match request.noise {
            Noise::Seed(seed) => seed,
            Noise::Given(_) => 0,
        };
        Self {
            app: Arc::clone(app),
            model: Arc::clone(&wanted.model),
            id,
            received,
            pixels: Pixels::new(config.image_size(request.tokens)),
            finish: wanted.finish.clone(),
            format: wanted.format,
            seed,
            tokens: previewed.then(|| Array2::zeros((0, config.generator.embed))),
            begun: Instant::now(),
        }
    }

    /// Waits for the image. `partial` receives each strip, if strips are wanted.
    pub async fn finish(mut self, partial: Option<impl Fn(Value)>) -> Result<Value, Failure> {
        let (mut strips, metrics) = (0, &Arc::clone(&self.app).metrics);
        let mut last = self.begun;
        loop {
            match self.received.recv().await {
                Some(Event::Token(_, token)) => {
                    metrics.token.observe(last.elapsed().as_secs_f64());
                    last = Instant::now();
                    if let Some(tokens) = &mut self.tokens {
                        tokens.push_row(token.view()).map_err(|error| eqim::Error::run_caused("tokens", error))?;
                    }
                }
                Some(Event::Strip(strip)) => {
                    if strips == 0 {
                        metrics.first_strip.observe(self.begun.elapsed().as_secs_f64());
                    }
                    let (x, columns) = self.finish.columns(strip.x, strip.pixels, self.pixels.size.0);
                    self.pixels.write(x, columns.view());
                    if let Some(partial) = &partial {
                        partial(self.partial(strips, x, columns).await?);
                    }
                    strips += 1;
                }
                Some(Event::Done) => break,
                Some(Event::Failed(error)) => return Err(error.into()),
                None => {
                    return Err(Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "engine_failed", "the image was lost"));
                }
            }
        }
        if let Some(tokens) = self.tokens.take() {
            self.replace(tokens).await?;
        }
        let (format, size) = (self.format, self.pixels.size);
        let bytes = std::mem::take(&mut self.pixels.bytes);
        let b64_json = blocking(move || encode(format, &bytes, size)).await?;
        metrics.image.observe(self.begun.elapsed().as_secs_f64());
        Ok(json!({
            "id": self.id, "b64_json": b64_json, "seed": self.seed, "size": shown(size), "output_format": self.format,
        }))
    }

    /// The event of columns `[3, height, width]` at pixel `x`.
    async fn partial(&self, index: usize, x: usize, columns: Array3<f32>) -> Result<Value, Failure> {
        let size = (columns.dim().2, self.pixels.size.1);
        let format = self.format;
        let b64_json = blocking(move || encode(format, &picture::bytes(columns.view()), size)).await?;
        Ok(json!({
            "type": "image_generation.partial_image", "id": self.id, "partial_image_index": index, "created_at": now(),
            "b64_json": b64_json, "column": x, "size": shown(size), "output_format": format,
        }))
    }

    /// Replaces the strips by all tokens, decoded as a whole.
    async fn replace(&mut self, tokens: Array2<f32>) -> Result<(), Failure> {
        let decode = move |engine: &dyn Engine| engine.decode_tokens(tokens.view().insert_axis(Axis(0)));
        let image = self.model.call(decode).await?.index_axis_move(Axis(0), 0);
        self.pixels.write(0, self.finish.columns(0, image, self.pixels.size.0).1.view());
        Ok(())
    }
}

/// A size as the API writes it.
fn shown((width, height): (usize, usize)) -> String {
    format!("{width}x{height}")
}
