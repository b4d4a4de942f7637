//! The routes of the service, and what every request passes: its limits, its key, and its line in the log.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use subtle::ConstantTimeEq;
use tracing::Instrument;

use crate::app::App;
use crate::failure::Failure;
use crate::{images, watch};

/// Largest body of a request in bytes.
const MOST_BYTES: usize = 1 << 20;
/// Largest body of a request with a picture in bytes.
const MOST_BYTES_OF_PICTURE: usize = 32 << 20;
/// Name of the header with the identifier of a request.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

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
