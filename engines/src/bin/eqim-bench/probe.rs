//! Limits of this machine: memory bandwidth, and the speed of matrix products in ONNX Runtime.

use std::hint::black_box;
use std::time::{Duration, Instant};

use eqim::request::timing::median;
use eqim::{Error, Result};
use eqim_engines::onnxruntime::Runtime;
use ort::editor::{Graph, Model, Node, ONNX_DOMAIN, Opset};
use ort::session::Session;
use ort::session::builder::SessionBuilder;
use ort::value::{Outlet, PrimitiveTensorElementType, Shape, SymbolicDimensions, Tensor, TensorElementType, ValueType};
use serde::Serialize;

/// Size of the square matrices. It is large enough for full speed, and small enough that a product takes less than a
/// tenth of a second.
const SIDE: usize = 1024;

/// Minimum time of each measurement.
const DURATION: Duration = Duration::from_millis(400);

/// Multiply-adds per second of a product of large matrices.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Gemm {
    /// FP32 matrices.
    pub fp32: f64,
    /// Matrices of 8-bit integers.
    pub int8: f64,
}

/// Bandwidth in bytes per second when all cores read `bytes` of memory repeatedly, as a stage reads its weights.
pub fn read_bandwidth(bytes: usize) -> f64 {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let words = vec![1u64; (bytes / 8).max(threads)];
    let share = words.len().div_ceil(threads);
    let pass = || {
        std::thread::scope(|scope| {
            for part in words.chunks(share) {
                scope.spawn(move || black_box(black_box(part).iter().fold(0u64, |sum, word| sum.wrapping_add(*word))));
            }
        });
    };
    8.0 * words.len() as f64 * rate(pass)
}

/// Calls of `work` per second, from the median time. The first call is not timed.
fn rate(mut work: impl FnMut()) -> f64 {
    work();
    let (start, mut times) = (Instant::now(), vec![]);
    while times.len() < 3 || start.elapsed() < DURATION {
        let begin = Instant::now();
        work();
        times.push(begin.elapsed().as_secs_f64());
    }
    1.0 / median(&mut times)
}

impl Gemm {
    /// Measures the products in FP32 and INT8.
    ///
    /// # Errors
    /// [`Error::run`] if ONNX Runtime fails.
    pub fn measure(runtime: Runtime) -> Result<Self> {
        let failed = |error: ort::Error| Error::run_caused("GEMM probe", error);
        let fp32 = product::<f32, f32>("MatMul", TensorElementType::Float32, runtime, (0.5, 0.25)).map_err(failed)?;
        let int8 = product::<u8, i8>("MatMulInteger", TensorElementType::Int32, runtime, (3, -2)).map_err(failed)?;
        Ok(Self { fp32, int8 })
    }
}

/// Multiply-adds per second of one operator.
fn product<A, B>(operator: &str, result: TensorElementType, runtime: Runtime, values: (A, B)) -> ort::Result<f64>
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
    let mut session: Session = model.into_session(&SessionBuilder::new(runtime.environment())?)?;
    let a = Tensor::from_array(([SIDE, SIDE], vec![values.0; SIDE * SIDE]))?;
    let mut outcome = Ok(());
    let rate = rate(|| {
        if let Err(error) = session.run([(&a).into()]) {
            outcome = Err(error);
        }
    });
    outcome.map(|()| rate * (SIDE as f64).powi(3))
}
