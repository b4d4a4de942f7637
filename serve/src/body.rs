//! Bodies of requests: their limits, and what is left of them when a request is answered before they are read.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Frame, SizeHint};

/// Largest body of a request in bytes.
pub const MOST_BYTES: usize = 1 << 20;
/// Largest body of a request with a picture in bytes. Of other bodies, at most as much is read without a use.
pub const MOST_BYTES_OF_PICTURE: usize = 32 << 20;
/// Largest time between two pieces of a body.
pub const MOST_TIME_OF_PIECE: Duration = Duration::from_secs(30);
/// Largest time for what is read without a use.
const MOST_TIME: Duration = Duration::from_secs(10);

/// Reads what is left of a body before an error is sent: the connection is closed with it, and a client or a proxy that is
/// still sending would not see the answer.
pub async fn read_before_errors(request: Request, next: Next) -> Response {
    // Such a client sends the body only when it is asked to.
    let waits = request.headers().contains_key(header::EXPECT);
    let (parts, body) = request.into_parts();
    let body = Arc::new(Mutex::new(body));
    let response = next.run(Request::from_parts(parts, Body::new(Shared(Arc::clone(&body))))).await;
    if !waits && (response.status().is_client_error() || response.status().is_server_error()) {
        // The answer is sent anyway.
        let _ = tokio::time::timeout(MOST_TIME, read(Shared(body))).await;
    }
    response
}

/// Reads a body until it ends, fails, or is too long.
async fn read(mut body: Shared) {
    let mut left = MOST_BYTES_OF_PICTURE;
    std::future::poll_fn(|context| {
        loop {
            let Some(Ok(frame)) = ready!(Pin::new(&mut body).poll_frame(context)) else { return Poll::Ready(()) };
            match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
                Some(fewer) => left = fewer,
                None => return Poll::Ready(()),
            }
        }
    })
    .await;
}

/// A body that is read by a route, and then by [`read`].
struct Shared(Arc<Mutex<Body>>);

impl HttpBody for Shared {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).size_hint()
    }
}
