//! Interface to a GPU. It holds only the calls that need a GPU, so that all code above it is tested without one.

use std::time::Duration;

use eqim::Result;
use eqim::model::Stage;

/// An address on the device; 0 is the null address.
pub type Address = u64;

/// Alignment of all addresses that an engine reads or writes. TensorRT requires it.
pub const ALIGNMENT: usize = 256;

/// A device and one of its streams. The device runs work in the order in which it was enqueued.
pub trait Device {
    /// Device memory, freed when it is dropped.
    type Memory;
    /// A loaded engine, ready to run.
    type Context;
    /// An event in the stream.
    type Event;

    /// Name of the device, as text.
    fn name(&self) -> &str;

    /// Allocates `bytes` zeroed bytes. Returns the memory and its address.
    ///
    /// # Errors
    /// If the device does not have enough free memory.
    fn allocate(&self, bytes: usize) -> Result<(Self::Memory, Address)>;

    /// Copies from the host to the device.
    ///
    /// # Errors
    /// If the driver reports an error.
    fn upload(&self, from: &[u8], to: Address) -> Result<()>;

    /// Copies from the device to the host, and waits until the copy is complete.
    ///
    /// # Errors
    /// If the driver reports an error.
    fn download(&self, from: Address, to: &mut [u8]) -> Result<()>;

    /// Copies on the device.
    ///
    /// # Errors
    /// If the driver reports an error.
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()>;

    /// Loads the engine of a stage.
    ///
    /// # Errors
    /// If the engine cannot be read or deserialized.
    fn load(&self, stage: Stage) -> Result<Self::Context>;

    /// Enqueues a run of an engine on the stream.
    ///
    /// # Errors
    /// If TensorRT reports an error.
    fn enqueue(&self, context: &mut Self::Context, bindings: &[Binding]) -> Result<()>;

    /// Records an event at the current end of the stream.
    ///
    /// # Errors
    /// If the driver reports an error.
    fn mark(&self) -> Result<Self::Event>;

    /// Waits until all work before an event is complete.
    ///
    /// # Errors
    /// If the driver reports an error, also for work before the event.
    fn wait(&self, event: &Self::Event) -> Result<()>;

    /// Time between two events that are complete.
    ///
    /// # Errors
    /// If the driver reports an error.
    fn elapsed(&self, from: &Self::Event, to: &Self::Event) -> Result<Duration>;
}

/// A tensor of an engine and its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Name of the tensor in the graph.
    pub name: String,
    /// Shape of an input; `None` for an output, whose shape follows from the inputs.
    pub shape: Option<Vec<i64>>,
    /// Address that an input is read from, or that an output is written to.
    pub address: Address,
}
