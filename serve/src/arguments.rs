//! The flags of `eqim-serve`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use axum::http::HeaderValue;
use clap::Parser;
use eqim::{Error, Result, files};
use eqim_cli::flags::within;
use eqim_engines::Options;

/// Name of the environment variable with the key of clients.
const KEY_VARIABLE: &str = "EQIM_API_KEY";

const EXAMPLES: &str = "\
Examples:
  eqim-serve --engine bundle
  eqim-serve --engine fast=int8 --engine exact=fp32 --port 9000 --api-key-file keys.txt
  curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' -d '{\"prompt\": \"forest\"}'";

/// Serve bundles that eqim-export wrote over HTTP, with OpenAI's images API.
///
/// Requests of all clients share batches. SIGTERM and Ctrl-C stop the admission, and what runs is finished.
#[derive(Clone, Debug, Parser)]
#[command(name = "eqim-serve", version, after_help = EXAMPLES)]
pub struct Arguments {
    /// Folder of an exported model, and the name that requests give it [default name: that of the folder]; can be given
    /// several times. The first one is the default
    #[arg(long = "engine", value_name = "[NAME=]BUNDLE", required = true)]
    pub engines: Vec<String>,

    /// Address to listen on. Addresses other than those of this machine need keys
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: IpAddr,

    /// Port to listen on; 0 is any free port
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub port: u16,

    /// File with the keys of clients, one per line, which they send as `Authorization: Bearer KEY`. The variable
    /// EQIM_API_KEY can hold one key instead
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Serve without keys on an address that other machines reach
    #[arg(long)]
    pub insecure: bool,

    /// Origin of pages that browsers let use this service, for example `https://example.org`; can be given several times.
    /// By default only the service's own page can
    #[arg(long, value_name = "ORIGIN")]
    pub cors_origin: Vec<HeaderValue>,

    /// Maximum number of images in a batch
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = images)]
    pub max_batch: usize,

    /// Maximum number of images that wait. Requests for more are refused with status 429
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = waiting)]
    pub max_queue: usize,

    /// Maximum length of an image in tokens
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = tokens)]
    pub max_tokens: usize,

    /// Maximum time of a request in seconds
    #[arg(long, value_name = "S", default_value_t = 600, value_parser = seconds)]
    pub request_timeout: u64,

    /// Maximum time in seconds to finish what runs after SIGTERM
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = seconds)]
    pub drain_timeout: u64,

    /// Log one JSON object per line
    #[arg(long)]
    pub log_json: bool,

    /// How to run the bundles.
    #[command(flatten)]
    pub options: Options,
}

impl Arguments {
    /// The address to listen on.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.host, self.port)
    }

    /// Maximum time of a request.
    pub fn request_timeout(&self) -> Duration {
        Duration::from_secs(self.request_timeout)
    }

    /// Names and folders of the bundles.
    ///
    /// # Errors
    /// [`Error::input`] if two bundles have the same name.
    pub fn bundles(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut bundles: Vec<(String, PathBuf)> = vec![];
        for text in &self.engines {
            let (name, folder) = match text.split_once('=') {
                Some((name, folder)) => (name.to_string(), PathBuf::from(folder)),
                None => {
                    let folder = PathBuf::from(text);
                    let full = folder.canonicalize().unwrap_or_else(|_| folder.clone());
                    (full.file_name().map_or_else(|| text.clone(), |name| name.to_string_lossy().into()), folder)
                }
            };
            if name.is_empty() || bundles.iter().any(|(other, _)| *other == name) {
                let problem = format!("names a model {name:?}, expected another name for each: give it as NAME=BUNDLE");
                return Err(Error::input(format!("--engine {text}"), problem));
            }
            bundles.push((name, folder));
        }
        Ok(bundles)
    }

    /// The keys of clients. Empty if there are none.
    ///
    /// # Errors
    /// [`Error::input`] if the file cannot be read or has no key, or if the address needs keys and there are none.
    pub fn keys(&self) -> Result<Vec<String>> {
        let keys: Vec<String> = match &self.api_key_file {
            Some(path) => {
                let text = String::from_utf8(files::read(path)?)
                    .map_err(|error| Error::input_caused(path.display(), error))?;
                let keys: Vec<_> =
                    text.lines().map(|line| line.trim().to_string()).filter(|key| !key.is_empty()).collect();
                if keys.is_empty() {
                    return Err(Error::input(path.display(), "has no key, expected one key per line"));
                }
                keys
            }
            None => std::env::var(KEY_VARIABLE).ok().filter(|key| !key.is_empty()).into_iter().collect(),
        };
        if keys.is_empty() && !self.host.is_loopback() && !self.insecure {
            let problem = format!(
                "is {}, which other machines reach: give --api-key-file or {KEY_VARIABLE}, or --insecure to serve anyone",
                self.host
            );
            return Err(Error::setting("host", problem));
        }
        Ok(keys)
    }
}

fn images(text: &str) -> Result<usize, String> {
    within(text, 1..=4096)
}

fn waiting(text: &str) -> Result<usize, String> {
    within(text, 0..=1_000_000)
}

fn tokens(text: &str) -> Result<usize, String> {
    within(text, 2..=eqim::request::MOST_TOKENS)
}

fn seconds(text: &str) -> Result<u64, String> {
    within(text, 1..=1_000_000)
}
