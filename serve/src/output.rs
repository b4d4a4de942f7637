//! Images in responses: their pixels and files.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use eqim::picture::{self, Format};

use crate::failure::Failure;

/// An image `[height, width, 3]` as a file in base64.
///
/// # Errors
/// If the format does not have images of this size.
pub fn encode(format: Format, pixels: &[u8], (width, height): (usize, usize)) -> Result<String, Failure> {
    let file = picture::encode(pixels, (width as u32, height as u32), format);
    Ok(STANDARD.encode(file.map_err(|error| Failure::param("output_format", error.to_string()))?))
}

/// Runs work that takes long on a thread for it.
///
/// # Errors
/// Those of the work.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(Failure::internal)?
}
