//! The memory of an execution provider's device.

use std::cell::RefCell;

use eqim::Result;
use ort::editor::{Graph, Model, Node, ONNX_DOMAIN, Opset};
use ort::memory::Allocator;
use ort::session::Session;
use ort::session::builder::SessionBuilder;
use ort::value::{Outlet, PrimitiveTensorElementType, Shape, SymbolicDimensions, Tensor, ValueType};

use super::failure::failed;
use super::provider::Providers;
use super::register::register;
use super::runtime::{self, Runtime};

/// Number of axes of a cache.
const RANK: usize = 4;

/// The memory of a device, for caches of one element type.
pub(super) struct DeviceMemory {
    allocator: Allocator,
    /// The graph of one `Identity`: ONNX Runtime copies its input to the device, and its output to where it is bound.
    copy: RefCell<Session>,
}

impl DeviceMemory {
    /// The memory of the device that runs a graph; `None` if that is the memory of the CPU. `T` is the element type of the
    /// caches.
    ///
    /// # Errors
    /// [`eqim::Error::run`] if the provider does not give memory.
    pub(super) fn of<T: PrimitiveTensorElementType>(
        graph: &runtime::Graph,
        runtime: Runtime,
        providers: &Providers,
    ) -> Result<Option<Self>> {
        let Some(allocator) = graph.allocator()? else { return Ok(None) };
        let subject = failed("the memory of the device");
        let builder = SessionBuilder::new(runtime.environment()).map_err(&subject)?;
        let builder = register(runtime.environment(), builder, providers, None)?;
        let copy = RefCell::new(identity::<T>(&builder).map_err(&subject)?);
        Ok(Some(Self { allocator, copy }))
    }

    /// A copy of a tensor in the memory of the device.
    ///
    /// # Errors
    /// [`eqim::Error::run`] if ONNX Runtime fails.
    pub(super) fn to_device<T>(&self, tensor: &Tensor<T>) -> Result<Tensor<T>>
    where
        T: PrimitiveTensorElementType + std::fmt::Debug,
    {
        self.copied(tensor, &self.allocator)
    }

    /// A copy of a tensor in the memory of the CPU.
    ///
    /// # Errors
    /// [`eqim::Error::run`] if ONNX Runtime fails.
    pub(super) fn to_cpu<T>(&self, tensor: &Tensor<T>) -> Result<Tensor<T>>
    where
        T: PrimitiveTensorElementType + std::fmt::Debug,
    {
        self.copied(tensor, &Allocator::default())
    }

    fn copied<T>(&self, tensor: &Tensor<T>, allocator: &Allocator) -> Result<Tensor<T>>
    where
        T: PrimitiveTensorElementType + std::fmt::Debug,
    {
        let copied = || -> ort::Result<Tensor<T>> {
            let mut copy = Tensor::new(allocator, tensor.shape().clone())?;
            let mut session = self.copy.borrow_mut();
            let mut binding = session.create_binding()?;
            binding.bind_input("from", tensor)?;
            binding.bind_output("to", &mut copy)?;
            session.run_binding(&binding)?;
            Ok(copy)
        };
        copied().map_err(failed("a cache of the device"))
    }
}

fn identity<T: PrimitiveTensorElementType>(builder: &SessionBuilder) -> ort::Result<Session> {
    let cache = |name: &str| {
        let (ty, shape) = (T::into_tensor_element_type(), Shape::new([-1; RANK]));
        Outlet::new(name, ValueType::Tensor { ty, shape, dimension_symbols: SymbolicDimensions::empty(RANK) })
    };
    let mut graph = Graph::new()?;
    graph.set_inputs([cache("from")])?;
    graph.set_outputs([cache("to")])?;
    graph.add_node(Node::new("Identity", ONNX_DOMAIN, "copy", ["from"], ["to"], [])?)?;
    let mut model = Model::new([Opset::new(ONNX_DOMAIN, 20)?])?;
    model.set_graph(graph)?;
    model.into_session(builder)
}
