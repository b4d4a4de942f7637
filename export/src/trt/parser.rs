//! Checks every node of a graph with TensorRT's ONNX parser. The interface that trtx wraps stops at the first node that
//! is not supported.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::pin::Pin;

use cxx::UniquePtr;
use cxx::memory::UniquePtrTarget;
use eqim::{Error, Result, ResultExt, files};
use eqim_engines::trt::library::{self, Library};
use libloading::Symbol;
use prost::Message;
use trtx::trtx_sys::nvinfer1::{IBuilder, INetworkDefinition};
use trtx::trtx_sys::nvonnxparser::IParser;
use trtx::trtx_sys::{self, RustLoggerBridge};

use crate::onnx;
use crate::trt::support::Unsupported;

/// The nodes of a graph that the parser does not support, with their names in the graph and TensorRT's reasons.
///
/// # Errors
/// [`Error::run`] if the library cannot be used; [`Error::input`] if the graph cannot be read.
pub fn unsupported(model: &Path) -> Result<Vec<Unsupported>> {
    let failed = |problem: String| Error::run(model.display(), format!("TensorRT's parser: {problem}"));
    let bytes = files::read(model)?;
    let graph = onnx::ModelProto::decode(&bytes[..]).or_input(model.display())?;
    let nodes = graph.graph.unwrap_or_default().node;
    let path = CString::new(model.as_os_str().as_encoded_bytes()).map_err(|error| failed(error.to_string()))?;
    let mut parser = Parser::new(Library::load()?).map_err(failed)?;
    let indices = parser.unsupported(&bytes, &path, nodes.len());
    let reasons = parser.errors();
    let reason = |position: usize| reasons.get(position).or(reasons.last()).cloned().unwrap_or_default();
    let node = |(position, &index): (usize, &usize)| {
        let node = nodes.get(index).cloned().unwrap_or_default();
        Unsupported {
            node: node.name.unwrap_or_default(),
            operator: node.op_type.unwrap_or_default(),
            target: None,
            reason: reason(position),
        }
    };
    Ok(indices.iter().enumerate().map(node).collect())
}

/// A parser with an empty network. The fields are dropped in this order, because each field uses the fields after it.
struct Parser {
    parser: UniquePtr<IParser>,
    _network: UniquePtr<INetworkDefinition>,
    _builder: UniquePtr<IBuilder>,
    _logger: Logger,
}

impl Parser {
    fn new(library: &Library) -> Result<Self, String> {
        let logger = Logger::new()?;
        // SAFETY: the functions are the factories of NvInfer.h and NvOnnxParser.h, called with the versions of these
        // headers. Every returned object is new, has no other owner, and is destroyed before the object it was created
        // from.
        unsafe {
            let builder: *mut c_void = {
                let opened = library::open(&library.tensorrt()).map_err(|error| error.to_string())?;
                let create: Symbol<unsafe extern "C" fn(*mut c_void, i32) -> *mut c_void> =
                    opened.get(b"createInferBuilder_INTERNAL").map_err(|error| error.to_string())?;
                create(logger.interface(), trtx_sys::get_tensorrt_version() as i32)
            };
            let mut builder = owned::<IBuilder>(builder.cast(), "builder")?;
            let network = owned(builder.pin_mut().createNetworkV2(0), "network")?;
            let parser: *mut c_void = {
                let opened = library::open(&library.parser()).map_err(|error| error.to_string())?;
                let create: Symbol<unsafe extern "C" fn(*mut c_void, *mut c_void, i32) -> *mut c_void> =
                    opened.get(b"createNvOnnxParser_INTERNAL").map_err(|error| error.to_string())?;
                create(network.as_mut_ptr().cast(), logger.interface(), trtx_sys::get_nvonnxparser_version() as i32)
            };
            let parser = owned::<IParser>(parser.cast(), "parser")?;
            Ok(Self { parser, _network: network, _builder: builder, _logger: logger })
        }
    }

    /// Indices of those among the first `count` nodes that are not in a subgraph that TensorRT supports.
    fn unsupported(&mut self, model: &[u8], path: &CStr, count: usize) -> Vec<usize> {
        let mut taken = BTreeSet::new();
        // SAFETY: `model` and `path` are valid during the call. The subgraphs are read after `supportsModelV2`, as the
        // header requires, and their nodes are copied while the parser owns them.
        unsafe {
            if self.parser.pin_mut().supportsModelV2(model.as_ptr().cast(), model.len(), path.as_ptr()) {
                return vec![];
            }
            for subgraph in 0..self.parser.pin_mut().getNbSubgraphs() {
                let mut length = 0;
                let nodes = self.parser.pin_mut().getSubgraphNodes(subgraph, Pin::new(&mut length));
                if !nodes.is_null() {
                    let nodes = std::slice::from_raw_parts(nodes, length.unsigned_abs() as usize);
                    taken.extend(nodes.iter().map(|&index| index.unsigned_abs() as usize));
                }
            }
        }
        (0..count).filter(|index| !taken.contains(index)).collect()
    }

    /// Error messages of the parser.
    fn errors(&self) -> Vec<String> {
        let parser: *mut c_void = self.parser.as_mut_ptr().cast();
        let mut errors = vec![];
        // SAFETY: the functions of trtx-sys read errors that the parser owns, and the descriptions are copied.
        unsafe {
            for index in 0..trtx_sys::parser_get_nb_errors(parser) {
                let error = trtx_sys::parser_get_error(parser, index);
                let description = if error.is_null() { std::ptr::null() } else { trtx_sys::parser_error_desc(error) };
                if !description.is_null() {
                    errors.push(CStr::from_ptr(description).to_string_lossy().into_owned());
                }
            }
        }
        errors
    }
}

/// Takes ownership of an object that a factory created.
///
/// # Safety
/// The pointer must be null, or the object must have no other owner.
unsafe fn owned<T: UniquePtrTarget>(pointer: *mut T, what: &str) -> Result<UniquePtr<T>, String> {
    if pointer.is_null() {
        return Err(format!("no {what} could be made: {}", library::take_errors().join("; ")));
    }
    // SAFETY: the caller guarantees that the object has no other owner.
    Ok(unsafe { UniquePtr::from_raw(pointer) })
}

/// The C++ logger that the factories require. It discards all messages, because the parser stores its errors.
struct Logger(*mut RustLoggerBridge);

impl Logger {
    fn new() -> Result<Self, String> {
        unsafe extern "C" fn quiet(_data: *mut c_void, _severity: i32, _message: *const c_char) {}
        // SAFETY: the callback reads none of its arguments.
        let bridge = unsafe { trtx_sys::create_rust_logger_bridge(quiet, std::ptr::null_mut()) };
        if bridge.is_null() { Err("no logger could be made".into()) } else { Ok(Self(bridge)) }
    }

    fn interface(&self) -> *mut c_void {
        // SAFETY: the bridge is valid as long as `self`.
        unsafe { trtx_sys::get_logger_interface(self.0) }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        // SAFETY: `create_rust_logger_bridge` created the bridge, and all objects that use it are already destroyed.
        unsafe { trtx_sys::destroy_rust_logger_bridge(self.0) }
    }
}
