//! Connections of clients: their limits in time, and their end.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_io_timeout::TimeoutStream;

/// Largest time until the headers of the next request are complete.
const HEADERS: Duration = Duration::from_secs(30);
/// Largest time in which a client that does not read takes nothing.
const WRITE: Duration = Duration::from_secs(60);
/// Time until the next attempt if a connection cannot be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// Allows as many open connections as the system does: the usual limit is 1024 files.
#[cfg(unix)]
pub fn allow_many() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    if let Err(error) = raised {
        tracing::warn!("the limit of open connections could not be raised: {error}");
    }
}

/// Serves connections until `stop` is done, and then until all requests are answered.
pub async fn serve(listener: TcpListener, router: Router, stop: impl Future<Output = ()>) {
    let (end, ending) = watch::channel(());
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => break,
        };
        match accepted {
            Ok((stream, _)) => drop(tokio::spawn(connection(stream, router.clone(), ending.clone()))),
            Err(error) => {
                tracing::warn!("a connection could not be accepted: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    drop((listener, ending));
    end.send_replace(());
    // All connections have ended when nobody waits for the end.
    end.closed().await;
}

/// Serves a connection. At the end, it is closed after its present request.
async fn connection(stream: TcpStream, router: Router, mut ending: watch::Receiver<()>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE));
    let used = Arc::new(AtomicBool::new(false));
    let answer = |request: Request<Incoming>| {
        used.store(true, Ordering::Relaxed);
        TowerToHyperService::new(router.clone()).call(request.map(Body::new))
    };
    let mut server = http1::Builder::new();
    let server = server.timer(TokioTimer::new()).header_read_timeout(HEADERS);
    let mut connection = pin!(server.serve_connection(TokioIo::new(Box::pin(stream)), service_fn(answer)));
    tokio::select! {
        // The errors are those of clients that go away.
        _ = connection.as_mut() => return Ok(()),
        _ = ending.changed() => {}
    }
    if used.load(Ordering::Relaxed) {
        connection.as_mut().graceful_shutdown();
        let _ = connection.await;
    }
    Ok(())
}
