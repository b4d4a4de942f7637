//! Checks the memory that a run needs before it begins.

use super::tiles::Tiling;
use crate::request::Request;
use crate::{Config, Error, Result};

/// Largest size in bytes of a single tensor of a run.
const MOST_BYTES: u64 = 16 << 30;

/// Rejects a request whose tensors are too large, because allocation could fail after minutes of work. Two tensors are
/// checked: the scores of the decoder's attention over a whole image or tile, and the flow head's modulations for all
/// steps.
///
/// # Errors
/// [`Error::setting`] naming the setting that is too large.
pub fn check_memory(request: &Request, config: &Config, tiling: Option<Tiling>) -> Result<()> {
    let refuse = |field: &'static str, what: &str, bytes: u64| {
        let (needed, most) = (bytes >> 30, MOST_BYTES >> 30);
        Err(Error::setting(field, format!("is too large: {what} would take {needed} GB, expected at most {most} GB")))
    };
    let decoded = tiling.map_or(request.tokens, |tiling| tiling.tile.min(request.tokens));
    let cells = config.tokenizer.attention_cells(decoded) as u64;
    let scores = 4 * cells.saturating_mul(cells);
    if scores > MOST_BYTES {
        let (field, what) = match tiling {
            None => ("tokens", "the decoder's attention over the whole image"),
            Some(_) => ("tile", "the decoder's attention over a tile"),
        };
        return refuse(field, what, scores);
    }
    let g = &config.generator;
    let streams = request.classes.len() * if request.cfg == 1.0 { 1 } else { 2 };
    let modulations =
        4 * (request.solver.evaluations(request.steps) * streams * (3 * g.flow_depth + 2) * g.flow_dim) as u64;
    if modulations > MOST_BYTES {
        return refuse("steps", "the flow head's modulations for this many images", modulations);
    }
    Ok(())
}
