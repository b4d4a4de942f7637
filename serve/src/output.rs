//! Images in responses: their pixels and files.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use eqim::picture::{self, Format};
use ndarray::ArrayView3;

use crate::failure::Failure;

/// An image `[height, width, 3]` as a file in base64.
///
/// # Errors
/// If the format does not have images of this size.
pub fn encode(format: Format, pixels: &[u8], (width, height): (usize, usize)) -> Result<String, Failure> {
    let file = picture::encode(pixels, (width as u32, height as u32), format);
    Ok(STANDARD.encode(file.map_err(|error| Failure::param("output_format", error.to_string()))?))
}

/// An image that arrives in strips.
pub struct Pixels {
    /// Width and height in pixels.
    pub size: (usize, usize),
    /// Bytes, `[height, width, 3]`.
    pub bytes: Vec<u8>,
}

impl Pixels {
    /// A black image.
    pub fn new(size: (usize, usize)) -> Self {
        Self { size, bytes: vec![0; 3 * size.0 * size.1] }
    }

    /// Writes columns `[3, height, width]` at pixel `x`.
    pub fn write(&mut self, x: usize, columns: ArrayView3<f32>) {
        let count = columns.dim().2;
        for (y, row) in picture::bytes(columns).chunks(3 * count).enumerate() {
            let start = 3 * (y * self.size.0 + x);
            self.bytes[start..start + 3 * count].copy_from_slice(row);
        }
    }
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
