//! The `config.json` of a bundle.

use std::path::{Path, PathBuf};

use eqim::bundle::{Bundle, CONFIG_FILE, Precision};
use eqim::generate::memory::check_memory;
use eqim::model::Stage;
use eqim::request::Request;
use eqim::{Result, files};
use eqim_export::lower::Options;
use eqim_export::write::draft;

use super::{Place, write};
use crate::small;
use crate::target::{Hostile, Target};

/// All targets with bundles.
pub(super) fn all() -> Result<Vec<Box<dyn Target>>> {
    let place = Place::new()?;
    let folder = place.path("bundle");
    let options = Options { precision: Precision::Fp32, opset: 20, policy: None, functions: true };
    let bundle = draft(&folder, &small::config(), &small::weights()?, options, |_| {})?.publish()?;
    let path = bundle.folder.join(CONFIG_FILE);
    let seed = files::read(&path)?;
    Ok(vec![Box::new(Configuration { _place: place, folder, path, seed })])
}

/// Opens a bundle with another `config.json`.
struct Configuration {
    _place: Place,
    folder: PathBuf,
    path: PathBuf,
    seed: Vec<u8>,
}

impl Target for Configuration {
    fn name(&self) -> &'static str {
        "bundle-config"
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        vec![self.seed.clone()]
    }

    fn hostile(&self) -> Vec<Hostile> {
        let text = String::from_utf8_lossy(&self.seed);
        let with = |from: &str, to: &str| text.replacen(from, to, 1).into_bytes();
        let names: Vec<String> = (0..1 << 20).map(|class| format!("\"class {class}\"")).collect();
        let many = format!("\"class_num\": {}, \"class_names\": [{}]", names.len(), names.join(","));
        vec![
            ("2^63 blocks", with("\"depth\": 1", "\"depth\": 9223372036854775807")),
            ("a million classes with names", with("\"class_num\": 3", &many)),
            ("channels that a downsampling cannot divide", with("\"len_down_scale\": 0", "\"len_down_scale\": 9")),
            ("a graph outside of the bundle", with("prefill.onnx", "../../etc/passwd")),
            ("nested lists", b"[".repeat(1 << 20)),
        ]
    }

    /// The errors name the file of the bundle that they are about.
    fn path(&self) -> Option<&Path> {
        Some(&self.folder)
    }

    fn read(&mut self, input: &[u8]) -> Result<String> {
        write(&self.path, input)?;
        let config = Bundle::open(&self.folder)?.manifest.model;
        // What the programs do with the configuration before they load the weights.
        for stage in Stage::ALL {
            stage.inputs(&config);
        }
        let request = Request::new(&config, [Some(0)], 16);
        let checked = request.check(&config).and_then(|()| check_memory(&request, &config, None));
        checked.map_err(|error| error.about(self.folder.display()))?;
        Ok(String::new())
    }
}
