//! What settings ask for, checked before anything runs: the request, and how the images are decoded.

use super::memory::check_memory;
use super::tiles::Tiling;
use crate::picture::Side;
use crate::request::Request;
use crate::request::settings::{Settings, TileSize};
use crate::{Config, Error, Result};

/// Largest number of tokens that is decoded as a whole by default. For longer images, attention soon costs more than
/// everything else.
const MOST_WHOLE: usize = 256;

/// Checks the settings without reading a file. Returns the request, without prefix and noise that are read from files,
/// and the tiling of the decoder; `None` decodes the images as a whole. `in_tiles` is set if the output is a folder of tiles.
///
/// # Errors
/// [`Error::setting`] if a setting does not fit the model.
pub fn check(settings: &Settings, in_tiles: bool, config: &Config) -> Result<(Request, Option<Tiling>)> {
    let request = settings.request(config)?;
    let tiling = tiling(settings, in_tiles, request.tokens)?;
    check_memory(&request, config, tiling)?;
    if settings.prefix.is_none() && settings.direction == Some(Side::Left) {
        return Err(Error::setting("direction", "is left, which requires a prefix to continue"));
    }
    Ok((request, tiling))
}

/// Tiling for images of `tokens` tokens; `None` decodes them as a whole.
fn tiling(settings: &Settings, in_tiles: bool, tokens: usize) -> Result<Option<Tiling>> {
    let tile = match settings.tile {
        Some(TileSize::Tokens(tile)) => tile,
        Some(TileSize::Whole) if in_tiles => {
            let problem = "is none, but an output folder requires tiles: name a PNG as the output, or omit tile";
            return Err(Error::setting("tile", problem));
        }
        None if tokens > MOST_WHOLE || in_tiles => Tiling::default().tile,
        Some(TileSize::Whole) | None => return Ok(None),
    };
    let tiling = Tiling { tile, overlap: settings.overlap.unwrap_or(tile / 4) };
    tiling.check()?;
    Ok(Some(tiling))
}
