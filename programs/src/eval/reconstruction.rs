//! Encodes photographs with the tokenizer of a bundle, and decodes them.

use std::path::{Path, PathBuf};

use clap::Args;
use eqim::bundle::Bundle;
use eqim::engine::Engine;
use eqim::picture::folder::{Entry, Folder};
use eqim::picture::quality::psnr_of_values;
use eqim::picture::{self, Side};
use eqim::{Error, Result, ResultExt};
use eqim_cli::Progress;
use eqim_engines::{Options, open};
use ndarray::{Array3, Axis};

use super::sets::is_occupied;

/// How photographs are reconstructed.
#[derive(Args)]
pub struct Reconstruction {
    /// Folder of the exported model, as written by `eqim-export onnx`
    #[arg(long, value_name = "BUNDLE")]
    engine: PathBuf,

    /// Folder to make, with `photographs` as the encoder sees them, and `reconstructions` with the same names
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,

    /// How to run the bundle.
    #[command(flatten)]
    options: Options,
}

/// Two folders of pictures with the same names.
pub struct Pairs {
    /// The photographs, scaled to the height of the model and cut to whole tokens.
    pub photographs: PathBuf,
    /// Their reconstructions.
    pub reconstructions: PathBuf,
    /// Peak signal-to-noise ratio in dB of each reconstruction.
    pub psnr: Vec<f64>,
}

impl Reconstruction {
    /// Reconstructs the photographs of a folder. The results have its sub-folders.
    ///
    /// # Errors
    /// [`Error::input`] if the output has files already or a photograph cannot be used; errors of the engine.
    pub fn run(&self, photos: &Path) -> Result<Pairs> {
        if is_occupied(&self.output)? {
            let problem = "has files already: choose another folder, or remove it";
            return Err(Error::input(self.output.display(), problem).with_field("output"));
        }
        let engine = open(&Bundle::open(&self.engine)?, &self.options)?;
        let look = |path: &Path, bytes: &[u8]| picture::decode(path, bytes).map(|picture| picture.dimensions());
        let found = Folder::open(photos, look)?;
        found.skipped.iter().for_each(|problem| eqim_cli::note(format_args!("skipped: {problem}")));

        let folder = |name: &str| self.output.join(name);
        let (photographs, reconstructions) = (folder("photographs"), folder("reconstructions"));
        let mut psnr = vec![];
        let mut progress = Progress::new("reconstructed", found.pictures.len(), "photographs");
        for Entry { path, class, .. } in &found.pictures {
            let (photo, made) = pair(engine.as_ref(), path)?;
            psnr.push(psnr_of_values(made.view(), photo.view()));
            // Photographs of one name and several formats stay apart.
            let name = path.file_name().unwrap_or_default().to_string_lossy().replace('.', "-");
            for (folder, image) in [(&photographs, &photo), (&reconstructions, &made)] {
                let folder = class.map_or(folder.clone(), |class| folder.join(&found.classes[class]));
                std::fs::create_dir_all(&folder).or_run(folder.display())?;
                picture::write_png(&folder.join(format!("{name}.png")), image.view())?;
            }
            progress.at(psnr.len());
        }
        Ok(Pairs { photographs, reconstructions, psnr })
    }
}

/// A photograph and its reconstruction, both `[3, height, width]` in -1..1.
fn pair(engine: &dyn Engine, path: &Path) -> Result<(Array3<f32>, Array3<f32>)> {
    let tokenizer = &engine.config().tokenizer;
    let photo = picture::read(path, tokenizer.image_height(), tokenizer.token_width(), Side::Right)?.pixels;
    let latents = engine.encode(photo.view().insert_axis(Axis(0)))?;
    let made = engine.decode(latents.view())?.index_axis_move(Axis(0), 0);
    match made.iter().all(|value| value.is_finite()) {
        true => Ok((photo, made.mapv(|value| value.clamp(-1.0, 1.0)))),
        false => Err(Error::run(path.display(), "its reconstruction has a pixel that is not finite")),
    }
}
