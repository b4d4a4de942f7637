//! The sets of images of `eqim-eval`: folders, whose features are made, and files of features.

use std::cell::OnceCell;
use std::path::Path;

use clap::Args;
use eqim::{Result, ResultExt};
use eqim_cli::Progress;
use eqim_evaluation::features::{Features, Origin, outputs};
use eqim_evaluation::network::Network;
use eqim_evaluation::pictures::{Crops, Pictures, batches};
use eqim_evaluation::resize::Protocol;

use super::network::{NetworkOptions, OnnxNetwork};

/// Which parts of the pictures are compared.
#[derive(Args)]
pub struct CropOptions {
    /// Compare N random squares of the whole height instead of whole images, in equal shares of the folders of classes
    /// and of their pictures
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=10_000_000))]
    crops: Option<u32>,

    /// Height to which pictures are scaled for --crops; lower pictures are skipped
    #[arg(long, value_name = "PIXELS", default_value_t = 256, requires = "crops", value_parser = clap::value_parser!(u32).range(16..=4096))]
    crop_size: u32,

    /// Random seed of --crops
    #[arg(long, value_name = "SEED", default_value_t = 1, requires = "crops")]
    crop_seed: u64,
}

/// Makes or reads features. The network is loaded when it is first needed.
pub struct Sets<'a> {
    options: &'a NetworkOptions,
    crops: Option<Crops>,
    network: OnceCell<OnnxNetwork>,
}

impl<'a> Sets<'a> {
    /// Sets whose features are made in this way.
    pub fn new(options: &'a NetworkOptions, crops: &CropOptions) -> Self {
        let CropOptions { crops, crop_size, crop_seed } = crops;
        let crops = crops.map(|count| Crops { count: count as usize, size: *crop_size as usize, seed: *crop_seed });
        Self { options, crops, network: OnceCell::new() }
    }

    /// The protocol of resizing.
    pub fn protocol(&self) -> Protocol {
        self.options.resize
    }

    /// The network.
    ///
    /// # Errors
    /// Those of [`OnnxNetwork::open`].
    pub fn network(&self) -> Result<&OnnxNetwork> {
        if self.network.get().is_none() {
            let network = OnnxNetwork::open(self.options)?;
            self.network.get_or_init(|| network);
        }
        // It was set above.
        self.network.get().ok_or_else(|| eqim::Error::run("network", "is not loaded"))
    }

    /// How features of a folder are made. `size` is the size of squares that are not random.
    ///
    /// # Errors
    /// Those of [`Sets::network`].
    pub fn origin(&self, folder: &Path, size: Option<usize>) -> Result<Origin> {
        let network = self.network()?;
        let squares = size.map(|size| Crops { count: 0, size, seed: 0 });
        Ok(Origin {
            images: folder.display().to_string(),
            network: network.name().into(),
            identity: network.identity().into(),
            resize: self.protocol(),
            crops: squares.or(self.crops),
        })
    }

    /// The features of two sets. Files are read before features of folders are made.
    ///
    /// # Errors
    /// Those of [`Sets::features`]; [`eqim::Error::input`] if the sets were made in different ways.
    pub fn pair(&self, images: &Path, real: &Path) -> Result<(Features, Features)> {
        let (images, real) = match Features::is_file(real) {
            true => {
                let real = self.features(real)?;
                (self.features(images)?, real)
            }
            false => (self.features(images)?, self.features(real)?),
        };
        images.check_comparable(&real)?;
        Ok((images, real))
    }

    /// The features of a folder, or of a file of features.
    ///
    /// # Errors
    /// [`eqim::Error::input`] if the folder or file cannot be used; errors of the network.
    pub fn features(&self, path: &Path) -> Result<Features> {
        if Features::is_file(path) {
            return Features::read(path);
        }
        let pictures = Pictures::open(path, self.crops.map_or(1, |crops| crops.size))?;
        report_skipped(&pictures);
        if let Some(crops) = self.crops.filter(|crops| crops.count > pictures.len() && pictures.squares() > 0) {
            let (count, all, squares) = (crops.count, pictures.len(), pictures.squares());
            tracing::warn!(
                "{}: {count} squares of {all} pictures repeat some, because {squares} pictures are not wider than high",
                path.display()
            );
        }
        let views = match self.crops {
            Some(crops) => pictures.crops(crops),
            None => pictures.whole()?,
        };
        let network = self.network()?;
        let mut progress = Progress::new("measured", views.len(), "images");
        let made = outputs(network, batches(&views, network, self.protocol()), |count| progress.at(count))?;
        drop(progress);
        Features::new(self.origin(path, None)?, &made)
    }
}

/// Whether a folder exists and has entries.
///
/// # Errors
/// [`eqim::Error::input`] if it cannot be read.
pub fn is_occupied(folder: &Path) -> Result<bool> {
    Ok(folder.exists() && std::fs::read_dir(folder).or_input(folder.display())?.count() > 0)
}

/// Names and counts the pictures that cannot be used.
pub fn report_skipped(pictures: &Pictures) {
    pictures.skipped.iter().for_each(|problem| eqim_cli::note(format_args!("skipped: {problem}")));
    let (used, skipped) = (pictures.len(), pictures.skipped.len());
    if skipped > 0 {
        eqim_cli::note(format_args!("{used} pictures, {skipped} skipped"));
    }
}
