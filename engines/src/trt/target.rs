//! GPUs that engines are built for.

use std::fmt;
use std::str::FromStr;

use eqim::{Error, Result};
use serde::{Deserialize, Serialize};

/// Compute capability of a GPU, for example `sm86`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Target(u32);

/// Names of GPU generations, and the capabilities that TensorRT for RTX builds for.
const GENERATIONS: [(&str, &[u32]); 4] =
    [("turing", &[75]), ("ampere", &[80, 86]), ("ada", &[89]), ("blackwell", &[120, 121])];

/// Capabilities of datacenter GPUs that only ordinary TensorRT builds for.
const ENTERPRISE: [u32; 2] = [90, 100];

impl Target {
    /// Targets with this name: all targets of a generation such as `ampere`, or one target such as `sm86`.
    ///
    /// # Errors
    /// [`Error::setting`] if the name is not known. The message lists the known names.
    pub fn named(name: &str) -> Result<Vec<Self>> {
        let lower = name.to_lowercase();
        if let Some((_, capabilities)) = GENERATIONS.iter().find(|(generation, _)| *generation == lower) {
            return Ok(capabilities.iter().map(|&capability| Self(capability)).collect());
        }
        Ok(vec![lower.parse()?])
    }

    /// The compute capability times ten.
    pub fn capability(self) -> u32 {
        self.0
    }
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = || GENERATIONS.iter().flat_map(|(_, capabilities)| *capabilities).chain(&ENTERPRISE);
        let number = text.strip_prefix("sm").and_then(|number| number.parse().ok());
        match number.filter(|number| known().any(|capability| capability == number)) {
            Some(capability) => Ok(Self(capability)),
            None => {
                let names: Vec<&str> = GENERATIONS.iter().map(|(name, _)| *name).collect();
                let mut capabilities: Vec<u32> = known().copied().collect();
                capabilities.sort_unstable();
                let capabilities: Vec<String> =
                    capabilities.iter().map(|capability| format!("sm{capability}")).collect();
                let expected = format!("expected {} or {}", names.join(", "), capabilities.join(", "));
                Err(Error::setting("target", format!("is {text}, {expected}")))
            }
        }
    }
}

impl TryFrom<String> for Target {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Target> for String {
    fn from(target: Target) -> Self {
        target.to_string()
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm{}", self.0)
    }
}
