//! The `.safetensors` files of eqim, which hold the configuration of their model.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::tensors::{self, TensorFile, Values};
use crate::config::{GeneratorConfig, TokenizerConfig};
use crate::{Config, Error, Result, ResultExt};

/// Key of the configuration, as JSON, in the metadata of eqim's `.safetensors` files. It is the only key, so that the
/// bytes of a file depend only on its contents.
pub const CONFIG_KEY: &str = "eqim";

/// Configuration in a `.safetensors` file of eqim. The file holds the tensors of the generator, of the tokenizer or of
/// both.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredConfig {
    /// Configuration of the generator, if the file holds its tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generator: Option<GeneratorConfig>,
    /// Configuration of the tokenizer, if the file holds its tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<TokenizerConfig>,
}

/// Writes tensors with the configuration of their model. `path` is replaced only once the file is complete.
///
/// # Errors
/// [`Error::run`] if the file cannot be written.
pub fn write(path: &Path, config: &StoredConfig, stored: &[(&str, Tensor)]) -> Result<()> {
    let values: Vec<(&str, Values)> =
        stored.iter().map(|(name, tensor)| (*name, Values::Tensor(tensor.clone()))).collect();
    write_values(path, config, &values)
}

/// Writes like [`write()`], but also accepts values of other types ([`Values::Raw`]).
///
/// # Errors
/// [`Error::run`] if the file cannot be written.
pub fn write_values(path: &Path, config: &StoredConfig, stored: &[(&str, Values)]) -> Result<()> {
    let config = serde_json::to_string(config).or_run(path.display())?;
    tensors::write_values(path, stored, HashMap::from([(CONFIG_KEY.to_string(), config)]))
}

/// The configuration of a complete model in the metadata of a `.safetensors` file.
///
/// # Errors
/// [`Error::input`] if the metadata does not hold a valid configuration of the generator and of the tokenizer.
pub fn stored_config(file: &TensorFile) -> Result<Config> {
    let none = || {
        let problem = format!("has no `{CONFIG_KEY}` in its metadata, so eqim did not write it");
        Error::input(file.path().display(), problem)
    };
    let StoredConfig { generator, tokenizer } = stored(file)?.ok_or_else(none)?;
    Ok(Config { generator: part(file, generator, "generator")?, tokenizer: part(file, tokenizer, "tokenizer")? })
}

/// The configuration in the metadata of a file; `None` if eqim did not write it.
pub(super) fn stored(file: &TensorFile) -> Result<Option<StoredConfig>> {
    let Some(text) = file.text(CONFIG_KEY) else { return Ok(None) };
    let subject = format!("{}: `{CONFIG_KEY}` in its metadata", file.path().display());
    serde_json::from_str(text).or_input(subject).map(Some)
}

/// One half of a configuration.
pub(super) fn part<T>(file: &TensorFile, config: Option<T>, name: &str) -> Result<T> {
    let none = || Error::input(file.path().display(), format!("`{CONFIG_KEY}` in its metadata describes no {name}"));
    config.ok_or_else(none)
}
