//! `POST /v1/images/…`: images of classes and continued pictures, whole or strip by strip.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Multipart, Path, State};
use axum::http::StatusCode;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use eqim::generate::worker::Command;
use eqim::request::condition::ClassSchedule;
use eqim::request::settings::{ClassCourse, ClassName, Settings};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::api::{Amended, Body, Classes, Dated, Edit, Envelope, Event, Images};
use crate::app::App;
use crate::failure::Failure;
use crate::image::{Image, now};
use crate::request::{Wanted, form, parse};

/// Largest time for a picture to arrive.
const MOST_TIME_OF_PICTURE: Duration = Duration::from_secs(60);

/// Sends the events of a stream.
type Sender = mpsc::UnboundedSender<Result<sse::Event, Infallible>>;

/// Generates images.
///
/// With `"stream": true` the answer is a stream of server-sent events: strips from left to right, and at last the image.
///
/// # Errors
/// If the request cannot be served.
#[utoipa::path(
    post, path = "/v1/images/generations", tag = "images", request_body = Body,
    responses((status = 200, body = Images), (status = "4XX", body = Envelope), (status = "5XX", body = Envelope))
)]
pub async fn generations(State(app): State<Arc<App>>, body: Bytes) -> Result<Response, Failure> {
    app.accepts()?;
    let wanted = Wanted::new(&app, parse(&body)?, None).await?;
    respond(app, wanted).await
}

/// Continues a picture.
///
/// # Errors
/// If the request cannot be served.
#[utoipa::path(
    post, path = "/v1/images/edits", tag = "images", request_body(content = Edit, content_type = "multipart/form-data"),
    responses((status = 200, body = Images), (status = "4XX", body = Envelope), (status = "5XX", body = Envelope))
)]
pub async fn edits(State(app): State<Arc<App>>, multipart: Multipart) -> Result<Response, Failure> {
    app.accepts()?;
    let turn = app.pictures.acquire().await.map_err(Failure::internal)?;
    let edit = tokio::time::timeout(MOST_TIME_OF_PICTURE, form(multipart)).await.unwrap_or_else(|_| {
        Err(Failure::new(StatusCode::REQUEST_TIMEOUT, "timeout", "the picture took too long to arrive: send it again"))
    });
    let Edit { image, body } = edit?;
    let wanted = Wanted::new(&app, body, Some(image)).await?;
    drop(turn);
    respond(app, wanted).await
}

/// Generates images, and sends them.
async fn respond(app: Arc<App>, wanted: Wanted) -> Result<Response, Failure> {
    let previewed = wanted.is_streamed && wanted.strips;
    let received = wanted.model.generate(&wanted.requests, wanted.tiling, previewed)?;
    let images: Vec<Image> = received
        .into_iter()
        .zip(&wanted.requests)
        .map(|((number, received), request)| Image::new(&app, &wanted, number, received, request))
        .collect();
    if wanted.is_streamed {
        return Ok(stream(app, images, wanted.strips, wanted.is_edit));
    }
    let mut data = vec![];
    for image in images {
        data.push(image.finish(None::<fn(_)>).await?);
    }
    Ok(Json(Images { created: now(), data, output_format: wanted.format }).into_response())
}

/// Sends the events of images, as they come.
fn stream(app: Arc<App>, images: Vec<Image>, strips: bool, is_edit: bool) -> Response {
    let (send, receive) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut working: JoinSet<Result<(), Failure>> = JoinSet::new();
        for image in images {
            working.spawn(stream_image(image, send.clone(), strips, is_edit));
        }
        let all = async {
            while let Some(done) = working.join_next().await {
                done.map_err(Failure::internal)??;
            }
            Ok(())
        };
        // If the client goes away, the images are dropped, and cancelled with it.
        let result = tokio::select! {
            result = tokio::time::timeout(app.request_timeout, all) => result.unwrap_or_else(|_| Err(Failure::late())),
            () = send.closed() => return,
        };
        if let Err(failure) = result {
            emit(&send, &failure.body());
        }
    });
    Sse::new(UnboundedReceiverStream::new(receive)).keep_alive(KeepAlive::default()).into_response()
}

/// Sends the events of one image.
async fn stream_image(image: Image, send: Sender, strips: bool, is_edit: bool) -> Result<(), Failure> {
    let partial = |strip| {
        let strip = Dated { created_at: now(), made: strip };
        emit(&send, &if is_edit { Event::EditPartial(strip) } else { Event::Partial(strip) });
    };
    let image = Dated { created_at: now(), made: image.finish(strips.then_some(partial)).await? };
    emit(&send, &if is_edit { Event::EditCompleted(image) } else { Event::Completed(image) });
    Ok(())
}

/// Sends an event under the name that its `type` is, unless the client is gone. Errors have none.
fn emit(send: &Sender, data: &impl Serialize) {
    /// The name in an event. The rest, which can be large, is not copied.
    #[derive(Deserialize)]
    struct Named<'a> {
        r#type: Option<&'a str>,
    }
    let named = serde_json::to_string(data).and_then(|text| {
        let name = serde_json::from_str::<Named>(&text)?.r#type.unwrap_or("error");
        Ok(sse::Event::default().event(name).data(&text))
    });
    match named {
        Ok(event) => drop(send.send(Ok(event))),
        Err(error) => tracing::error!("an event could not be written: {error}"),
    }
}

/// Changes the classes of an image that is being generated, as soon as possible.
///
/// # Errors
/// If there is no such image, or the classes do not fit the model.
#[utoipa::path(
    post, path = "/v1/images/generations/{id}/classes", tag = "images", request_body = Classes,
    params(("id" = String, Path, description = "Identifier of the image: its events have it")),
    responses((status = 200, body = Amended), (status = "4XX", body = Envelope), (status = "5XX", body = Envelope))
)]
pub async fn amend(State(app): State<Arc<App>>, Path(id): Path<String>, body: Bytes) -> Result<Json<Amended>, Failure> {
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
    let (first_token, classes) = receive.await.ok().flatten().ok_or_else(unknown)?;
    let classes = match classes {
        ClassSchedule::Constant(class) => ClassName::of(class).to_string(),
        ClassSchedule::Spans(spans) => ClassCourse::of(&spans).to_string(),
    };
    Ok(Json(Amended { id, first_token, classes }))
}
