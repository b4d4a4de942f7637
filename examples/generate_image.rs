//! Generates an image of each class from a bundle.
//!
//! ```console
//! cargo run --release --example generate_image -- target/example target/image.png
//! ```

use std::path::PathBuf;

use eqim::bundle::Bundle;
use eqim::generate::generate;
use eqim::picture;
use eqim::request::{Noise, Request};
use eqim_engines::{Options, open};
use ndarray::{Axis, concatenate};

fn main() -> eqim::Result<()> {
    let mut arguments = std::env::args().skip(1).map(PathBuf::from);
    let (Some(folder), Some(output)) = (arguments.next(), arguments.next()) else {
        return Err(eqim::Error::input("arguments", "expected BUNDLE IMAGE.png"));
    };
    let bundle = Bundle::open(&folder)?;
    // TensorRT, ONNX Runtime or Candle: the first that the bundle and the machine have.
    let engine = open(&bundle, &Options::default())?;

    let config = engine.config();
    let classes = (0..config.generator.class_num).map(Some);
    let request = Request { cfg: 3.0, noise: Noise::Seed(7), ..Request::new(config, classes, 16) };
    let generated = generate(engine.as_ref(), &request, |done| println!("{done} of {} tokens", request.tokens))?;

    // Images [B, 3, H, W], one below the other.
    let images = engine.decode_tokens(generated.tokens.view())?;
    let rows: Vec<_> = images.axis_iter(Axis(0)).collect();
    let image = concatenate(Axis(1), &rows).expect("images of one size");
    picture::write_png(&output, image.view())?;
    println!("wrote {}", output.display());
    Ok(())
}
