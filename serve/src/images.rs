//! `POST /v1/images/generations`: images of classes, whole or strip by strip.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use eqim::engine::Engine;
use eqim::generate::plan;
use eqim::generate::scheduler::Event;
use eqim::generate::tiles::{Strip, Tiling};
use eqim::generate::worker::Command;
use eqim::request::condition::ClassSchedule;
use eqim::request::settings::{ClassCourse, ClassName, SamplingSettings, Settings};
use eqim::request::solver::Solver;
use eqim::request::{Noise, Request};
use ndarray::{Array2, Axis};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::app::App;
use crate::failure::Failure;
use crate::model::{Model, Received};
use crate::picture::{OutputFormat, Pixels};

/// Largest number of images of a request.
const MOST_IMAGES: usize = 10;
/// Tiling of the strips of an image that is decoded as a whole in the end.
const PREVIEW: Tiling = Tiling { tile: 16, overlap: 4 };

/// The body of a request.
#[derive(Debug, Deserialize)]
struct Body {
    model: Option<String>,
    prompt: Prompt,
    n: Option<usize>,
    size: Option<String>,
    #[serde(rename = "response_format")]
    _response_format: Option<ResponseFormat>,
    output_format: Option<OutputFormat>,
    stream: Option<bool>,
    partial_images: Option<usize>,
    seed: Option<u64>,
    guidance_scale: Option<f32>,
    num_inference_steps: Option<usize>,
    solver: Option<Solver>,
    #[serde(rename = "user")]
    _user: Option<String>,
    /// Other parameters of OpenAI's API.
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// A class by number or name, or classes along the tokens.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Number(usize),
    Text(String),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ResponseFormat {
    B64Json,
}

/// Images that a request asks for.
struct Wanted {
    model: Arc<Model>,
    /// One request per image.
    requests: Vec<Request>,
    /// How they are decoded.
    tiling: Option<Tiling>,
    format: OutputFormat,
    is_streamed: bool,
    strips: bool,
}

impl Prompt {
    /// Sets the classes: `forest:0-40,water:40-` are several, everything else is one.
    fn set(&self, settings: &mut Settings) {
        match self {
            Self::Number(number) => settings.class = vec![ClassName::Number(*number)],
            Self::Text(text) => match text.parse::<ClassCourse>() {
                Ok(course) => settings.classes = Some(course),
                Err(_) => settings.class = vec![text.parse().unwrap_or_else(|_| ClassName::Name(text.clone()))],
            },
        }
    }
}

/// Reads the body of a request.
///
/// # Errors
/// If it is not the JSON of a `T`. The message says where.
fn parse<T: for<'a> Deserialize<'a>>(body: &[u8]) -> Result<T, Failure> {
    let bad = |error: serde_json::Error| {
        Failure::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body cannot be read: {error}"))
    };
    serde_json::from_slice(body).map_err(bad)
}

impl Wanted {
    /// Checks a request.
    fn new(app: &App, body: Body) -> Result<Self, Failure> {
        let Body { model, prompt, n, size, stream, partial_images, others, .. } = body;
        let model = app.model(model.as_deref())?;
        if let Some((name, value)) = others.iter().find(|(_, value)| !value.is_null() && *value != "auto") {
            return Err(Failure::param(
                name,
                format!("{name} is {value}, which this service does not support: leave it out"),
            ));
        }
        let n = n.unwrap_or(1);
        if !(1..=MOST_IMAGES).contains(&n) {
            return Err(Failure::param("n", format!("n is {n}, expected 1 to {MOST_IMAGES}")));
        }
        let config = &model.manifest.model;
        let mut settings = Settings {
            width: size.as_deref().map(|size| width(size, config.tokenizer.image_height())).transpose()?.flatten(),
            sampling: SamplingSettings {
                seed: Some(body.seed.unwrap_or_else(rand::random)),
                cfg: Some(body.guidance_scale.unwrap_or(1.0)),
                solver: body.solver,
                steps: body.num_inference_steps,
                ..SamplingSettings::default()
            },
            ..Settings::default()
        };
        prompt.set(&mut settings);
        let (first, tiling) = plan::check(&settings, false, config)?;
        if first.tokens > app.max_tokens {
            let (tokens, most) = (first.tokens, app.max_tokens);
            return Err(Failure::param("size", format!("size is {tokens} tokens wide, expected at most {most}")));
        }
        let with_seed = |index: usize| {
            let seed = settings.sampling.seed.unwrap_or_default().wrapping_add(index as u64);
            let sampling = SamplingSettings { seed: Some(seed), ..settings.sampling.clone() };
            sampling.apply(first.clone())
        };
        Ok(Self {
            requests: (0..n).map(with_seed).collect(),
            tiling,
            format: body.output_format.unwrap_or_default(),
            is_streamed: stream.unwrap_or_default(),
            strips: partial_images != Some(0),
            model,
        })
    }
}

/// The width in a size: `auto` or `WIDTHxHEIGHT`.
fn width(size: &str, expected: usize) -> Result<Option<usize>, Failure> {
    if size == "auto" {
        return Ok(None);
    }
    let sizes =
        size.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse::<usize>().ok()?)));
    match sizes {
        Some((width, height)) if height == expected => Ok(Some(width)),
        _ => Err(Failure::param(
            "size",
            format!("size is {size}, expected auto or WIDTHx{expected}: this model's height"),
        )),
    }
}

/// Handles the request.
///
/// # Errors
/// If the request cannot be served.
pub async fn generations(State(app): State<Arc<App>>, body: Bytes) -> Result<Response, Failure> {
    app.accepts()?;
    let body: Body = parse(&body)?;
    let wanted = Wanted::new(&app, body)?;
    // A streamed image is decoded in strips, and once more as a whole if that is how it is decoded without strips.
    let tokens = wanted.requests[0].tokens;
    let whole = Tiling::whole(tokens);
    let previewed = wanted.is_streamed && wanted.strips && wanted.tiling.is_none() && tokens > PREVIEW.tile;
    let tiling = if previewed { PREVIEW } else { wanted.tiling.unwrap_or(whole) };
    let received = wanted.model.generate(&wanted.requests, tiling)?;
    let images: Vec<Image> = received
        .into_iter()
        .zip(&wanted.requests)
        .map(|((number, received), request)| Image::new(&app, &wanted, number, received, request, previewed))
        .collect();
    if wanted.is_streamed {
        return Ok(stream(app, images, wanted.strips));
    }
    let mut data = vec![];
    let work = async {
        for image in images {
            data.push(image.finish(None::<fn(Value)>).await?);
        }
        Ok(json!({ "created": now(), "data": data, "output_format": wanted.format }))
    };
    tokio::time::timeout(app.request_timeout, work)
        .await
        .unwrap_or_else(|_| Err(late()))
        .map(|body| Json(body).into_response())
}

/// The error of a request that took too long.
fn late() -> Failure {
    Failure::new(StatusCode::GATEWAY_TIMEOUT, "timeout", "the request took too long, and was cancelled")
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Sends the events of images, one image after the other.
fn stream(app: Arc<App>, images: Vec<Image>, strips: bool) -> Response {
    let (send, receive) = mpsc::unbounded_channel::<Result<sse::Event, Infallible>>();
    let timeout = app.request_timeout;
    tokio::spawn(async move {
        let emit = |name: &str, data: Value| {
            let _ = send.send(Ok(sse::Event::default().event(name).data(data.to_string())));
        };
        let work = async {
            for image in images {
                let partial = strips.then_some(|data| emit("image_generation.partial_image", data));
                // If the client goes away, the image is dropped, and cancelled with it.
                let done = tokio::select! {
                    done = image.finish(partial) => done?,
                    () = send.closed() => return Ok(()),
                };
                let mut data = json!({ "type": "image_generation.completed", "created_at": now() });
                merge(&mut data, done);
                emit("image_generation.completed", data);
            }
            Ok(())
        };
        let result = tokio::time::timeout(timeout, work).await.unwrap_or_else(|_| Err(late()));
        if let Err(failure) = result {
            emit("error", failure.body());
        }
    });
    Sse::new(UnboundedReceiverStream::new(receive)).keep_alive(KeepAlive::default()).into_response()
}

/// Adds the fields of an object to another.
fn merge(object: &mut Value, fields: Value) {
    if let (Value::Object(object), Value::Object(fields)) = (object, fields) {
        object.extend(fields);
    }
}

/// An image that is being generated for a client.
struct Image {
    app: Arc<App>,
    model: Arc<Model>,
    id: String,
    received: Received,
    pixels: Pixels,
    format: OutputFormat,
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
    fn new(
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
            format: wanted.format,
            seed,
            tokens: previewed.then(|| Array2::zeros((0, config.generator.embed))),
            begun: Instant::now(),
        }
    }

    /// Waits for the image. `partial` receives each strip, if strips are wanted.
    async fn finish(mut self, partial: Option<impl Fn(Value)>) -> Result<Value, Failure> {
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
                    self.pixels.write(&strip);
                    if let Some(partial) = &partial {
                        partial(self.partial(strips, strip).await?);
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
            self.pixels = self.whole(tokens).await?;
        }
        let (format, size) = (self.format, self.pixels.size);
        let bytes = std::mem::take(&mut self.pixels.bytes);
        let b64_json = blocking(move || format.encode(&bytes, size)).await?;
        metrics.image.observe(self.begun.elapsed().as_secs_f64());
        Ok(json!({
            "id": self.id, "b64_json": b64_json, "seed": self.seed, "size": shown(size), "output_format": self.format,
        }))
    }

    /// The event of a strip.
    async fn partial(&self, index: usize, strip: Strip) -> Result<Value, Failure> {
        let (x, size) = (strip.x, (strip.pixels.dim().2, self.pixels.size.1));
        let mut alone = Pixels::new(size);
        alone.write(&Strip { x: 0, ..strip });
        let format = self.format;
        let b64_json = blocking(move || format.encode(&alone.bytes, size)).await?;
        Ok(json!({
            "type": "image_generation.partial_image", "id": self.id, "partial_image_index": index, "created_at": now(),
            "b64_json": b64_json, "column": x, "size": shown(size), "output_format": format,
        }))
    }

    /// Decodes all tokens as a whole.
    async fn whole(&self, tokens: Array2<f32>) -> Result<Pixels, Failure> {
        let (send, receive) = oneshot::channel();
        let call = move |engine: &dyn Engine| {
            let _ = send.send(engine.decode_tokens(tokens.view().insert_axis(Axis(0))));
        };
        self.model.send(Command::Call(Box::new(call)))?;
        let lost = |_| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "engine_failed", "the image was lost");
        let image = receive.await.map_err(lost)??.index_axis_move(Axis(0), 0);
        let mut pixels = Pixels::new(self.pixels.size);
        pixels.write(&Strip { index: 0, x: 0, pixels: image });
        Ok(pixels)
    }
}

/// Runs work that takes long on a thread for it.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    let panicked = |error| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", format!("{error}"));
    tokio::task::spawn_blocking(work).await.map_err(panicked)?
}

/// A size as the API writes it.
fn shown((width, height): (usize, usize)) -> String {
    format!("{width}x{height}")
}

/// The body of `POST /v1/images/generations/{id}/classes`.
#[derive(Debug, Deserialize)]
struct Classes {
    prompt: Prompt,
}

/// Changes the classes of an image that is being generated, as soon as possible.
///
/// # Errors
/// If there is no such image, or the classes do not fit the model.
pub async fn amend(State(app): State<Arc<App>>, Path(id): Path<String>, body: Bytes) -> Result<Json<Value>, Failure> {
    let unknown =
        || Failure::new(StatusCode::NOT_FOUND, "image_not_found", format!("no image {id} is being generated"));
    let Classes { prompt } = parse(&body)?;
    let (model, number) = app.image(&id).ok_or_else(unknown)?;
    let mut settings = Settings { tokens: Some(app.max_tokens), ..Settings::default() };
    prompt.set(&mut settings);
    let classes = settings.request(&model.manifest.model)?.classes.pop().unwrap_or(ClassSchedule::Constant(None));
    let (send, receive) = oneshot::channel();
    let reply = move |found| {
        let _ = send.send(found);
    };
    model.send(Command::Amend(number, classes, Box::new(reply)))?;
    let (first, classes) = receive.await.ok().flatten().ok_or_else(unknown)?;
    let classes = match classes {
        ClassSchedule::Constant(class) => ClassName::of(class).to_string(),
        ClassSchedule::Spans(spans) => ClassCourse::of(&spans).to_string(),
    };
    Ok(Json(json!({ "id": id, "first_token": first, "classes": classes })))
}
