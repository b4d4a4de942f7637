//! The engine of a bundle in Python.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use clap::ValueEnum;
use eqim::bundle::Bundle;
use eqim::digest::sha256;
use eqim::generate::plan::{Plan, recorded};
use eqim::generate::scheduler::Capacity;
use eqim::generate::tiles::Tiling;
use eqim::generate::worker::{self, Command, Events, Worker};
use eqim::picture::{self, Side};
use eqim::request::Request;
use eqim::request::jobs::{Line, check_id};
use eqim::request::record::Origin;
use eqim::request::settings::{DEFAULT_TOKENS, Settings};
use eqim::{Config, Error, ResultExt, engine};
use eqim_engines::onnxruntime::{Provider, Providers};
use eqim_engines::{Backend, MOST_THREADS, Options};
use ndarray::{Array3, Axis};
use numpy::PyArray2;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};

use crate::deliver::{Deliveries, cancellation, deliver};
use crate::error::{Names, OrRaise, bad_input, exception};
use crate::image::Image;
use crate::making::{Change, Making, events, until};
use crate::process::Process;
use crate::progress::Progress;
use crate::stream::{Stream, closed, next};
use crate::{arrays, libraries, settings, warnings};

/// Largest number of images in a batch.
const MOST_BATCH: usize = 1024;

/// A bundle that is open: a model that is ready to make images.
///
/// The engine runs in a thread of its own. Methods can be called by many threads at a time; their images share batches.
/// It can be pickled: it is opened again where it is loaded. It does not survive ``fork``.
#[pyclass(frozen, weakref, module = "eqim")]
pub struct Engine {
    bundle: Bundle,
    /// Keywords with which the bundle was opened.
    options: Py<PyDict>,
    /// Name of the backend.
    name: String,
    process: Process,
    /// The files of the bundle when it was opened.
    stamps: BTreeMap<String, (u64, SystemTime)>,
    /// `None` after the engine was closed.
    open: Mutex<Option<Open>>,
}

/// What an image is asked to be.
struct Wanted {
    settings: Settings,
    /// Pixels that it continues, `[3, height, width]` in the order of generation.
    beginning: Option<Array3<f32>>,
    /// SHA-256 of the file that it continues.
    prefix_sha256: Option<String>,
    /// How messages name the settings.
    names: Names,
}

impl Wanted {
    /// An image with the settings of keywords, which continues `beginning`.
    fn new(settings: Settings, beginning: Option<Array3<f32>>) -> Self {
        Self { settings, beginning, prefix_sha256: None, names: Names::Keywords }
    }
}

/// A bundle that was opened, in a thread.
struct Opened {
    bundle: Bundle,
    stamps: BTreeMap<String, (u64, SystemTime)>,
    worker: Worker,
    /// Name of the backend.
    name: String,
    /// Warnings, one per line.
    messages: String,
}

/// Opens a bundle in a thread.
///
/// # Errors
/// Those of [`Bundle::open`] and [`eqim_engines::open`].
fn opened(bundle: &Path, options: Options, max_batch: usize) -> eqim::Result<Opened> {
    // The working folder may change.
    let bundle = Bundle::open(&std::path::absolute(bundle).or_input(bundle.display())?)?;
    let stamps = bundle.stamps()?;
    let (label, to_open) = (bundle.folder.display().to_string(), bundle.clone());
    let ((named, name), (send, result)) = (channel(), channel());
    let open = move || {
        let (engine, messages) = warnings::collected(|| eqim_engines::open(&to_open, &options));
        let engine = engine?;
        let _ = named.send((engine.name().to_string(), messages));
        Ok(engine)
    };
    let opened = move |result| {
        let _ = send.send(result);
    };
    let worker = Worker::start(&label, Capacity::of_machine(max_batch), open, opened)?;
    let ended = |_| Error::run(&label, "the thread of the engine has ended");
    result.recv().map_err(ended)??;
    let (name, messages) = name.recv().map_err(ended)?;
    Ok(Opened { bundle, stamps, worker, name, messages })
}

/// The options of a backend. `threads` of 0 is all cores, as in ONNX Runtime.
///
/// # Errors
/// `InputError` naming the argument that does not fit.
fn chosen(
    py: Python<'_>,
    backend: &str,
    threads: Option<usize>,
    (providers, library): (Vec<String>, Option<PathBuf>),
    device: Option<String>,
    cuda_graph: bool,
) -> PyResult<Options> {
    if let Some(threads) = threads.filter(|&threads| threads > MOST_THREADS) {
        return Err(bad_input(py, format!("threads is {threads}, expected 0 to {MOST_THREADS}")));
    }
    let threads = threads.filter(|&threads| threads > 0);
    let order = providers.iter().map(|text| text.parse::<Provider>()).collect::<Result<_, _>>();
    let order = order.map_err(|problem| bad_input(py, format!("providers: {problem}")))?;
    let backend = Backend::from_str(backend, true).map_err(|_| {
        let names: Vec<_> = Backend::value_variants().iter().filter_map(ValueEnum::to_possible_value).collect();
        let names: Vec<&str> = names.iter().map(|name| name.get_name()).collect();
        bad_input(py, format!("backend is {backend:?}, expected one of {}", names.join(", ")))
    })?;
    Ok(Options { backend, threads, providers: Providers { order, library }, device, cuda_graph })
}

/// A request, and how its image is decoded.
type Planned = (Request, Option<Tiling>);

/// An engine that is open.
#[derive(Clone)]
struct Open {
    worker: Arc<Worker>,
    deliveries: Deliveries,
    /// Whether the images in progress are cancelled.
    is_closed: Arc<AtomicBool>,
}

impl Engine {
    fn config(&self) -> &Config {
        &self.bundle.manifest.model
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The open engine.
    ///
    /// # Errors
    /// `ClosedError` if it is closed, or was opened by another process; `ChangedError` if its files have changed.
    fn running(&self, py: Python<'_>) -> PyResult<Open> {
        self.process.check(py)?;
        let open = self.lock().clone().ok_or_else(|| closed(py))?;
        let changed = |what: String| {
            let folder = self.bundle.folder.display();
            exception(py, "ChangedError", format!("{folder}: {what} since the bundle was opened: open it again"))
        };
        let now = self.bundle.stamps().map_err(|error| changed(format!("a file is gone ({error})")))?;
        match now.iter().find(|(name, stamp)| self.stamps.get(*name) != Some(stamp)) {
            Some((name, _)) => Err(changed(format!("{name} has changed"))),
            None => Ok(open),
        }
    }

    /// The request and the image of settings and of the pixels that it continues.
    fn plan(&self, py: Python<'_>, open: &Open, wanted: Wanted, in_tiles: bool) -> PyResult<(Planned, Making)> {
        let (config, Wanted { settings, beginning, prefix_sha256, names }) = (self.config(), wanted);
        let plan = Plan::new(&settings, beginning.as_ref(), in_tiles, config);
        let Plan { mut request, tiling, finish } = plan.or_raise_as(py, names)?;
        if request.classes.len() != 1 {
            let (name, count) = (names.of("class"), request.classes.len());
            return Err(bad_input(py, format!("{name} is {count} classes, expected one: an image has one")));
        }
        if let Some(pixels) = beginning {
            let encode = move |engine: &dyn engine::Engine| engine.encode_tokens(pixels.view().insert_axis(Axis(0)));
            request.prefix = Some(self.call(py, open, encode)?);
        }
        let settings = recorded(settings, &request, tiling);
        let origin = Origin { settings, weights: self.bundle.manifest.weights.sha256.clone(), prefix_sha256 };
        let making = Making::new(origin, &request, finish, config).or_raise(py)?;
        Ok(((request, tiling), making))
    }

    /// Starts to generate an image, whose events are sent until the engine is closed. Returns its number.
    fn start(&self, py: Python<'_>, open: &Open, (request, tiling): Planned, events: Events) -> PyResult<usize> {
        let events = until(Arc::clone(&open.is_closed), events);
        let order = worker::order(self.config(), &request, tiling, false, events).or_raise(py)?;
        let number = order.number;
        open.worker.send(Command::Generate(Box::new(order))).or_raise(py)?;
        Ok(number)
    }

    /// Calls a function with the engine, between two tokens.
    fn call<T: Send + 'static>(
        &self,
        py: Python<'_>,
        open: &Open,
        work: impl FnOnce(&dyn engine::Engine) -> eqim::Result<T> + Send + 'static,
    ) -> PyResult<T> {
        let (send, result) = channel();
        let call = move |engine: &dyn engine::Engine| {
            let _ = send.send(work(engine));
        };
        open.worker.send(Command::Call(Box::new(call))).or_raise(py)?;
        next(py, &Mutex::new(result))?.or_raise(py)
    }

    /// Generates an image, and waits for it.
    fn finished(&self, py: Python<'_>, wanted: Wanted, callback: Option<Py<PyAny>>, progress: bool) -> PyResult<Image> {
        let open = self.running(py)?;
        let (planned, mut making) = self.plan(py, &open, wanted, false)?;
        let progress = Progress::new(py, making.total(), callback, progress)?;
        let (send, received) = events();
        self.start(py, &open, planned, send)?;
        let received = Mutex::new(received);
        let mut wait = || -> PyResult<()> {
            loop {
                match making.take(next(py, &received)?).or_raise(py)? {
                    Change::Token => progress.show(py, making.known)?,
                    Change::Columns(..) => {}
                    Change::Done => return Ok(()),
                }
            }
        };
        let result = wait();
        progress.finish(py)?;
        result?;
        Image::generated(py, making)
    }

    /// Starts to generate an image, and returns its future.
    fn submitted<'py>(&self, py: Python<'py>, open: &Open, wanted: Wanted) -> PyResult<Bound<'py, PyAny>> {
        let future = py.import("concurrent.futures")?.getattr("Future")?.call0()?;
        let (planned, making) = self.plan(py, open, wanted, false)?;
        let events = open.deliveries.begin(making, &future, cancellation(&future)?);
        self.start(py, open, planned, events)?;
        Ok(future)
    }

    /// The pixels of the picture that a job continues, in the order of generation, and the hash of its file.
    fn prefix(&self, path: &Path, side: Side) -> eqim::Result<(Array3<f32>, String)> {
        let tokenizer = &self.config().tokenizer;
        let read = || {
            let bytes = picture::contents(path)?;
            let image = picture::decode(path, &bytes)?;
            let beginning = picture::beginning(path, image, tokenizer.image_height(), tokenizer.token_width(), side)?;
            Ok((beginning.pixels, sha256(&bytes)))
        };
        read().map_err(|error: Error| if error.is_input() { Error::setting("prefix", error) } else { error })
    }

    /// The pixels of a photograph that an image continues, in the order of generation.
    fn beginning(&self, photo: &Bound<'_, PyAny>, side: Side) -> PyResult<Array3<f32>> {
        let tokenizer = &self.config().tokenizer;
        arrays::beginning(photo, (tokenizer.image_height(), tokenizer.token_width()), side)
    }
}

#[pymethods]
impl Engine {
    /// Open a bundle that ``eqim-export onnx`` or `export` wrote.
    ///
    /// Parameters
    /// ----------
    /// bundle
    ///     Folder of the bundle.
    /// backend
    ///     Library that runs the model. ``"auto"`` is TensorRT if the bundle has engines that this machine can run, else
    ///     ONNX Runtime, else Candle, with a warning.
    /// threads
    ///     Number of threads of ONNX Runtime. ``None`` and 0 are all cores.
    /// providers
    ///     Execution providers of ONNX Runtime, as ``"NAME[:DEVICE][,KEY=VALUE]..."``.
    /// provider_library
    ///     Shared library with execution providers that ONNX Runtime does not have.
    /// device
    ///     Device of Candle: ``"cpu"`` or ``"cuda:N"``.
    /// cuda_graph
    ///     Capture the transformer step as a CUDA graph. Needs the backend ``"trt"``.
    /// max_batch
    ///     Largest number of images in a batch.
    ///
    /// Raises
    /// ------
    /// NotFoundError
    ///     If the folder or a file in it does not exist.
    /// InputError
    ///     If the folder is not a bundle, or an argument does not fit.
    /// RunError
    ///     If the library of the backend is missing or fails.
    #[classmethod]
    #[pyo3(signature = (
        bundle, *, backend="auto", threads=None, providers=None, provider_library=None, device=None, cuda_graph=false,
        max_batch=16
    ))]
    #[allow(clippy::too_many_arguments)]
    fn from_bundle(
        _class: &Bound<'_, PyType>,
        py: Python<'_>,
        #[pyo3(from_py_with = settings::argument)] bundle: PathBuf,
        #[pyo3(from_py_with = settings::argument)] backend: &str,
        #[pyo3(from_py_with = settings::argument)] threads: Option<usize>,
        #[pyo3(from_py_with = settings::argument)] providers: Option<Vec<String>>,
        #[pyo3(from_py_with = settings::argument)] provider_library: Option<PathBuf>,
        #[pyo3(from_py_with = settings::argument)] device: Option<String>,
        cuda_graph: bool,
        #[pyo3(from_py_with = settings::argument)] max_batch: usize,
    ) -> PyResult<Py<Self>> {
        libraries::find(py)?;
        let options = PyDict::new(py);
        options.set_item("backend", backend)?;
        options.set_item("threads", threads)?;
        options.set_item("providers", &providers)?;
        options.set_item("provider_library", &provider_library)?;
        options.set_item("device", &device)?;
        options.set_item("cuda_graph", cuda_graph)?;
        options.set_item("max_batch", max_batch)?;
        if !(1..=MOST_BATCH).contains(&max_batch) {
            return Err(bad_input(py, format!("max_batch is {max_batch}, expected 1 to {MOST_BATCH}")));
        }
        let providers = (providers.unwrap_or_default(), provider_library);
        let chosen = chosen(py, backend, threads, providers, device, cuda_graph)?;
        let opened = py.detach(|| opened(&bundle, chosen, max_batch));
        let Opened { bundle, stamps, worker, name, messages } = opened.or_raise(py)?;
        warnings::show(py, &messages)?;
        let (deliveries, is_closed) = (deliver().or_raise(py)?, Arc::default());
        let open = Open { worker: Arc::new(worker), deliveries, is_closed };
        let (process, options) = (Process::this(), options.unbind());
        let engine = Py::new(py, Self { bundle, options, name, process, stamps, open: Mutex::new(Some(open)) })?;
        py.import("eqim._open")?.getattr("engines")?.call_method1("add", (&engine,))?;
        Ok(engine)
    }

    /// Generate an image. The bytes are those of ``eqim-run`` with the same settings.
    ///
    /// Parameters
    /// ----------
    /// class_
    ///     Class of the image by name or number. ``None`` is no class.
    /// classes
    ///     Classes along the tokens instead, as in ``"forest:0-40,water:32-"``. Where two share tokens, the first fades
    ///     into the second.
    /// tokens
    ///     Length of the image in tokens. 16 by default.
    /// width
    ///     Length of the image in pixels instead, a multiple of `token_width`.
    /// seed
    ///     Seed of the noise, as in ``torch.manual_seed``. 0 by default.
    /// guidance_scale
    ///     Scale of classifier-free guidance. 1, the default, is none.
    /// guidance_schedule
    ///     How guidance grows along the image. ``"linear"`` by default.
    /// solver
    ///     Solver of the flow. ``"euler"`` by default.
    /// num_inference_steps
    ///     Steps of the solver per token. Those of the model by default.
    /// tile
    ///     Number of tokens per tile of the decoder, or ``"none"`` for the image as a whole. By default, images of more
    ///     than 256 tokens are decoded in tiles of 64.
    /// overlap
    ///     Number of tokens that neighbouring tiles share. A quarter of a tile by default.
    /// callback
    ///     Is called after each token with the number of tokens so far and of all. What it raises cancels the image.
    /// progress
    ///     Whether a bar of tqdm is shown.
    ///
    /// Raises
    /// ------
    /// InputError
    ///     If a setting does not fit the model.
    /// RunError
    ///     If the engine fails.
    /// ClosedError
    ///     If the engine is closed meanwhile.
    /// KeyboardInterrupt
    ///     After Ctrl-C, within one token.
    #[pyo3(signature = (*, callback=None, progress=false, **settings))]
    fn generate(
        &self,
        py: Python<'_>,
        callback: Option<Py<PyAny>>,
        progress: bool,
        settings: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Image> {
        self.finished(py, Wanted::new(settings::read(settings)?, None), callback, progress)
    }

    /// Continue a photograph.
    ///
    /// Parameters
    /// ----------
    /// photo
    ///     Path of a PNG or JPEG, an image of Pillow, an `Image`, or an array or tensor uint8 [height, width, 3]. It is
    ///     scaled to the height of the model, and cut to a multiple of `token_width`.
    /// tokens
    ///     Length of the whole image in tokens. By default, 16 tokens are added.
    /// direction
    ///     Side on which the photograph is continued. ``"right"`` by default.
    /// keep_prefix_pixels
    ///     Whether the pixels of the photograph stay, except for an edge of two tokens.
    /// **settings
    ///     The others of `generate`.
    ///
    /// Raises
    /// ------
    /// InputError
    ///     If the photograph or a setting does not fit the model.
    #[pyo3(signature = (photo, *, callback=None, progress=false, **settings))]
    fn outpaint(
        &self,
        py: Python<'_>,
        photo: &Bound<'_, PyAny>,
        callback: Option<Py<PyAny>>,
        progress: bool,
        settings: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Image> {
        self.running(py)?;
        let settings = settings::read(settings)?;
        let beginning = self.beginning(photo, settings.direction.unwrap_or_default())?;
        self.finished(py, Wanted::new(settings, Some(beginning)), callback, progress)
    }

    /// Generate an image and iterate over its strips while it is generated.
    ///
    /// The image is decoded in tiles, of 64 tokens by default, which fade into one another.
    ///
    /// Parameters
    /// ----------
    /// photo
    ///     A photograph to continue, as in `outpaint`.
    /// **settings
    ///     Those of `generate` and `outpaint`.
    #[pyo3(signature = (*, photo=None, **settings))]
    fn stream(
        &self,
        py: Python<'_>,
        photo: Option<&Bound<'_, PyAny>>,
        settings: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Stream> {
        let open = self.running(py)?;
        let settings = settings::read(settings)?;
        let side = settings.direction.unwrap_or_default();
        let beginning = photo.map(|photo| self.beginning(photo, side)).transpose()?;
        let (planned, making) = self.plan(py, &open, Wanted::new(settings, beginning), true)?;
        let (send, received) = events();
        let number = self.start(py, &open, planned, send)?;
        Ok(Stream::new(open.worker, self.config().clone(), number, received, making))
    }

    /// Generate an image in the background. Images of many calls share batches.
    ///
    /// Parameters
    /// ----------
    /// **settings
    ///     Those of `generate`.
    ///
    /// Returns
    /// -------
    /// concurrent.futures.Future
    ///     The future of the image. It can be cancelled until the image is complete.
    #[pyo3(signature = (**settings))]
    fn submit<'py>(&self, py: Python<'py>, settings: Option<&Bound<'py, PyDict>>) -> PyResult<Bound<'py, PyAny>> {
        let open = self.running(py)?;
        let settings = settings::read(settings)?;
        self.submitted(py, &open, Wanted::new(settings, None))
    }

    /// Generate the image of a job in the background.
    ///
    /// Parameters
    /// ----------
    /// job
    ///     A line of a file for ``eqim-run --jobs``: a JSON object with settings and, if it has a name, its ``id``. A
    ///     ``prefix`` is the path of a PNG or JPEG, which is encoded before this method returns.
    ///
    /// Returns
    /// -------
    /// tuple of str and concurrent.futures.Future
    ///     The id, ``"1"`` if the job has none, and the future of the image.
    ///
    /// Raises
    /// ------
    /// InputError
    ///     If the job is not such an object, or a setting does not fit. The message has the names of the job.
    fn submit_job<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = settings::argument)] job: String,
    ) -> PyResult<(String, Bound<'py, PyAny>)> {
        let (open, names) = (self.running(py)?, Names::Jobs);
        let read = || {
            let (id, settings) = Line::new(1, &job).read()?;
            check_id(&id)?;
            Ok((id, settings))
        };
        let (id, mut settings) = read().or_raise_as(py, names)?;
        // The length of a job includes its prefix.
        if settings.width.is_none() {
            settings.tokens = settings.tokens.or(Some(DEFAULT_TOKENS));
        }
        let (mut beginning, mut prefix_sha256) = (None, None);
        if let Some(path) = &settings.prefix {
            let side = settings.direction.unwrap_or_default();
            let (pixels, hash) = py.detach(|| self.prefix(path, side)).or_raise_as(py, names)?;
            (beginning, prefix_sha256) = (Some(pixels), Some(hash));
        }
        let future = self.submitted(py, &open, Wanted { settings, beginning, prefix_sha256, names })?;
        Ok((id, future))
    }

    /// Encode a photograph to latents.
    ///
    /// Parameters
    /// ----------
    /// photo
    ///     A photograph as in `outpaint`.
    ///
    /// Returns
    /// -------
    /// numpy.ndarray
    ///     Latents, float32 [tokens, embed].
    fn encode<'py>(&self, py: Python<'py>, photo: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let open = self.running(py)?;
        let pixels = self.beginning(photo, Side::Right)?;
        let latents = self.call(py, &open, move |engine| engine.encode(pixels.view().insert_axis(Axis(0))))?;
        Ok(PyArray2::from_owned_array(py, latents.index_axis_move(Axis(0), 0)))
    }

    /// Decode latents to an image.
    ///
    /// Parameters
    /// ----------
    /// latents
    ///     Array or tensor of floating-point numbers [tokens, embed], with at least two tokens.
    ///
    /// Raises
    /// ------
    /// InputError
    ///     If the type or the shape does not fit, or a value is not finite.
    fn decode(&self, py: Python<'_>, latents: &Bound<'_, PyAny>) -> PyResult<Image> {
        let open = self.running(py)?;
        let latents = arrays::latents(latents, self.config().generator.embed)?;
        let image = self.call(py, &open, move |engine| engine.decode(latents.view().insert_axis(Axis(0))))?;
        Image::decoded(py, &image.index_axis_move(Axis(0), 0))
    }

    /// Close the engine. Images in progress are cancelled: their methods raise `ClosedError`.
    fn close(&self, py: Python<'_>) {
        let Some(Open { worker, deliveries, is_closed }) = self.lock().take() else { return };
        // The threads of another process do not exist here.
        if self.process != Process::this() {
            std::mem::forget((worker, deliveries));
            return;
        }
        is_closed.store(true, Ordering::SeqCst);
        py.detach(|| {
            drop(deliveries);
            worker.close();
        });
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        self.close(py);
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (PathBuf,))> {
        let open = py.get_type::<Self>().getattr("from_bundle")?;
        let partial = py.import("functools")?.call_method("partial", (open,), Some(self.options.bind(py)))?;
        Ok((partial, (self.bundle.folder.clone(),)))
    }

    /// Folder of the bundle.
    #[getter]
    fn bundle(&self) -> PathBuf {
        self.bundle.folder.clone()
    }

    /// Name of the backend that runs the model.
    #[getter]
    fn backend(&self) -> &str {
        &self.name
    }

    /// Whether the engine is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.lock().is_none()
    }

    /// Names of the classes, in the order of their numbers. Empty if they have none.
    #[getter]
    fn class_names(&self) -> Vec<String> {
        self.config().generator.class_names.clone()
    }

    /// Number of classes.
    #[getter]
    fn num_classes(&self) -> usize {
        self.config().generator.class_num
    }

    /// Height of all images in pixels.
    #[getter]
    fn height(&self) -> usize {
        self.config().tokenizer.image_height()
    }

    /// Width of a token in pixels.
    #[getter]
    fn token_width(&self) -> usize {
        self.config().tokenizer.token_width()
    }

    /// Number of values per token.
    #[getter]
    fn embed_dim(&self) -> usize {
        self.config().generator.embed
    }

    /// Precision of the bundle: ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"int8"``.
    #[getter]
    fn precision(&self) -> String {
        let manifest = &self.bundle.manifest;
        if manifest.quantization.is_some() { "int8".into() } else { manifest.precision.to_string() }
    }

    fn __repr__(&self) -> String {
        let state = if self.closed() { ", closed" } else { "" };
        format!("<eqim.Engine {} on {}{state}>", self.bundle.folder.display(), self.name)
    }
}
