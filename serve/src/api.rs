//! The JSON objects of the API: bodies of requests, answers and events.

use eqim::bundle::Manifest;
use eqim::picture::{Format, Side};
use eqim::request::settings::{ClassCourse, ClassName, Settings};
use eqim::request::solver::Solver;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// Images to generate.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Body {
    /// Name of a model. By default the first one.
    pub model: Option<String>,
    /// What the images show.
    pub prompt: Prompt,
    /// Number of images, 1 to 10. Image i has the seed `seed` + i.
    #[schema(minimum = 1, maximum = 10)]
    pub n: Option<usize>,
    /// `WIDTHxHEIGHT` or `auto`, which is 16 tokens. The height is that of the model, the width a multiple of a token's.
    #[schema(example = "512x256")]
    pub size: Option<String>,
    /// How images are returned.
    #[serde(rename = "response_format")]
    pub _response_format: Option<ResponseFormat>,
    /// Format of the images: `png`, which is the default, `jpeg`, or `webp` without loss.
    pub output_format: Option<Format>,
    /// Whether strips and images are sent as server-sent events.
    pub stream: Option<bool>,
    /// 0 leaves out the strips of a stream.
    pub partial_images: Option<usize>,
    /// Seed of the noise. By default a random one.
    pub seed: Option<u64>,
    /// Guidance of the classes, 1 or more. 1, which is the default, is none.
    pub guidance_scale: Option<f32>,
    /// Number of steps of the solver per token. By default that of the model.
    pub num_inference_steps: Option<usize>,
    /// Solver of the flow. By default `euler`.
    pub solver: Option<Solver>,
    /// Only for edits: the side on which the picture is continued. By default `right`.
    pub direction: Option<Side>,
    /// Only for edits: whether the pixels of the picture stay as they are.
    pub keep_prefix_pixels: Option<bool>,
    /// Is not used.
    #[serde(rename = "user")]
    pub _user: Option<String>,
    /// Other parameters of OpenAI's API.
    #[serde(flatten)]
    #[schema(ignore)]
    pub others: Map<String, Value>,
}

/// A picture to continue, as a form.
#[derive(ToSchema)]
pub struct Edit {
    /// A PNG or JPEG.
    #[schema(value_type = String, format = Binary)]
    pub image: axum::body::Bytes,
    /// The other fields.
    #[schema(inline)]
    #[serde(flatten)]
    pub body: Body,
}

/// A class by number or name, `none`, or several classes along the tokens: `forest:0-40,water:32-`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Prompt {
    /// A number.
    Number(usize),
    /// A name, or several classes.
    Text(String),
}

impl Prompt {
    /// Sets the classes: `forest:0-40,water:40-` are several, everything else is one.
    pub fn set(&self, settings: &mut Settings) {
        match self {
            Self::Number(number) => settings.class = vec![ClassName::Number(*number)],
            Self::Text(text) => match text.parse::<ClassCourse>() {
                Ok(course) => settings.classes = Some(course),
                Err(_) => settings.class = vec![text.parse().unwrap_or_else(|_| ClassName::Name(text.clone()))],
            },
        }
    }
}

/// Images are returned as files in base64.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Base64.
    B64Json,
}

/// Images that were made.
#[derive(Serialize, ToSchema)]
pub struct Images {
    /// Seconds since 1970.
    pub created: u64,
    /// The images.
    pub data: Vec<Made>,
    /// Format of the images.
    pub output_format: Format,
}

/// An image that was made.
#[derive(Serialize, ToSchema)]
pub struct Made {
    /// Identifier of the image.
    pub id: String,
    /// The file in base64.
    pub b64_json: String,
    /// Seed of its noise.
    pub seed: u64,
    /// `WIDTHxHEIGHT`.
    pub size: String,
    /// Format of the file.
    pub output_format: Format,
}

/// A part of an image that is being made.
#[derive(Serialize, ToSchema)]
pub struct Strip {
    /// Identifier of the image.
    pub id: String,
    /// Number of strips of the image before this one.
    pub partial_image_index: usize,
    /// The file in base64.
    pub b64_json: String,
    /// Number of pixels to the left of the strip.
    pub column: usize,
    /// `WIDTHxHEIGHT` of the strip.
    pub size: String,
    /// Whether a later strip, or the completed image, replaces these columns.
    pub preview: bool,
    /// `WIDTHxHEIGHT` of the whole image.
    pub image_size: String,
    /// Format of the file.
    pub output_format: Format,
}

/// An event of a stream. The events of edits are `image_edit.partial_image` and `image_edit.completed`.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type")]
pub enum Event {
    /// New columns of a generated image.
    #[serde(rename = "image_generation.partial_image")]
    Partial(Dated<Strip>),
    /// A generated image.
    #[serde(rename = "image_generation.completed")]
    Completed(Dated<Made>),
    /// New columns of a continued picture.
    #[serde(rename = "image_edit.partial_image")]
    EditPartial(Dated<Strip>),
    /// A continued picture.
    #[serde(rename = "image_edit.completed")]
    EditCompleted(Dated<Made>),
}

/// What was made, and when.
#[derive(Serialize, ToSchema)]
pub struct Dated<T> {
    /// Seconds since 1970.
    pub created_at: u64,
    /// What was made.
    #[serde(flatten)]
    pub made: T,
}

/// Other classes for an image that is being made.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Classes {
    /// The classes, from the next token on.
    pub prompt: Prompt,
}

/// The classes of an image that is being made.
#[derive(Serialize, ToSchema)]
pub struct Amended {
    /// Identifier of the image.
    pub id: String,
    /// The first token with the new classes.
    pub first_token: usize,
    /// All classes along the tokens: with them and its seed, the same image is made again.
    pub classes: String,
}

/// All models.
#[derive(Serialize, ToSchema)]
pub struct Models {
    /// `list`.
    pub object: &'static str,
    /// The models. The first one is the default.
    pub data: Vec<Model>,
}

/// A model.
#[derive(Serialize, ToSchema)]
pub struct Model {
    /// Its name.
    pub id: String,
    /// `model`.
    pub object: &'static str,
    /// 0: bundles do not have a date.
    pub created: u64,
    /// `eqim`.
    pub owned_by: &'static str,
    /// `fp32`, `fp16` or `int8`.
    pub precision: String,
    /// Height of its images in pixels.
    pub height: usize,
    /// Width of a token in pixels.
    pub token_width: usize,
    /// Number of its classes.
    pub classes: usize,
    /// Names of its classes. Empty if they have none.
    pub class_names: Vec<String>,
    /// Number of steps of the solver, if a request does not have one.
    pub steps: usize,
    /// Largest length of an image in tokens.
    pub max_tokens: usize,
    /// SHA-256 of its weights.
    pub fingerprint: String,
}

impl Model {
    /// The model of a bundle.
    pub fn of(name: &str, manifest: &Manifest, max_tokens: usize) -> Self {
        let config = &manifest.model;
        let precision = match &manifest.quantization {
            Some(_) => "int8".into(),
            None => manifest.precision.to_string(),
        };
        Self {
            id: name.into(),
            object: "model",
            created: 0,
            owned_by: "eqim",
            precision,
            height: config.tokenizer.image_height(),
            token_width: config.tokenizer.token_width(),
            classes: config.generator.class_num,
            class_names: config.generator.class_names.clone(),
            steps: config.generator.steps,
            max_tokens,
            fingerprint: manifest.weights.sha256.clone(),
        }
    }
}

/// An error.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Envelope {
    /// What is wrong.
    pub error: Problem,
}

/// What is wrong.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Problem {
    /// What is wrong, and what to do.
    pub message: String,
    /// Kind of error.
    pub r#type: &'static str,
    /// The parameter of the request that is wrong.
    pub param: Option<String>,
    /// Identifier of the error.
    pub code: &'static str,
}
