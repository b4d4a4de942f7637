//! Engines on a GPU, through the NVIDIA driver and the TensorRT runtime.

use std::cell::RefCell;
use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DriverError, result, sys};
use eqim::engine::Engine;
use eqim::model::Stage;
use eqim::{Error, Result, ResultExt, files};
use trtx::trtx_sys::Dims64;
use trtx::{CudaEngine, ExecutionContext, LayerInformationFormat, Runtime};

use super::device::{Address, Binding, Device};
use super::edition::{self, Cache};
use super::library::{self, Library};
use super::{EngineSet, FOLDER, TrtEngine};
use eqim::bundle::Bundle;

/// Checks that this machine has an NVIDIA driver and a GPU.
///
/// # Errors
/// [`Error::run`] if not. The message says what to do.
pub fn ready() -> Result<()> {
    let advice = "TensorRT runs on NVIDIA GPUs only: install the driver, or choose the backend ort";
    // SAFETY: loads the driver's library and unloads it, as any program that uses CUDA does.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::run("TensorRT", format!("no NVIDIA driver was found (libcuda cannot be loaded). {advice}")));
    }
    match CudaContext::device_count() {
        Ok(1..) => Ok(()),
        Ok(_) => Err(Error::run("TensorRT", format!("the NVIDIA driver sees no GPU. {advice}"))),
        Err(error) => Err(Error::run("TensorRT", format!("the NVIDIA driver does not start; {advice}")).because(error)),
    }
}

/// Loads the engines of a bundle on the first GPU. If `cuda_graph` is set, the transformer step is captured as a CUDA
/// graph.
///
/// # Errors
/// [`Error::run`] if the TensorRT library is not found or is not of the version that built the engines, or if there is
/// no driver or no GPU that the engines were built for; [`Error::input`] if an engine file has changed since it was
/// built.
pub fn open(bundle: &Bundle, set: &EngineSet, cuda_graph: bool) -> Result<Box<dyn Engine>> {
    let library = Library::load()?;
    if library.version() != set.tensorrt {
        let problem = format!(
            "the engines were built by {}, but the installed library is {}: install that version, or build the engines \
             again with eqim-export trt",
            set.tensorrt,
            library.version()
        );
        return Err(Error::run("TensorRT", problem));
    }
    for engine in set.engines.values() {
        engine.file.verify(&bundle.folder.join(FOLDER))?;
    }
    ready()?;
    let gpu = Gpu::new(library, bundle, set, cuda_graph)?;
    Ok(Box::new(TrtEngine::new(gpu, set)?))
}

/// Output of TensorRT's engine inspector for an engine: its layers after fusion, as JSON.
///
/// # Errors
/// [`Error::run`] if the TensorRT library, the driver or a GPU that the engines were built for is not found, or if
/// TensorRT cannot load the engine; [`Error::input`] if the engine file cannot be read.
pub fn inspected(bundle: &Bundle, set: &EngineSet, stage: Stage) -> Result<String> {
    ready()?;
    let gpu = Gpu::new(Library::load()?, bundle, set, false)?;
    let loaded = gpu.load(stage)?;
    let inspector = loaded.engine.create_engine_inspector();
    let told = inspector.and_then(|inspector| inspector.engine_information(LayerInformationFormat::kJSON));
    told.or_run(stage.name())
}

fn failed(error: DriverError) -> Error {
    Error::run("CUDA", error)
}

/// The first GPU and one of its streams.
struct Gpu {
    name: String,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
    library: &'static Library,
    folder: PathBuf,
    cuda_graph: bool,
}

/// An engine and the objects that it needs. They are dropped in this order, because each uses the ones after it.
struct Loaded {
    stage: Stage,
    execution: ExecutionContext<'static>,
    cache: Option<Cache>,
    cache_file: PathBuf,
    engine: CudaEngine<'static>,
    _runtime: RefCell<Runtime<'static>>,
}

impl Gpu {
    fn new(library: &'static Library, bundle: &Bundle, set: &EngineSet, cuda_graph: bool) -> Result<Self> {
        let context = CudaContext::new(0).map_err(failed)?;
        let name = context.name().map_err(failed)?;
        let (major, minor) = context.compute_capability().map_err(failed)?;
        let capability = format!("sm{major}{minor}");
        let targets: Vec<String> = set.targets.iter().map(ToString::to_string).collect();
        if !targets.contains(&capability) {
            let problem = format!(
                "the engines were built for {}, but {name} is {capability}: build them again for the target {capability}",
                targets.join(", ")
            );
            return Err(Error::run("TensorRT", problem));
        }
        let stream = context.new_stream().map_err(failed)?;
        Ok(Self { name, stream, context, library, folder: bundle.folder.join(FOLDER), cuda_graph })
    }
}

impl Device for Gpu {
    type Memory = CudaSlice<u8>;
    type Context = Loaded;
    type Event = CudaEvent;

    fn name(&self) -> &str {
        &self.name
    }

    fn allocate(&self, bytes: usize) -> Result<(CudaSlice<u8>, Address)> {
        let memory = self.stream.alloc_zeros(bytes).map_err(failed)?;
        let address = memory.device_ptr(&self.stream).0;
        Ok((memory, address))
    }

    fn upload(&self, from: &[u8], to: Address) -> Result<()> {
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the caller guarantees that the buffer at `to` is at least as long as `from`. `from` is pageable
        // memory, so the driver has read it when the call returns.
        unsafe { result::memcpy_htod_async(to, from, self.stream.cu_stream()) }.map_err(failed)
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the caller guarantees that the buffer at `from` is at least as long as `to`. `to` lives until the
        // stream is synchronized below.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) }.map_err(failed)?;
        self.stream.synchronize().map_err(failed)
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the caller guarantees that both buffers are at least `bytes` long. They are freed in stream order,
        // after the copy.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }.map_err(failed)
    }

    fn load(&self, stage: Stage) -> Result<Loaded> {
        self.context.bind_to_thread().map_err(failed)?;
        let path = self.folder.join(super::file_name(stage));
        let bytes = files::read(&path)?;
        library::take_errors();
        let failed = |error: trtx::Error| {
            let said = library::take_errors();
            let problem = if said.is_empty() { error.to_string() } else { said.join("; ") };
            Error::run(path.display(), format!("TensorRT cannot load it: {problem}"))
        };
        let mut runtime = Runtime::new(self.library.logger()).map_err(failed)?;
        let mut engine = runtime.deserialize_cuda_engine(&bytes).map_err(failed)?;
        let cache_file = path.with_extension("cache");
        let cuda_graph = self.cuda_graph && stage == Stage::Step;
        let (execution, cache) = edition::execution(&mut engine, &cache_file, cuda_graph).map_err(failed)?;
        Ok(Loaded { stage, execution, cache, cache_file, engine, _runtime: RefCell::new(runtime) })
    }

    fn enqueue(&self, loaded: &mut Loaded, bindings: &[Binding]) -> Result<()> {
        self.context.bind_to_thread().map_err(failed)?;
        let stage = loaded.stage.name();
        library::take_errors();
        let failed = |error: trtx::Error| {
            let said = library::take_errors();
            Error::run(stage, if said.is_empty() { error.to_string() } else { said.join("; ") })
        };
        let execution = &mut loaded.execution;
        for Binding { name, shape, address } in bindings {
            if let Some(shape) = shape {
                execution.set_input_shape(name, &Dims64::from_slice(shape)).map_err(failed)?;
            }
            // SAFETY: the caller guarantees that the buffer has the size of the tensor. It is freed in stream order
            // only, after the run.
            unsafe { execution.set_tensor_address(name, *address as *mut c_void) }.map_err(failed)?;
        }
        // SAFETY: the stream lives as long as this device, and the loop above has bound every tensor.
        unsafe { execution.enqueue_v3(self.stream.cu_stream().cast()) }.map_err(failed)
    }

    fn mark(&self) -> Result<CudaEvent> {
        self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).map_err(failed)
    }

    fn wait(&self, event: &CudaEvent) -> Result<()> {
        event.synchronize().map_err(failed)
    }

    fn elapsed(&self, from: &CudaEvent, to: &CudaEvent) -> Result<Duration> {
        let milliseconds = from.elapsed_ms(to).map_err(failed)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds).max(0.0) / 1e3))
    }
}

impl Drop for Loaded {
    /// Writes the kernels that TensorRT compiled for this GPU to a file, so that the next start is faster.
    fn drop(&mut self) {
        let Some(cache) = &self.cache else { return };
        let kept = edition::serialized(cache).or_run("cache").and_then(|bytes| files::write(&self.cache_file, &bytes));
        if let Err(problem) = kept {
            tracing::warn!("the kernels that TensorRT compiled for {} are not cached: {problem}", self.stage.name());
        }
    }
}
