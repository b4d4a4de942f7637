//! Generates a panorama and decodes it in tiles while it grows, in memory that does not depend on its width.
//!
//! ```console
//! cargo run --release --example stream_panorama -- target/example 512 target/panorama.png
//! ```

use std::path::Path;

use eqim::bundle::Bundle;
use eqim::generate::batch::{Batch, Sequence};
use eqim::generate::tiles::{TileDecoder, Tiling};
use eqim::picture::canvas::Canvas;
use eqim::request::{Noise, Request, Sampling};
use eqim_engines::{Options, open};

fn main() -> eqim::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, tokens, output] = &arguments[..] else {
        return Err(eqim::Error::input("arguments", "expected BUNDLE TOKENS PANORAMA.png"));
    };
    let tokens: usize = tokens.parse().map_err(|error| eqim::Error::input_caused(tokens, error))?;
    let engine = open(&Bundle::open(Path::new(folder))?, &Options::default())?;
    let config = engine.config();

    let request = Request { cfg: 3.0, noise: Noise::Seed(7), ..Request::new(config, [Some(0)], tokens) };
    request.check(config)?;
    let mut batch = Batch::new(engine.as_ref(), Sampling::new(config, &request))?;
    batch.admit(vec![(0, Sequence::streamed(config, &request, 0))])?;

    let mut decoder = TileDecoder::new(engine.as_ref(), Tiling { tile: 64, overlap: 16 }, tokens);
    let (width, height) = config.image_size(tokens);
    let columns = tempfile::NamedTempFile::new().map_err(|error| eqim::Error::run_caused("a temporary file", error))?;
    let mut canvas = Canvas::open(columns.path(), width, height)?;
    for _ in 0..tokens {
        for (_, token) in batch.advance()? {
            // A strip [3, H, W] is complete as soon as no later token can change it.
            if let Some(strip) = decoder.push(token?.view())? {
                canvas.write(strip.x, strip.pixels.view())?;
                println!("{} of {width} columns", strip.x + strip.pixels.dim().2);
            }
        }
    }
    canvas.write_png(Path::new(output))?;
    println!("wrote {output}");
    Ok(())
}
