//! The state that all requests share, and the routes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use subtle::ConstantTimeEq;
use tracing::Instrument;

use crate::failure::Failure;
use crate::images;
use crate::model::Model;
use crate::watch::{self, Metrics};

/// Largest body of a request in bytes.
const MOST_BYTES: usize = 1 << 20;
/// Largest body of a request with a picture in bytes.
const MOST_BYTES_OF_PICTURE: usize = 32 << 20;
/// Name of the header with the identifier of a request.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What all requests share.
pub struct App {
    /// The models. The first one is the default.
    pub models: Vec<Arc<Model>>,
    /// Keys of clients. Empty if anyone is served.
    pub keys: Vec<String>,
    /// Largest length of an image in tokens.
    pub max_tokens: usize,
    /// Largest time of a request.
    pub request_timeout: Duration,
    /// Whether the service is about to end.
    pub is_draining: AtomicBool,
    /// Metrics of requests.
    pub metrics: Metrics,
    /// Images that are being generated, by their identifiers: their model and number.
    pub images: Mutex<HashMap<String, (Arc<Model>, usize)>>,
}

impl App {
    /// The model of a request.
    ///
    /// # Errors
    /// If there is no model of this name.
    pub fn model(&self, name: Option<&str>) -> Result<Arc<Model>, Failure> {
        let found = match name {
            None => self.models.first(),
            Some(name) => self.models.iter().find(|model| model.name == name),
        };
        found.cloned().ok_or_else(|| {
            let names: Vec<_> = self.models.iter().map(|model| model.name.as_str()).collect();
            let message = format!("model is {}, expected one of {}", name.unwrap_or_default(), names.join(", "));
            let failure = Failure::new(StatusCode::NOT_FOUND, "model_not_found", message);
            Failure { param: Some("model".into()), ..failure }
        })
    }

    /// Refuses new work if the service is about to end.
    ///
    /// # Errors
    /// If it is.
    pub fn accepts(&self) -> Result<(), Failure> {
        if self.is_draining.load(Ordering::SeqCst) {
            return Err(Failure::new(StatusCode::SERVICE_UNAVAILABLE, "draining", "the service is about to end"));
        }
        Ok(())
    }

    /// Gives an image that is being generated an identifier.
    pub fn remember(&self, model: &Arc<Model>, number: usize) -> String {
        let id = format!("img_{}", uuid::Uuid::new_v4().simple());
        self.known().insert(id.clone(), (Arc::clone(model), number));
        id
    }

    /// Forgets an image that has ended.
    pub fn forget(&self, id: &str) {
        self.known().remove(id);
    }

    /// The model and the number of an image that is being generated.
    pub fn image(&self, id: &str) -> Option<(Arc<Model>, usize)> {
        self.known().get(id).cloned()
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, (Arc<Model>, usize)>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The routes of the service.
pub fn router(app: Arc<App>) -> Router {
    let api = Router::new()
        .route("/v1/images/generations", post(images::generations))
        .route("/v1/images/edits", post(images::edits).layer(DefaultBodyLimit::max(MOST_BYTES_OF_PICTURE)))
        .route("/v1/images/generations/{id}/classes", post(images::amend))
        .route("/v1/models", get(watch::models))
        .route("/v1/models/{id}", get(watch::model))
        .route("/metrics", get(watch::metrics))
        .route_layer(from_fn_with_state(Arc::clone(&app), authorized));
    Router::new()
        .route("/health/live", get(|| async { "live\n" }))
        .route("/health/ready", get(watch::ready))
        .merge(api)
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .layer(DefaultBodyLimit::max(MOST_BYTES))
        .layer(from_fn_with_state(Arc::clone(&app), observed))
        .with_state(app)
}

/// The response to a request for something that does not exist.
async fn unknown(method: Method, request: Request) -> Failure {
    let message = format!("there is no {method} {}", request.uri().path());
    Failure::new(StatusCode::NOT_FOUND, "not_found", message)
}

/// Refuses requests without a key, if keys are needed.
async fn authorized(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    // Every key is compared, in a time that does not depend on where they differ.
    let is_known = app.keys.iter().fold(false, |known, key| known | bool::from(key.as_bytes().ct_eq(given.as_bytes())));
    if !app.keys.is_empty() && !is_known {
        let message = "the key is missing or unknown: send it as Authorization: Bearer KEY";
        return Failure::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message).into_response();
    }
    next.run(request).await
}

/// Counts and logs a request, puts its identifier in the response, and puts errors of the framework in the envelope. No line
/// has the body or the headers of a request.
async fn observed(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let id = uuid::Uuid::new_v4().simple().to_string();
    let route = request.extensions().get::<MatchedPath>().map_or("none", |path| path.as_str()).to_string();
    let method = request.method().clone();
    let span = tracing::info_span!("request", id, %method, route);
    let begun = Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    let status = response.status();
    if status == StatusCode::PAYLOAD_TOO_LARGE {
        let [most, of_picture] = [MOST_BYTES, MOST_BYTES_OF_PICTURE].map(|bytes| bytes >> 20);
        let message = format!("the body is too large, expected at most {most} MiB, or {of_picture} MiB with a picture");
        response = Failure::new(status, "body_too_large", message).into_response();
    }
    app.metrics.requests.with_label_values(&[route.as_str(), status.as_str()]).inc();
    span.in_scope(|| tracing::info!(status = status.as_u16(), seconds = begun.elapsed().as_secs_f64(), "answered"));
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}
