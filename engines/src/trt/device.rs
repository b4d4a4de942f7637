//! The calls that reach a GPU, and nothing more: all above them is tested without one.

use std::time::Duration;

use eqim::Result;
use eqim::model::Stage;

/// An address on the device; 0 is none.
pub type Address = u64;

/// Every address that an engine reads or writes is a multiple of this: TensorRT demands it of its bindings.
pub const ALIGNMENT: usize = 256;

/// A device, and one stream of it: work is done in the order in which it was handed over.
pub trait Device {
    /// Device memory, freed when dropped.
    type Memory;
    /// An engine, ready to run.
    type Context;
    /// A point in the stream's order.
    type Event;

    /// What it is, for people.
    fn name(&self) -> &str;

    /// Memory of `bytes` zeros, and its address.
    ///
    /// # Errors
    /// When there is not enough.
    fn allocate(&self, bytes: usize) -> Result<(Self::Memory, Address)>;

    /// Copies from the host.
    ///
    /// # Errors
    /// The driver's.
    fn upload(&self, from: &[u8], to: Address) -> Result<()>;

    /// Copies to the host, and waits until it has.
    ///
    /// # Errors
    /// The driver's.
    fn download(&self, from: Address, to: &mut [u8]) -> Result<()>;

    /// Copies on the device.
    ///
    /// # Errors
    /// The driver's.
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()>;

    /// Loads the engine of a stage.
    ///
    /// # Errors
    /// When it cannot be read or deserialized.
    fn load(&self, stage: Stage) -> Result<Self::Context>;

    /// Hands a run of an engine to the stream.
    ///
    /// # Errors
    /// TensorRT's.
    fn enqueue(&self, context: &mut Self::Context, bindings: &[Binding]) -> Result<()>;

    /// Marks the point that the stream's order has reached.
    ///
    /// # Errors
    /// The driver's.
    fn mark(&self) -> Result<Self::Event>;

    /// Waits until the stream has passed an event.
    ///
    /// # Errors
    /// The driver's, those of work before the event included.
    fn wait(&self, event: &Self::Event) -> Result<()>;

    /// Time between two events that have passed.
    ///
    /// # Errors
    /// The driver's.
    fn elapsed(&self, from: &Self::Event, to: &Self::Event) -> Result<Duration>;
}

/// A tensor of an engine, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Its name in the graph.
    pub name: String,
    /// Sizes of an input's axes; `None` for an output, whose shape follows.
    pub shape: Option<Vec<i64>>,
    /// Where its values are or go.
    pub address: Address,
}
