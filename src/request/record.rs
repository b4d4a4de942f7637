//! The record of an image that is done: what made it. It is written next to the image, so that a repeated run knows which
//! images are done.

use serde::{Deserialize, Serialize};

use super::settings::Settings;
use crate::bundle::FileRecord;

/// What makes an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// Settings of the image.
    #[serde(flatten)]
    pub settings: Settings,
    /// SHA-256 of the weights.
    pub weights: String,
    /// SHA-256 of the file of the prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix_sha256: Option<String>,
}

/// The record of an image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// What made the image.
    #[serde(flatten)]
    pub origin: Origin,
    /// The file of the image.
    pub image: FileRecord,
}
