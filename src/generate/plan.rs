//! What settings ask for, checked before anything runs: the request, and how the images are decoded.

use ndarray::Array3;

use super::finish::Finish;
use super::memory::check_memory;
use super::tiles::Tiling;
use crate::picture::Side;
use crate::request::Request;
use crate::request::settings::{DEFAULT_TOKENS, Settings, TileSize};
use crate::{Config, Error, Result};

/// Largest number of tokens that is decoded as a whole by default. For longer images, attention soon costs more than
/// everything else.
const MOST_WHOLE: usize = 256;

/// What settings ask for.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The request. Its prefix is not set yet.
    pub request: Request,
    /// How the images are decoded; `None` is as a whole.
    pub tiling: Option<Tiling>,
    /// What happens to decoded columns.
    pub finish: Finish,
}

impl Plan {
    /// What `settings` ask for, if the images continue `beginning`, `[3, height, width]` in the order of generation. Without a
    /// length, [`DEFAULT_TOKENS`] are generated. For `in_tiles` see [`check`].
    ///
    /// # Errors
    /// [`Error::setting`] if a setting does not fit the model or the beginning.
    pub fn new(settings: &Settings, beginning: Option<&Array3<f32>>, in_tiles: bool, config: &Config) -> Result<Self> {
        let token_width = config.tokenizer.token_width();
        let given = beginning.map_or(0, |pixels| pixels.dim().2 / token_width);
        let has_length = settings.tokens.is_some() || settings.width.is_some();
        let settings = Settings {
            tokens: if has_length { settings.tokens } else { Some(given + DEFAULT_TOKENS) },
            prefix: beginning.map(|_| "image".into()),
            ..settings.clone()
        };
        let (request, tiling) = check(&settings, in_tiles, config)?;
        if given >= request.tokens {
            let tokens = request.tokens;
            let problem = format!("is {tokens}, and the picture to continue has {given}: ask for more");
            return Err(Error::setting("tokens", problem));
        }
        let keeps = settings.keep_prefix_pixels.unwrap_or_default();
        if keeps && beginning.is_none() {
            return Err(Error::setting("keep_prefix_pixels", "is true, which needs a picture to continue"));
        }
        let side = settings.direction.unwrap_or_default();
        let finish = Finish { kept: beginning.filter(|_| keeps).cloned(), side, token_width };
        Ok(Self { request, tiling, finish })
    }
}

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

/// Settings for a record of an image: all that the request and its decoding take from the model or a default is set.
pub fn recorded(settings: Settings, request: &Request, tiling: Option<Tiling>) -> Settings {
    let tile = tiling.map_or(TileSize::Whole, |tiling| TileSize::Tokens(tiling.tile));
    let overlap = tiling.map(|tiling| tiling.overlap);
    Settings { tile: Some(tile), overlap, ..settings.resolved(request, 0) }
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
