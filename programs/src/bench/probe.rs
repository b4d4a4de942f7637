//! Limits of this machine: memory bandwidth, and the speed of matrix products in ONNX Runtime.

use std::hint::black_box;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use eqim::{Error, Result};
use eqim_engines::onnxruntime::Runtime;
use eqim_engines::pages::prefer_large;
use ort::editor::{Graph, Model, Node, ONNX_DOMAIN, Opset};
use ort::session::Session;
use ort::session::builder::SessionBuilder;
use ort::value::{
    DynValue, Outlet, PrimitiveTensorElementType, Shape, SymbolicDimensions, Tensor, TensorElementType, ValueType,
};
use serde::Serialize;

/// Size of the square matrices. It is large enough for full speed, and small enough that a product takes less than a
/// tenth of a second.
const SIDE: usize = 1024;

/// Largest buffer to measure the bandwidth with. Larger buffers have the same bandwidth and need more memory.
const MOST_BYTES: u64 = 512 << 20;
/// Bytes that a thread reads before it asks for more.
const PART: usize = 1 << 20;

/// Limits of this machine at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Limits {
    /// Bytes per second when all cores read the weights of a stage repeatedly.
    pub read: f64,
    /// Multiply-adds per second of FP32 matrices.
    pub fp32: f64,
    /// Multiply-adds per second of matrices of 8-bit integers.
    pub int8: f64,
}

/// Measures the limits of this machine.
pub struct Probe {
    fp32: Product,
    int8: Product,
    memory: Vec<u64>,
}

impl Probe {
    /// Prepares the measurements.
    ///
    /// # Errors
    /// [`Error::run`] if ONNX Runtime fails.
    pub fn new(runtime: Runtime) -> Result<Self> {
        let fp32 = Product::new::<f32, f32>("MatMul", TensorElementType::Float32, runtime, (0.5, 0.25));
        let int8 = Product::new::<u8, i8>("MatMulInteger", TensorElementType::Int32, runtime, (3, -2));
        Ok(Self { fp32: fp32.map_err(failed)?, int8: int8.map_err(failed)?, memory: vec![] })
    }

    /// Bytes of the buffer.
    pub fn bytes(&self) -> u64 {
        size_of_val(&self.memory[..]) as u64
    }

    /// Measures the limits of a stage with `bytes` of weights: reads as many bytes, rounded up to a power of two, twice,
    /// and multiplies. Takes some tens of milliseconds.
    ///
    /// # Errors
    /// [`Error::run`] if ONNX Runtime fails.
    pub fn measure(&mut self, bytes: u64) -> Result<Limits> {
        let bytes = bytes.clamp(PART as u64, MOST_BYTES).next_power_of_two() as usize;
        let words = bytes / size_of::<u64>();
        if self.memory.len() < words {
            self.memory = Vec::with_capacity(words);
            // Memory is read fastest from large pages.
            prefer_large(self.memory.spare_capacity_mut());
            self.memory.resize(words, 1);
        }
        let memory = &self.memory[..words];
        read(memory, 1);
        // A small buffer is read more often, so that starting the threads does not count.
        let passes = (128 * PART / bytes).max(1);
        let start = Instant::now();
        read(memory, passes);
        let read = (passes * bytes) as f64 / start.elapsed().as_secs_f64();
        Ok(Limits { read, fp32: self.fp32.rate()?, int8: self.int8.rate()? })
    }
}

/// Reads memory several times with all cores.
fn read(words: &[u64], passes: usize) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let parts = Mutex::new((0..passes).flat_map(|_| words.chunks(PART / size_of::<u64>())));
    let work = || {
        let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
        while let Some(part) = next() {
            black_box(black_box(part).iter().fold(0u64, |sum, word| sum.wrapping_add(*word)));
        }
    };
    std::thread::scope(|scope| {
        (1..threads).for_each(|_| drop(scope.spawn(work)));
        work();
    });
}

fn failed(error: ort::Error) -> Error {
    Error::run_caused("probe of the machine's limits", error)
}

/// A product of two matrices in ONNX Runtime.
struct Product {
    session: Session,
    a: DynValue,
}

impl Product {
    /// Multiply-adds per second of one product.
    fn rate(&mut self) -> Result<f64> {
        let start = Instant::now();
        self.session.run([(&self.a).into()]).map_err(failed)?;
        Ok((SIDE as f64).powi(3) / start.elapsed().as_secs_f64())
    }

    /// Prepares the product of two matrices of equal numbers.
    fn new<A, B>(operator: &str, result: TensorElementType, runtime: Runtime, values: (A, B)) -> ort::Result<Self>
    where
        A: PrimitiveTensorElementType + Clone + std::fmt::Debug + 'static,
        B: PrimitiveTensorElementType + Clone + std::fmt::Debug + 'static,
    {
        let matrix = |name: &str, ty| {
            let shape = Shape::new([SIDE as i64, SIDE as i64]);
            Outlet::new(name, ValueType::Tensor { ty, shape, dimension_symbols: SymbolicDimensions::empty(2) })
        };
        let mut graph = Graph::new()?;
        graph.set_inputs([matrix("a", A::into_tensor_element_type())])?;
        graph.set_outputs([matrix("c", result)])?;
        let b = Tensor::<B>::new(&Default::default(), [SIDE, SIDE]).map(|mut b| {
            b.extract_tensor_mut().1.fill(values.1);
            b
        })?;
        graph.add_initializer("b", b, false)?;
        graph.add_node(Node::new(operator, ONNX_DOMAIN, "product", ["a", "b"], ["c"], [])?)?;
        let mut model = Model::new([Opset::new(ONNX_DOMAIN, 20)?])?;
        model.set_graph(graph)?;
        // This session has threads of its own. If they waited actively after the product, they would take the cores of the
        // next stage.
        let builder = SessionBuilder::new(runtime.environment())?.with_intra_op_spinning(false)?;
        let mut session: Session = model.into_session(&builder)?;
        let a = Tensor::from_array(([SIDE, SIDE], vec![values.0; SIDE * SIDE]))?.into_dyn();
        // The first run allocates memory.
        session.run([(&a).into()])?;
        Ok(Self { session, a })
    }
}
