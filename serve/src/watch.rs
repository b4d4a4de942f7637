//! What tells about the service: models, health and metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::app::App;
use crate::failure::Failure;
use crate::model::Model;

/// `GET /metrics`, in the format of Prometheus.
///
/// # Errors
/// If the metrics cannot be written as text.
pub async fn metrics(State(app): State<Arc<App>>) -> Result<Response, Failure> {
    let failed =
        |error: prometheus::Error| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", error.to_string());
    let text = app.metrics.text(&app.models).map_err(failed)?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

/// `GET /health/ready`: whether all models have generated an image, and requests are accepted.
///
/// # Errors
/// If they have not, or are not.
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

/// `GET /v1/models`.
pub async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let data: Vec<Value> = app.models.iter().map(|model| described(model)).collect();
    Json(json!({ "object": "list", "data": data }))
}

/// `GET /v1/models/{id}`.
///
/// # Errors
/// If there is no such model.
pub async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, Failure> {
    Ok(Json(described(app.model(Some(&id))?.as_ref())))
}

fn described(model: &Model) -> Value {
    let (manifest, config) = (&model.manifest, &model.manifest.model);
    let precision = match &manifest.quantization {
        Some(_) => json!("int8"),
        None => json!(manifest.precision),
    };
    json!({
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "eqim",
        "precision": precision,
        "height": config.tokenizer.image_height(),
        "token_width": config.tokenizer.token_width(),
        "classes": config.generator.class_num,
        "class_names": config.generator.class_names,
        "steps": config.generator.steps,
        "fingerprint": manifest.weights.sha256,
    })
}
