//! Checks the memory that a run needs before it begins.

use super::tiles::Tiling;
use crate::request::Request;
use crate::{Config, Error, Result, limits};

/// Rejects a request whose tensors are too large, because allocation could fail after minutes of work. Three kinds are
/// checked: those of [`check_sampling`], and the scores of the decoder's attention over a whole image or tile.
///
/// # Errors
/// [`Error::setting`] naming the setting that is too large.
pub fn check_memory(request: &Request, config: &Config, tiling: Option<Tiling>) -> Result<()> {
    check_sampling(request, config)?;
    let decoded = tiling.map_or(request.tokens, |tiling| tiling.tile.min(request.tokens));
    let cells = config.tokenizer.attention_cells(decoded);
    let (field, what) = match tiling {
        None => ("tokens", "the decoder's attention over the whole image"),
        Some(_) => ("tile", "the decoder's attention over a tile"),
    };
    // The scores and their softmax.
    check(field, what, &[2, cells, cells])
}

/// Rejects a request whose tokens take too much memory, whether they are decoded or not. Two kinds of tensors are
/// checked: the tokens of all images with their noise and prefix, and the flow head's modulations for all steps.
///
/// # Errors
/// [`Error::setting`] naming the setting that is too large.
pub fn check_sampling(request: &Request, config: &Config) -> Result<()> {
    const TENSORS: usize = 3;
    let (g, images) = (&config.generator, request.classes.len());
    check("tokens", "the tokens of this many images", &[TENSORS, images, request.tokens, g.embed])?;
    let streams = if request.cfg == 1.0 { 1 } else { 2 };
    let evaluations = request.solver.evaluations(request.steps);
    let sizes = [evaluations, streams, images, 3 * g.flow_depth + 2, g.flow_dim];
    check("steps", "the flow head's modulations for this many images", &sizes)
}

/// Bytes that an image in progress takes, whatever its length: the keys and values of its rows, and the flow head's
/// modulations for all evaluations of a token.
pub fn of_image(config: &Config, evaluations: usize, guided: bool) -> u64 {
    let g = &config.generator;
    let caches = 2 * g.depth * (g.window + g.buffer) * g.dim;
    let modulations = evaluations * (3 * g.flow_depth + 2) * g.flow_dim;
    let rows = if guided { 2 } else { 1 };
    (size_of::<f32>() * rows * (caches + modulations)) as u64
}

/// Checks the size of tensors of 32-bit numbers: the product of `sizes`.
fn check(field: &'static str, what: &str, sizes: &[usize]) -> Result<()> {
    // The other half is for what is computed with them.
    let most = limits::memory() / 2;
    limits::check_memory("is too large", what, [sizes], most).map_err(|error| Error::setting(field, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Preset;

    #[test]
    fn sizes_are_multiplied_without_overflow() {
        let config = Preset::Small.config();
        let request = |images: usize, tokens| Request::new(&config, vec![Some(0); images], tokens);
        let tiling = Some(Tiling { tile: 64, overlap: 8 });
        let refused = |request: &Request, words: &str| {
            for result in [check_sampling(request, &config), check_memory(request, &config, tiling)] {
                let error = result.unwrap_err().to_string();
                assert!(error.starts_with(words), "{error}");
            }
        };
        refused(&request(4096, 1_000_000), "tokens is too large: the tokens of this many images");
        refused(&request(1, usize::MAX), "tokens is too large");
        refused(&Request { steps: usize::MAX, ..request(2, 16) }, "steps is too large");
        check_sampling(&request(4, 1_000_000), &config).unwrap();
        check_memory(&request(4, 1_000_000), &config, tiling).unwrap();
        assert!(check_memory(&request(1, 1_000_000), &config, None).is_err());
    }
}
