//! ONNX Runtime.
use std::path::Path;
use eqim::Result;
use crate::bundle::Bundle;
/// placeholder
pub struct OrtEngine;
impl OrtEngine {
    /// placeholder
    pub fn new(_bundle: &Bundle, _library: &Path, _threads: Option<usize>) -> Result<eqim::candle::CandleEngine> { todo!() }
}
