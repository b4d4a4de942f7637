//! Errors of ONNX Runtime.

use eqim::Error;

/// Adds the subject, for example the name of a graph, to an error of ONNX Runtime.
pub(super) fn failed(subject: &str) -> impl Fn(ort::Error) -> Error {
    move |error| Error::run(subject, "ONNX Runtime").because(error)
}
