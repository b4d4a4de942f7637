//! Decoding of tokens to an image file.

use std::path::Path;
use std::time::Duration;

use eqim::engine::Engine;
use eqim::generate::tiles::{Strip, Tiling, decode_tiles};
use eqim::picture::canvas::Canvas;
use eqim::request::timing::timed;
use eqim::temporary::Temporary;
use eqim::{Error, Result, ResultExt, files, picture};
use ndarray::{ArrayView2, Axis};

use super::finish::Finish;

/// Decodes the tokens `[N, E]` of one image and writes the image.
///
/// # Errors
/// If the engine fails, a pixel is not finite, or the file cannot be written.
pub fn decode_to(
    engine: &dyn Engine,
    tokens: ArrayView2<f32>,
    tiling: Option<Tiling>,
    finish: &Finish,
    path: &Path,
    time: &mut Duration,
) -> Result<()> {
    let (width, height) = engine.config().image_size(tokens.dim().0);
    let Some(tiling) = tiling else {
        let image = timed(time, || engine.decode_tokens(tokens.insert_axis(Axis(0))))?.index_axis_move(Axis(0), 0);
        if image.iter().any(|value| !value.is_finite()) {
            let path = path.display();
            let problem = format!("the image for {path} has values that are not finite: its precision does not fit");
            return Err(Error::run(engine.name(), problem));
        }
        return picture::write_png(path, finish.columns(0, image, width).1.view());
    };
    let beside = Temporary::new(files::folder(path), 0o700).or_run(path.display())?;
    let mut canvas = Canvas::open(&beside.path().join("pixels.rgb"), width, height)?;
    let write = |strip: Strip| {
        let (x, pixels) = finish.columns(strip.x, strip.pixels, width);
        canvas.write(x, pixels.view())
    };
    timed(time, || decode_tiles(engine, tiling, tokens, write))?;
    canvas.write_png(path)
}
