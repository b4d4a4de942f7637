//! What a request asks for: its parameters, checked against the model.

use std::path::Path;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::Multipart;
use axum::extract::multipart::MultipartError;
use axum::http::StatusCode;
use eqim::Config;
use eqim::engine::Engine;
use eqim::generate::finish::Finish;
use eqim::generate::plan::Plan;
use eqim::generate::tiles::Tiling;
use eqim::picture::{self, Format, Side};
use eqim::request::Request;
use eqim::request::settings::{SamplingSettings, Settings};
use ndarray::{Array3, Axis};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::api::{Body, Edit};
use crate::app::App;
use crate::failure::Failure;
use crate::model::Model;
use crate::output::blocking;

/// Name of the parameter with the picture that images continue.
const PICTURE: &str = "image";
/// Largest number of images of a request.
const MOST_IMAGES: usize = 10;

/// Images that a request asks for.
pub struct Wanted {
    /// The model that makes them.
    pub model: Arc<Model>,
    /// One request per image.
    pub requests: Vec<Request>,
    /// How they are decoded; `None` is as a whole.
    pub tiling: Option<Tiling>,
    /// What happens to decoded columns.
    pub finish: Finish,
    /// Format of the images.
    pub format: Format,
    /// Whether the images are streamed.
    pub is_streamed: bool,
    /// Whether strips are streamed too.
    pub strips: bool,
    /// Whether the images continue a picture.
    pub is_edit: bool,
}

/// Reads the body of a request.
///
/// # Errors
/// If it is not the JSON of a `T`. The message says where.
pub fn parse<T: for<'a> Deserialize<'a>>(body: &[u8]) -> Result<T, Failure> {
    let bad = |error: serde_json::Error| {
        Failure::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body cannot be read: {error}"))
    };
    serde_json::from_slice(body).map_err(bad)
}

impl Body {
    /// The number of images, if there are no parameters that the service does not have.
    fn images(&self) -> Result<usize, Failure> {
        let meaningful = |(_, value): &(&String, &Value)| !value.is_null() && *value != "auto";
        if let Some((name, value)) = self.others.iter().find(meaningful) {
            let message = format!("{name} is {value}, which this service does not support: leave it out");
            return Err(Failure::param(name, message));
        }
        match self.n.unwrap_or(1) {
            n if (1..=MOST_IMAGES).contains(&n) => Ok(n),
            n => Err(Failure::param("n", format!("n is {n}, expected 1 to {MOST_IMAGES}"))),
        }
    }

    /// The settings of the first image.
    fn settings(&self, config: &Config) -> Result<Settings, Failure> {
        let width =
            self.size.as_deref().map(|size| width(size, config.tokenizer.image_height())).transpose()?.flatten();
        let mut settings = Settings {
            width,
            sampling: SamplingSettings {
                seed: Some(self.seed.unwrap_or_else(rand::random)),
                cfg: Some(self.guidance_scale.unwrap_or(1.0)),
                solver: self.solver,
                steps: self.num_inference_steps,
                ..SamplingSettings::default()
            },
            direction: self.direction,
            keep_prefix_pixels: self.keep_prefix_pixels,
            ..Settings::default()
        };
        self.prompt.set(&mut settings);
        Ok(settings)
    }
}

impl Wanted {
    /// Checks a request. `photo` is the file of the picture that the images continue.
    ///
    /// # Errors
    /// If a parameter does not fit the model, or the picture cannot be read.
    pub async fn new(app: &App, body: Body, photo: Option<Bytes>) -> Result<Self, Failure> {
        let model = app.model(body.model.as_deref())?;
        let n = body.images()?;
        let config = &model.manifest.model;
        let side = body.direction.unwrap_or_default();
        let beginning = match photo {
            Some(photo) => Some(beginning(&model, photo, side).await?),
            None => None,
        };
        let settings = body.settings(config)?;
        let Plan { request: mut first, tiling, finish } = Plan::new(&settings, beginning.as_ref(), false, config)?;
        if first.tokens > app.max_tokens {
            let (tokens, most) = (first.tokens, app.max_tokens);
            return Err(Failure::param("size", format!("size is {tokens} tokens wide, expected at most {most}")));
        }
        let is_edit = beginning.is_some();
        if let Some(pixels) = beginning {
            let encode = move |engine: &dyn Engine| engine.encode_tokens(pixels.view().insert_axis(Axis(0)));
            first.prefix = Some(model.call(encode).await?);
        }
        let with_seed = |index: usize| {
            let seed = settings.sampling.seed.unwrap_or_default().wrapping_add(index as u64);
            let sampling = SamplingSettings { seed: Some(seed), ..settings.sampling.clone() };
            sampling.apply(first.clone())
        };
        Ok(Self {
            requests: (0..n).map(with_seed).collect(),
            tiling,
            finish,
            format: body.output_format.unwrap_or_default(),
            is_streamed: body.stream.unwrap_or_default(),
            strips: body.partial_images != Some(0),
            is_edit,
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

/// Reads a picture that images continue, `[3, height, width]` in the order of generation.
async fn beginning(model: &Arc<Model>, photo: Bytes, side: Side) -> Result<Array3<f32>, Failure> {
    let tokenizer = &model.manifest.model.tokenizer;
    let (height, multiple) = (tokenizer.image_height(), tokenizer.token_width());
    let read = move || {
        let path = Path::new(PICTURE);
        Ok(picture::beginning(path, picture::decode(path, &photo)?, height, multiple, side)?.pixels)
    };
    blocking(read).await.map_err(|failure| Failure {
        status: if failure.status == StatusCode::BAD_REQUEST {
            StatusCode::UNPROCESSABLE_ENTITY
        } else {
            failure.status
        },
        param: Some(PICTURE.into()),
        ..failure
    })
}

/// Reads a form.
///
/// # Errors
/// If the form cannot be read, or a field does not fit.
pub async fn form(mut form: Multipart) -> Result<Edit, Failure> {
    // A body that ends early is the fault of the client too.
    let bad = |error: MultipartError| match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Failure::too_large(),
        _ => Failure::new(StatusCode::BAD_REQUEST, "invalid_form", error.body_text()),
    };
    let (mut photo, mut fields) = (None, Map::new());
    while let Some(field) = form.next_field().await.map_err(bad)? {
        let name = field.name().unwrap_or_default().to_string();
        if matches!(name.as_str(), PICTURE | "image[]") {
            if photo.replace(field.bytes().await.map_err(bad)?).is_some() {
                return Err(Failure::param(PICTURE, "image is given twice, expected one picture to continue"));
            }
            continue;
        }
        let text = field.text().await.map_err(bad)?;
        let is_text = ["model", "prompt", "size", "response_format", "output_format", "solver", "direction", "user"];
        let value = if is_text.contains(&name.as_str()) { None } else { serde_json::from_str(&text).ok() };
        fields.insert(name, value.unwrap_or(Value::String(text)));
    }
    let missing = || Failure::param(PICTURE, "image is missing: give the picture to continue as a file");
    let bad = |error: serde_json::Error| {
        Failure::new(StatusCode::BAD_REQUEST, "invalid_form", format!("the form cannot be read: {error}"))
    };
    Ok(Edit { image: photo.ok_or_else(missing)?, body: serde_json::from_value(fields.into()).map_err(bad)? })
}
