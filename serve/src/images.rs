//! `POST /v1/images/…`: images of classes and continued pictures, whole or strip by strip.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Multipart, Path, State};
use axum::http::StatusCode;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use eqim::generate::tiles::Tiling;
use eqim::generate::worker::Command;
use eqim::request::condition::ClassSchedule;
use eqim::request::settings::{ClassCourse, ClassName, Settings};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::app::App;
use crate::failure::Failure;
use crate::image::{Image, now};
use crate::request::{Prompt, Wanted, form, parse};

/// Tiling of the strips of an image that is decoded as a whole in the end.
const PREVIEW: Tiling = Tiling { tile: 16, overlap: 4 };

/// `POST /v1/images/generations`.
///
/// # Errors
/// If the request cannot be served.
pub async fn generations(State(app): State<Arc<App>>, body: Bytes) -> Result<Response, Failure> {
    app.accepts()?;
    let wanted = Wanted::new(&app, parse(&body)?, None).await?;
    respond(app, wanted).await
}

/// `POST /v1/images/edits`: continues a picture.
///
/// # Errors
/// If the request cannot be served.
pub async fn edits(State(app): State<Arc<App>>, multipart: Multipart) -> Result<Response, Failure> {
    app.accepts()?;
    let (body, photo) = form(multipart).await?;
    let wanted = Wanted::new(&app, body, Some(photo)).await?;
    respond(app, wanted).await
}

/// Generates images, and sends them.
async fn respond(app: Arc<App>, wanted: Wanted) -> Result<Response, Failure> {
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
