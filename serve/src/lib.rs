//! `eqim-serve`: bundles over HTTP, with OpenAI's images API.

mod api;
mod app;
mod arguments;
mod body;
mod connections;
mod failure;
mod image;
mod images;
mod metrics;
mod model;
mod output;
mod page;
mod request;
mod routes;
mod watch;

use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::Parser;
use eqim::bundle::Bundle;
use eqim::{Error, Result};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};

use app::App;
use arguments::Arguments;
use metrics::Metrics;
use model::Model;
use routes::router;

/// Runs the program with its arguments, the first of which is its name. Returns the exit code of the process.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let arguments = Arguments::parse_from(arguments);
    eqim_cli::service(arguments.log_json, || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.map_err(|error| Error::run_caused("threads", error))?.block_on(serve(&arguments))
    })
}

/// Serves until a signal arrives, and then until all requests are done.
async fn serve(arguments: &Arguments) -> Result<()> {
    let keys = arguments.keys()?;
    let address = arguments.address();
    let bundles = arguments.bundles()?;
    let bundles: Vec<(String, Bundle)> =
        bundles.into_iter().map(|(name, folder)| Ok((name, Bundle::open(&folder)?))).collect::<Result<_>>()?;
    let bound = TcpListener::bind(address).await;
    let listener = bound.map_err(|error| Error::input_caused(format!("--host and --port: {address}"), error))?;
    let local = listener.local_addr().map_err(|error| Error::run_caused(address, error))?;
    let mut models = vec![];
    let mut opening = vec![];
    for (name, bundle) in bundles {
        let (send, opened) = oneshot::channel();
        let limits = (arguments.max_batch, arguments.max_queue);
        models.push(Arc::new(Model::open(&name, bundle, arguments.options.clone(), limits, send)?));
        opening.push((name, opened));
    }
    let app = Arc::new(App {
        models,
        keys,
        origins: arguments.cors_origin.clone(),
        max_tokens: arguments.max_tokens,
        request_timeout: arguments.request_timeout(),
        pictures: Semaphore::new(app::MOST_PICTURES),
        is_draining: false.into(),
        metrics: Metrics::new().map_err(|error| Error::run_caused("metrics", error))?,
        images: Default::default(),
    });
    let (drain, drained) = oneshot::channel::<()>();
    let stop = async {
        // The sender is dropped if the service fails.
        let _ = drained.await;
    };
    #[cfg(unix)]
    connections::allow_many();
    let server = tokio::spawn(connections::serve(listener, router(Arc::clone(&app)), stop));
    // All of them are waited for: a process that ends while a library is loaded can crash.
    let mut ready = Ok(());
    for (name, opened) in opening {
        let opened = opened.await.unwrap_or_else(|_| Err(Error::run(&name, "its thread has ended")));
        ready = ready.and(opened);
    }
    ready?;
    eqim_cli::say(format_args!("serving {} at http://{local}", names(&app)));
    signal().await?;
    app.is_draining.store(true, Ordering::SeqCst);
    eqim_cli::note("finishing what runs; new requests are refused");
    let _ = drain.send(());
    let limit = Duration::from_secs(arguments.drain_timeout);
    match tokio::time::timeout(limit, server).await {
        Ok(ended) => ended.map_err(|error| Error::run_caused("server", error)),
        Err(_) => Err(Error::run("--drain-timeout", format!("requests ran longer than {} s", limit.as_secs()))),
    }
}

/// Names of all models.
fn names(app: &App) -> String {
    app.models.iter().map(|model| model.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// Waits for SIGINT (Ctrl-C) or SIGTERM.
async fn signal() -> Result<()> {
    let failed = |error| Error::run_caused("signals", error);
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminated = signal(SignalKind::terminate()).map_err(failed)?;
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => interrupted.map_err(failed),
            _ = terminated.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await.map_err(failed)
}
