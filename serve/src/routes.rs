//! The routes of the service, and what every request passes: its limits, its key, and its line in the log.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use subtle::ConstantTimeEq;
use tower_http::cors::CorsLayer;
use tower_http::timeout::RequestBodyTimeoutLayer;
use tracing::Instrument;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_swagger_ui::{Config, SwaggerUi};

use crate::app::App;
use crate::body::{MOST_BYTES, MOST_BYTES_OF_PICTURE, MOST_TIME_OF_PIECE};
use crate::failure::Failure;
use crate::{api, body, images, page, watch};

/// Name of the header with the identifier of a request.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The API as OpenAPI describes it.
#[derive(OpenApi)]
#[openapi(
    info(title = "eqim-serve", description = "Images of Equivariant Image Modeling, with OpenAI's images API."),
    paths(
        images::generations, images::edits, images::amend, watch::models, watch::model, watch::metrics, watch::live,
        watch::ready,
    ),
    components(schemas(api::Event)),
    modifiers(&Keys),
    security(("key" = [])),
)]
struct Api;

/// Adds how clients send their keys.
struct Keys;

impl Modify for Keys {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        api.components.get_or_insert_default().add_security_scheme("key", scheme);
    }
}

/// The routes of the service.
pub fn router(app: Arc<App>) -> Router {
    let keyed = Router::new()
        .route("/v1/images/generations", post(images::generations))
        .route("/v1/images/edits", post(images::edits).layer(DefaultBodyLimit::max(MOST_BYTES_OF_PICTURE)))
        .route("/v1/images/generations/{id}/classes", post(images::amend))
        .route("/v1/models", get(watch::models))
        .route("/v1/models/{id}", get(watch::model))
        .route("/metrics", get(watch::metrics))
        .route_layer(from_fn_with_state(Arc::clone(&app), authorized));
    let description =
        SwaggerUi::new("/docs").url("/openapi.json", Api::openapi()).config(Config::from("../openapi.json"));
    let cross_origin = CorsLayer::new()
        .allow_origin(app.origins.clone())
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE])
        .expose_headers([REQUEST_ID]);
    Router::new()
        .route("/health/live", get(watch::live))
        .route("/health/ready", get(watch::ready))
        .merge(keyed)
        .merge(Router::from(description).layer(from_fn(page::described)))
        .merge(page::router())
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .layer(DefaultBodyLimit::max(MOST_BYTES))
        .layer(from_fn_with_state(Arc::clone(&app), from_known_page))
        .layer(from_fn(body::read_before_errors))
        .layer(from_fn_with_state(Arc::clone(&app), observed))
        .layer(cross_origin)
        .layer(RequestBodyTimeoutLayer::new(MOST_TIME_OF_PIECE))
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

/// Refuses a request that a page of another origin makes: browsers send forms of any page to this service.
async fn from_known_page(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if !request.method().is_safe() && !is_known_page(&app, request.headers()) {
        let message = "pages of other origins are not allowed: name them with --cors-origin";
        return Failure::new(StatusCode::FORBIDDEN, "origin_not_allowed", message).into_response();
    }
    next.run(request).await
}

/// Whether a request comes from no page, the page of this service, or a page that is allowed.
fn is_known_page(app: &App, headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let page = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    app.origins.contains(origin) || page.is_some_and(|(_, page)| Some(page) == host)
}

/// Whether the body of a response is JSON.
fn is_json(response: &Response) -> bool {
    response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json")
}

/// An error of the framework in the envelope of the API.
async fn in_envelope(response: Response) -> Response {
    let status = response.status();
    if status == StatusCode::PAYLOAD_TOO_LARGE {
        return Failure::too_large().into_response();
    }
    let text = axum::body::to_bytes(response.into_body(), MOST_BYTES).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let message = if text.is_empty() { "the request cannot be read" } else { text.trim() };
    Failure::new(status, "invalid_request", message).into_response()
}

/// Counts and logs a request, puts its identifier in the response, and puts errors of the framework in the envelope. No line
/// has the body or the headers of a request.
async fn observed(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let id = uuid::Uuid::new_v4().simple().to_string();
    let route = request.extensions().get::<MatchedPath>().map_or("none", |path| path.as_str()).to_string();
    let method = request.method().clone();
    let span = tracing::info_span!("request", id, %method, route);
    let begun = Instant::now();
    let answer = next.run(request).instrument(span.clone());
    let mut response = match tokio::time::timeout(app.request_timeout, answer).await {
        Ok(response) => response,
        Err(_) => Failure::late().into_response(),
    };
    let status = response.status();
    if status.is_client_error() && !is_json(&response) {
        response = in_envelope(response).await;
    }
    app.metrics.requests.with_label_values(&[route.as_str(), status.as_str()]).inc();
    span.in_scope(|| tracing::info!(status = status.as_u16(), seconds = begun.elapsed().as_secs_f64(), "answered"));
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}
