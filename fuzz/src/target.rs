//! What is tried: a reader and its inputs.

use std::path::Path;

use eqim::Result;

/// A hostile input, with a name for reports.
pub type Hostile = (&'static str, Vec<u8>);

/// A reader that is tried on inputs.
pub trait Target {
    /// Name for command lines and reports.
    fn name(&self) -> &'static str;

    /// Inputs that the reader accepts.
    fn seeds(&self) -> Vec<Vec<u8>>;

    /// Inputs that once were read wrongly, or ended the process.
    fn hostile(&self) -> Vec<Hostile> {
        vec![]
    }

    /// The file that has the input. A message about the input has to name it. `None` if the caller of the reader adds the
    /// name.
    fn path(&self) -> Option<&Path>;

    /// Reads an input. Returns a text that identifies what was read.
    ///
    /// # Errors
    /// Those of the reader, which refuses the input.
    fn read(&mut self, input: &[u8]) -> Result<String>;

    /// Whether the input has a hash of its contents. Then an input that is accepted has the contents of a seed.
    fn is_sealed(&self) -> bool {
        false
    }
}
