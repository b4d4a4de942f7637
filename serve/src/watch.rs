//! What tells about the service: models, health and metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::api::{Envelope, Model, Models};
use crate::app::App;
use crate::failure::Failure;

/// Metrics in the format of Prometheus.
///
/// # Errors
/// If the metrics cannot be written as text.
#[utoipa::path(
    get, path = "/metrics", tag = "service",
    responses((status = 200, body = String, content_type = "text/plain"), (status = "4XX", body = Envelope))
)]
pub async fn metrics(State(app): State<Arc<App>>) -> Result<Response, Failure> {
    let text = app.metrics.text(&app.models).map_err(Failure::internal)?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

/// Whether the process answers.
#[utoipa::path(
    get, path = "/health/live", tag = "service", security(()),
    responses((status = 200, body = String, content_type = "text/plain"))
)]
pub async fn live() -> &'static str {
    "live\n"
}

/// Whether all models have generated an image, and requests are accepted.
///
/// # Errors
/// If they have not, or are not.
#[utoipa::path(
    get, path = "/health/ready", tag = "service", security(()),
    responses((status = 200, body = String, content_type = "text/plain"), (status = 503, body = Envelope))
)]
pub async fn ready(State(app): State<Arc<App>>) -> Result<&'static str, Failure> {
    app.accepts()?;
    match app.models.iter().find(|model| !model.state().is_ready) {
        Some(model) => {
            let message = format!("the model {} is not ready", model.name);
            Err(Failure::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message))
        }
        None => Ok("ready\n"),
    }
}

/// Lists the models.
#[utoipa::path(
    get, path = "/v1/models", tag = "models",
    responses((status = 200, body = Models), (status = "4XX", body = Envelope))
)]
pub async fn models(State(app): State<Arc<App>>) -> Json<Models> {
    let data = app.models.iter().map(|model| Model::of(&model.name, &model.manifest, app.max_tokens)).collect();
    Json(Models { object: "list", data })
}

/// Describes a model.
///
/// # Errors
/// If there is no such model.
#[utoipa::path(
    get, path = "/v1/models/{id}", tag = "models", params(("id" = String, Path, description = "Name of the model")),
    responses((status = 200, body = Model), (status = "4XX", body = Envelope))
)]
pub async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Model>, Failure> {
    let model = app.model(Some(&id))?;
    Ok(Json(Model::of(&model.name, &model.manifest, app.max_tokens)))
}
