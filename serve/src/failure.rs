//! Errors of requests, in the envelope of OpenAI's API.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::api::{Envelope, Problem};
use crate::body::{MOST_BYTES, MOST_BYTES_OF_PICTURE};

/// An error that a client gets.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Status of the response.
    pub status: StatusCode,
    /// What is wrong, and what to do.
    pub message: String,
    /// The parameter of the request that is wrong.
    pub param: Option<String>,
    /// Identifier of the error.
    pub code: &'static str,
}

impl Failure {
    /// An error with this status.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code }
    }

    /// A parameter of the request that cannot be used.
    pub fn param(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, "invalid_value", message) }
    }

    /// Something that should not happen.
    pub fn internal(error: impl ToString) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", error.to_string())
    }

    /// The body of the request is too large.
    pub fn too_large() -> Self {
        let [most, of_picture] = [MOST_BYTES, MOST_BYTES_OF_PICTURE].map(|bytes| bytes >> 20);
        let message = format!("the body is too large, expected at most {most} MiB, or {of_picture} MiB with a picture");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    }

    /// The request took too long.
    pub fn late() -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout", "the request took too long, and was cancelled")
    }

    /// The service has too much to do.
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message)
    }

    /// The kind of error, by its status.
    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// The body of the response.
    pub fn body(self) -> Envelope {
        let r#type = self.kind();
        let Self { message, param, code, .. } = self;
        Envelope { error: Problem { message, r#type, param, code } }
    }
}

/// The parameter of a request that sets a setting.
fn param_of(field: &str) -> &str {
    match field {
        "class" | "classes" => "prompt",
        "cfg" => "guidance_scale",
        "steps" => "num_inference_steps",
        "tokens" | "width" => "size",
        "prefix" => "image",
        other => other,
    }
}

impl From<eqim::Error> for Failure {
    fn from(error: eqim::Error) -> Self {
        if !error.is_input() {
            return Self::new(StatusCode::INTERNAL_SERVER_ERROR, "engine_failed", error.to_string());
        }
        let Some(field) = error.field() else {
            return Self::new(StatusCode::BAD_REQUEST, "invalid_value", error.to_string());
        };
        let (param, text) = (param_of(field), error.to_string());
        Self::param(param, text.strip_prefix(field).map_or(text.clone(), |rest| format!("{param}{rest}")))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = self.status;
        let mut response = (status, Json(self.body())).into_response();
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
