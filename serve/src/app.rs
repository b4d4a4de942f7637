//! The state that all requests share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::{HeaderValue, StatusCode};
use tokio::sync::Semaphore;

use crate::failure::Failure;
use crate::metrics::Metrics;
use crate::model::Model;

/// Largest number of pictures that are read at a time.
pub const MOST_PICTURES: usize = 4;

/// What all requests share.
pub struct App {
    /// The models. The first one is the default.
    pub models: Vec<Arc<Model>>,
    /// Keys of clients. Empty if anyone is served.
    pub keys: Vec<String>,
    /// Origins of pages that can use the service in a browser, in addition to its own page.
    pub origins: Vec<HeaderValue>,
    /// Largest length of an image in tokens.
    pub max_tokens: usize,
    /// Largest time of a request.
    pub request_timeout: Duration,
    /// Turns of requests that read a picture: together they would take much memory.
    pub pictures: Semaphore,
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
