//! An image on its way to a client.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use eqim::generate::finish::Finish;
use eqim::generate::scheduler::Event;
use eqim::picture::{self, Format, Pixels};
use eqim::request::{Noise, Request};
use ndarray::Array3;

use crate::api::{Made, Strip};
use crate::app::App;
use crate::failure::Failure;
use crate::model::Received;
use crate::output::{blocking, encode};
use crate::request::Wanted;

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// An image that is being generated for a client.
pub struct Image {
    app: Arc<App>,
    id: String,
    received: Received,
    pixels: Pixels,
    finish: Finish,
    format: Format,
    seed: u64,
    begun: Instant,
}

impl Drop for Image {
    fn drop(&mut self) {
        self.app.forget(&self.id);
    }
}

impl Image {
    /// An image of `wanted`, whose events are `received`.
    pub fn new(app: &Arc<App>, wanted: &Wanted, number: usize, received: Received, request: &Request) -> Self {
        let config = &wanted.model.manifest.model;
        let id = app.remember(&wanted.model, number);
        let seed = match request.noise {
            Noise::Seed(seed) => seed,
            Noise::Given(_) => 0,
        };
        Self {
            app: Arc::clone(app),
            id,
            received,
            pixels: Pixels::new(config.image_size(request.tokens)),
            finish: wanted.finish.clone(),
            format: wanted.format,
            seed,
            begun: Instant::now(),
        }
    }

    /// Waits for the image. `partial` receives each strip and preview, if they are wanted.
    ///
    /// # Errors
    /// If the engine fails, or the image does not fit its format.
    pub async fn finish(mut self, partial: Option<impl Fn(Strip)>) -> Result<Made, Failure> {
        let (mut sent, metrics) = (0, &Arc::clone(&self.app).metrics);
        let mut last = self.begun;
        loop {
            let (strip, is_preview) = match self.received.recv().await {
                Some(Event::Token(..)) => {
                    metrics.token.observe(last.elapsed().as_secs_f64());
                    last = Instant::now();
                    continue;
                }
                Some(Event::Strip(strip)) => (strip, false),
                Some(Event::Preview(strip)) => (strip, true),
                Some(Event::Done) => break,
                Some(Event::Failed(error)) => return Err(error.into()),
                None => return Err(Failure::internal("the image was lost")),
            };
            let (x, columns) = self.finish.columns(strip.x, strip.pixels, self.pixels.size.0);
            if !is_preview {
                self.pixels.write(x, columns.view());
            }
            // A strip with the whole image is no partial image.
            if let Some(partial) = partial.as_ref().filter(|_| columns.dim().2 < self.pixels.size.0) {
                partial(self.strip(sent, x, columns, is_preview).await?);
            }
            if sent == 0 {
                metrics.first_strip.observe(self.begun.elapsed().as_secs_f64());
            }
            sent += 1;
        }
        let (format, size) = (self.format, self.pixels.size);
        let bytes = std::mem::take(&mut self.pixels.bytes);
        let b64_json = blocking(move || encode(format, &bytes, size)).await?;
        metrics.image.observe(self.begun.elapsed().as_secs_f64());
        Ok(Made { id: self.id.clone(), b64_json, seed: self.seed, size: shown(size), output_format: self.format })
    }

    /// Columns `[3, height, width]` at pixel `x` as a strip. `index` is the number of strips before it.
    async fn strip(&self, index: usize, x: usize, columns: Array3<f32>, preview: bool) -> Result<Strip, Failure> {
        let size = (columns.dim().2, self.pixels.size.1);
        let format = self.format;
        let b64_json = blocking(move || encode(format, &picture::bytes(columns.view()), size)).await?;
        Ok(Strip {
            id: self.id.clone(),
            partial_image_index: index,
            b64_json,
            column: x,
            size: shown(size),
            preview,
            image_size: shown(self.pixels.size),
            output_format: format,
        })
    }
}

/// A size as the API writes it.
fn shown((width, height): (usize, usize)) -> String {
    format!("{width}x{height}")
}
