//! The generation loop on a device. Weights, caches, conditions and the state of the ODE stay on the device.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::iter::zip;
use std::mem::take;
use std::rc::Rc;
use std::time::Instant;

use eqim::engine::{Engine, PrefillCache, Row, Session, lerp};
use eqim::model::{Sizes, Stage, ValueInfo};
use eqim::request::condition::ClassSchedule;
use eqim::request::solver::Tableau;
use eqim::request::timing::StageTimes;
use eqim::request::{PreparedRequest, check_finite};
use eqim::{Config, Error, Result, ResultExt};
use half::{bf16, f16};
use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView3, ArrayView4, Axis, Dimension, s};

use super::device::{ALIGNMENT, Address, Binding, Device};
use super::sidecar::{EngineSet, Profile};
use eqim::bundle::Precision;

/// The engines of a bundle on a device.
pub struct TrtEngine<D: Device> {
    // Fields are dropped in this order: contexts before the device that they run on.
    contexts: [RefCell<Option<D::Context>>; Stage::ALL.len()],
    spans: RefCell<Vec<Span<D::Event>>>,
    times: RefCell<StageTimes>,
    device: D,
    config: Config,
    profiles: [BTreeMap<String, Profile>; Stage::ALL.len()],
    caches: Precision,
    name: String,
}

/// Work between two events.
struct Span<E> {
    work: Work,
    from: E,
    to: E,
}

#[derive(Clone, Copy)]
enum Work {
    Upload,
    Download,
    Run(Stage),
}

/// A buffer in device memory.
struct Buffer<D: Device> {
    _memory: D::Memory,
    address: Address,
    bytes: usize,
}

/// Values for one upload, one after another, each at an aligned offset.
#[derive(Default)]
struct Arena(Vec<u8>);

impl Arena {
    /// Appends values. Returns their offset.
    fn push(&mut self, bytes: impl IntoIterator<Item = u8>) -> u64 {
        self.0.resize(aligned(self.0.len()), 0);
        let place = self.0.len();
        self.0.extend(bytes);
        place as u64
    }
}

fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

fn float_bytes<'a>(values: impl IntoIterator<Item = &'a f32>) -> Vec<u8> {
    values.into_iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn integer_bytes(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect()
}

impl<D: Device> TrtEngine<D> {
    /// Loads the engines of a set. The encoder is loaded when it is first used, because few runs need it.
    ///
    /// # Errors
    /// If an engine is missing or cannot be loaded.
    pub fn new(device: D, set: &EngineSet) -> Result<Self> {
        let record = |stage: Stage| {
            let missing = || Error::run(stage.name(), "has no engine");
            set.engines.get(stage.name()).ok_or_else(missing)
        };
        let mut profiles: [BTreeMap<String, Profile>; Stage::ALL.len()] = Default::default();
        for stage in Stage::ALL {
            profiles[stage as usize] = record(stage)?.profiles.clone();
        }
        let engine = Self {
            contexts: Default::default(),
            spans: RefCell::default(),
            times: RefCell::default(),
            name: format!("{} on {}", set.tensorrt, device.name()),
            device,
            config: set.model.clone(),
            profiles,
            caches: record(Stage::Step)?.precision,
        };
        for stage in [Stage::Prefill, Stage::Step, Stage::Flow, Stage::Decoder] {
            *engine.contexts[stage as usize].borrow_mut() = Some(engine.device.load(stage)?);
        }
        Ok(engine)
    }

    /// Allocates zeroed memory for `bytes` bytes, and at least one.
    fn allocate(&self, bytes: usize) -> Result<Buffer<D>> {
        let (memory, address) = self.device.allocate(aligned(bytes.max(1)))?;
        Ok(Buffer { _memory: memory, address, bytes })
    }

    /// Enqueues work on the device, with an event before it and an event after it.
    fn spanned<T>(&self, work: Work, hand_over: impl FnOnce(&D) -> Result<T>) -> Result<T> {
        let from = self.device.mark()?;
        let start = Instant::now();
        let result = hand_over(&self.device)?;
        if matches!(work, Work::Run(_)) {
            self.times.borrow_mut().device.get_or_insert_default().enqueue += start.elapsed();
        }
        let to = self.device.mark()?;
        self.spans.borrow_mut().push(Span { work, from, to });
        Ok(result)
    }

    fn upload(&self, bytes: &[u8], to: Address) -> Result<()> {
        self.spanned(Work::Upload, |device| device.upload(bytes, to))
    }

    fn uploaded(&self, bytes: &[u8]) -> Result<Buffer<D>> {
        let buffer = self.allocate(bytes.len())?;
        self.upload(bytes, buffer.address)?;
        Ok(buffer)
    }

    fn downloaded(&self, buffer: &Buffer<D>) -> Result<Vec<f32>> {
        let mut bytes = vec![0; buffer.bytes];
        self.spanned(Work::Download, |device| device.download(buffer.address, &mut bytes))?;
        Ok(floats(&bytes))
    }

    /// Waits until the work of all spans is complete, and adds up their times.
    fn settle(&self, spans: Vec<Span<D::Event>>) -> Result<()> {
        let Some(last) = spans.last() else { return Ok(()) };
        self.device.wait(&last.to)?;
        for span in &spans {
            let time = self.device.elapsed(&span.from, &span.to)?;
            let mut times = self.times.borrow_mut();
            let device = times.device.get_or_insert_default();
            match span.work {
                Work::Upload => device.host_to_device += time,
                Work::Download => device.device_to_host += time,
                Work::Run(Stage::Prefill) => times.prefill.0.push(time),
                Work::Run(Stage::Step) => times.step.0.push(time),
                Work::Run(Stage::Flow) => times.flow.0.push(time),
                // The caller measures the total time of these stages.
                Work::Run(Stage::Decoder | Stage::Encoder) => {}
            }
        }
        Ok(())
    }

    /// Discards spans and times of an earlier run, also of a run that failed.
    fn forget(&self) {
        self.spans.borrow_mut().clear();
        self.times.take();
    }

    /// Runs a stage. `inputs` and `outputs` are in the order of the stage, and `sizes` holds the sizes of symbolic
    /// axes.
    fn run(&self, stage: Stage, sizes: &Sizes, inputs: &[Address], outputs: &[Address]) -> Result<()> {
        let infos = stage.inputs(&self.config);
        let input = |(info, &address): (&ValueInfo, &Address)| Binding {
            name: info.name.clone(),
            shape: Some(shape(info, sizes)),
            address,
        };
        let mut bindings: Vec<Binding> = infos.iter().zip(inputs).map(input).collect();
        let output = |(info, &address): (ValueInfo, &Address)| Binding { name: info.name, shape: None, address };
        bindings.extend(stage.outputs(&self.config).into_iter().zip(outputs).map(output));
        let mut context = self.contexts[stage as usize].borrow_mut();
        if context.is_none() {
            *context = Some(self.device.load(stage)?);
        }
        let Some(context) = context.as_mut() else { return Err(Error::run(stage.name(), "has no engine")) };
        self.spanned(Work::Run(stage), |device| device.enqueue(context, &bindings))
    }

    /// Checks the input shapes of a stage against its optimization profile, before anything runs.
    fn check(&self, stage: Stage, sizes: &Sizes) -> Result<()> {
        for info in stage.inputs(&self.config) {
            let Some(profile) = self.profiles[stage as usize].get(&info.name) else { continue };
            let asked = shape(&info, sizes);
            let within =
                asked.iter().zip(profile.min.iter().zip(&profile.max)).all(|(n, (min, max))| (min..=max).contains(&n));
            if !within {
                let problem = format!(
                    "of {} takes {} from {:?} to {:?}, and this run needs {asked:?}: build the engines again with \
                     another max_batch or max_tokens, or with other smallest and largest shapes",
                    stage.name(),
                    info.name,
                    profile.min,
                    profile.max
                );
                return Err(Error::input("the engine", problem));
            }
        }
        Ok(())
    }

    fn check_rollout(&self, rows: usize, batch: usize, evaluations: usize) -> Result<()> {
        self.check(Stage::Prefill, &Sizes::of_batch(rows))?;
        self.check(Stage::Step, &Sizes::of_batch(rows))?;
        self.check(Stage::Flow, &flow_sizes(rows, batch, evaluations))
    }

    /// Uploads the input of a stage with one input and one output, runs the stage, and downloads the output of `output`
    /// values.
    fn through<I: Dimension>(
        &self,
        stage: Stage,
        input: ndarray::ArrayView<f32, I>,
        sizes: &Sizes,
        output: usize,
    ) -> Result<Vec<f32>> {
        self.forget();
        self.check(stage, sizes)?;
        let input = self.uploaded(&float_bytes(&input))?;
        let output = self.allocate(4 * output)?;
        self.run(stage, sizes, &[input.address], &[output.address])?;
        self.downloaded(&output)
    }

    /// Device times of all work since the last call.
    fn taken(&self) -> Result<StageTimes> {
        let spans = take(&mut *self.spans.borrow_mut());
        self.settle(spans)?;
        Ok(self.times.take())
    }
}

/// Shape of an input or output as TensorRT expects it.
fn shape(info: &ValueInfo, sizes: &Sizes) -> Vec<i64> {
    info.shape(sizes).into_iter().map(|size| size as i64).collect()
}

fn flow_sizes(rows: usize, batch: usize, evaluations: usize) -> Sizes {
    Sizes { rows, evaluations, ..Sizes::of_batch(batch) }
}

/// Keys and values of a batch on the device.
struct Caches<'a, D: Device> {
    engine: &'a TrtEngine<D>,
    rows: usize,
    /// Conditions of the next tokens, `[rows, D]`.
    z: Buffer<D>,
    cross: Vec<Buffer<D>>,
    /// Keys and values of the last tokens, and buffers for the next ones. The two swap places at every step.
    past: Vec<Buffer<D>>,
    present: Vec<Buffer<D>>,
    /// Inputs of a step. Their addresses do not change.
    token: Buffer<D>,
    position: Buffer<D>,
}

impl<'a, D: Device> Caches<'a, D> {
    /// Caches of zeros.
    fn empty(engine: &'a TrtEngine<D>, rows: usize) -> Result<Self> {
        let generator = &engine.config.generator;
        let cache = |length: usize| -> Result<Vec<Buffer<D>>> {
            let bytes = rows * generator.heads * length * generator.head_dim() * engine.caches.bytes();
            (0..2 * generator.depth).map(|_| engine.allocate(bytes)).collect()
        };
        Ok(Self {
            engine,
            rows,
            z: engine.allocate(4 * rows * generator.dim)?,
            cross: cache(generator.buffer)?,
            past: cache(generator.window)?,
            present: cache(generator.window)?,
            token: engine.allocate(4 * rows * generator.embed)?,
            position: engine.allocate(8 * rows)?,
        })
    }

    /// Runs the prefill on labels `[rows]` in device memory.
    fn new(engine: &'a TrtEngine<D>, labels: Address, rows: usize) -> Result<Self> {
        let caches = Self::empty(engine, rows)?;
        let outputs: Vec<Address> = [&caches.z].into_iter().chain(&caches.cross).map(|buffer| buffer.address).collect();
        engine.run(Stage::Prefill, &Sizes::of_batch(rows), &[labels], &outputs)?;
        Ok(caches)
    }

    /// Runs one step on the contents of `token` and `position`.
    fn step(&mut self) -> Result<()> {
        let inputs = [&self.token, &self.position].into_iter().chain(&self.past).chain(&self.cross);
        let inputs: Vec<Address> = inputs.map(|buffer| buffer.address).collect();
        let outputs: Vec<Address> = [&self.z].into_iter().chain(&self.present).map(|buffer| buffer.address).collect();
        self.engine.run(Stage::Step, &Sizes::of_batch(self.rows), &inputs, &outputs)?;
        std::mem::swap(&mut self.past, &mut self.present);
        Ok(())
    }

    fn download_z(&self) -> Result<Array2<f32>> {
        let values = self.engine.downloaded(&self.z)?;
        Array2::from_shape_vec((self.rows, self.engine.config.generator.dim), values).or_run("z")
    }
}

/// A batch whose rows can begin and end at any step.
struct TrtSession<'a, D: Device> {
    engine: &'a TrtEngine<D>,
    classes: PrefillCache<Class<'a, D>>,
    caches: Option<Caches<'a, D>>,
}

/// Prefill output of one class: a row of caches in which no step has run.
struct Class<'a, D: Device> {
    caches: Rc<Caches<'a, D>>,
    row: usize,
    z: Vec<f32>,
}

impl<'a, D: Device> TrtSession<'a, D> {
    fn prefill(engine: &'a TrtEngine<D>, labels: &[i64]) -> Result<Vec<Class<'a, D>>> {
        let on_device = engine.uploaded(&integer_bytes(labels))?;
        let caches = Rc::new(Caches::new(engine, on_device.address, labels.len())?);
        let z = caches.download_z()?;
        let class = |row| Class { caches: Rc::clone(&caches), row, z: z.row(row).to_vec() };
        Ok((0..labels.len()).map(class).collect())
    }

    /// Writes a mix of the keys and values of two classes to row `to.1` of the `to.2` rows of the buffers `to.0`.
    /// `share` is the share of the second class. The host computes the mix, because no engine does.
    fn mix_rows(
        &self,
        (a, b): (&Class<'a, D>, &Class<'a, D>),
        share: f32,
        to: (&[Buffer<D>], usize, usize),
    ) -> Result<()> {
        let engine = self.engine;
        for (cache, target) in to.0.iter().enumerate() {
            let bytes = target.bytes / to.2;
            let read = |class: &Class<D>| -> Result<Vec<u8>> {
                let mut values = vec![0; bytes];
                let address = class.caches.cross[cache].address + (class.row * bytes) as u64;
                engine.spanned(Work::Download, |device| device.download(address, &mut values))?;
                Ok(values)
            };
            let mixed = mixed(engine.caches, &read(a)?, &read(b)?, share);
            engine.upload(&mixed, target.address + (to.1 * bytes) as u64)?;
        }
        Ok(())
    }

    fn copy_row(&self, from: (&[Buffer<D>], usize, usize), to: (&[Buffer<D>], usize, usize)) -> Result<()> {
        for (source, target) in zip(from.0, to.0) {
            let bytes = target.bytes / to.2;
            let (source, target) = (source.address + (from.1 * bytes) as u64, target.address + (to.1 * bytes) as u64);
            self.engine.device.copy(source, target, bytes)?;
        }
        Ok(())
    }
}

/// Linear interpolation of two caches, given as bytes: `a + share * (b - a)`.
fn mixed(precision: Precision, a: &[u8], b: &[u8], share: f32) -> Vec<u8> {
    fn each<const N: usize>(a: &[u8], b: &[u8], mix: impl Fn([u8; N], [u8; N]) -> [u8; N]) -> Vec<u8> {
        zip(a.as_chunks().0, b.as_chunks().0).flat_map(|(&a, &b)| mix(a, b)).collect()
    }
    match precision {
        Precision::Fp32 => each(a, b, |a, b| lerp(f32::from_le_bytes(a), f32::from_le_bytes(b), share).to_le_bytes()),
        Precision::Fp16 => each(a, b, |a, b| {
            let [a, b] = [a, b].map(|bytes| f16::from_le_bytes(bytes).to_f32());
            f16::from_f32(lerp(a, b, share)).to_le_bytes()
        }),
        Precision::Bf16 => each(a, b, |a, b| {
            let [a, b] = [a, b].map(|bytes| bf16::from_le_bytes(bytes).to_f32());
            bf16::from_f32(lerp(a, b, share)).to_le_bytes()
        }),
    }
}

impl<D: Device> Session for TrtSession<'_, D> {
    fn arrange(&mut self, rows: &[Row]) -> Result<Array2<f32>> {
        let engine = self.engine;
        engine.forget();
        let count = rows.len();
        engine.check(Stage::Prefill, &Sizes::of_batch(count))?;
        engine.check(Stage::Step, &Sizes::of_batch(count))?;
        self.classes.update(rows, |new| Self::prefill(engine, new))?;
        let caches = Caches::empty(engine, count)?;
        let mut z = vec![];
        for (to, row) in rows.iter().enumerate() {
            let (class, blend) = self.classes.get(row.condition)?;
            match blend {
                None => {
                    self.copy_row((&class.caches.cross, class.row, class.caches.rows), (&caches.cross, to, count))?;
                }
                Some((other, share)) => self.mix_rows((class, other), share, (&caches.cross, to, count))?,
            }
            match (row.kept, &self.caches, blend) {
                (Some(from), Some(old), _) => self.copy_row((&old.past, from, old.rows), (&caches.past, to, count))?,
                (_, _, None) => z.extend_from_slice(&class.z),
                (_, _, Some((other, share))) => z.extend(zip(&class.z, &other.z).map(|(&a, &b)| lerp(a, b, share))),
            }
        }
        // The old caches are freed only after they have been copied.
        engine.device.wait(&engine.device.mark()?)?;
        self.caches = Some(caches);
        let dim = engine.config.generator.dim;
        Array2::from_shape_vec((z.len() / dim, dim), z).or_run("z")
    }

    fn step(&mut self, tokens: ArrayView2<f32>, positions: &[i64]) -> Result<Array2<f32>> {
        let caches = self.caches.as_mut().ok_or_else(|| Error::run("transformer step", "the batch has no rows"))?;
        self.engine.upload(&float_bytes(tokens), caches.token.address)?;
        self.engine.upload(&integer_bytes(positions), caches.position.address)?;
        caches.step()?;
        caches.download_z()
    }
}

impl<D: Device> Engine for TrtEngine<D> {
    fn config(&self) -> &Config {
        &self.config
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn session(&self) -> Result<Box<dyn Session + '_>> {
        Ok(Box::new(TrtSession { engine: self, classes: PrefillCache::default(), caches: None }))
    }

    fn sample(
        &self,
        z: ArrayView2<f32>,
        noise: ArrayView2<f32>,
        guidance: &[f32],
        tableau: &Tableau,
    ) -> Result<Array2<f32>> {
        self.forget();
        let sizes = flow_sizes(z.dim().0, noise.dim().0, tableau.evaluations());
        self.check(Stage::Flow, &sizes)?;
        let mut arena = Arena::default();
        let Tableau { times, updates } = tableau;
        let places =
            [float_bytes(z), float_bytes(noise), float_bytes(guidance), float_bytes(times), float_bytes(updates)]
                .map(|bytes| arena.push(bytes));
        let inputs = self.uploaded(&arena.0)?;
        let token = self.allocate(4 * noise.len())?;
        self.run(Stage::Flow, &sizes, &places.map(|place| inputs.address + place), &[token.address])?;
        Array2::from_shape_vec(noise.dim(), self.downloaded(&token)?).or_run("token")
    }

    fn decode(&self, latents: ArrayView3<f32>) -> Result<Array4<f32>> {
        let (batch, tokens, _) = latents.dim();
        let (width, height) = self.config.image_size(tokens);
        let sizes = Sizes { tokens, ..Sizes::of_batch(batch) };
        let values = self.through(Stage::Decoder, latents, &sizes, batch * 3 * height * width)?;
        Array4::from_shape_vec((batch, 3, height, width), values).or_run("image")
    }

    fn encode(&self, images: ArrayView4<f32>) -> Result<Array3<f32>> {
        let (batch, _, _, width) = images.dim();
        let (tokens, embed) = (width / self.config.tokenizer.token_width(), self.config.generator.embed);
        let sizes = Sizes { width, ..Sizes::of_batch(batch) };
        let values = self.through(Stage::Encoder, images, &sizes, batch * tokens * embed)?;
        Array3::from_shape_vec((batch, tokens, embed), values).or_run("latent")
    }

    /// A rollout is one upload, one download, and only enqueued work between them. The host waits for a token only
    /// after the next token is enqueued. Images with several classes are generated in a session instead, because the
    /// host mixes the classes.
    fn fused_rollout(
        &self,
        prepared: &PreparedRequest,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Option<(Array3<f32>, StageTimes)>> {
        if prepared.classes.iter().any(|label| matches!(label, ClassSchedule::Spans(_))) {
            return Ok(None);
        }
        self.forget();
        let conditions = prepared.conditions(&self.config, 0);
        let labels: Vec<i64> = conditions.iter().map(|condition| condition.label).collect();
        let (rows, batch, evaluations) = (labels.len(), prepared.batch(), prepared.sampling.tableau.evaluations());
        self.check_rollout(rows, batch, evaluations)?;
        let placed = Placed::new(prepared, &labels);
        let inputs = self.uploaded(&placed.arena.0)?;
        let at = |place: u64| inputs.address + place;
        let bytes = 4 * batch * self.config.generator.embed;
        let slot = aligned(bytes);
        let tokens = self.allocate(prepared.tokens * slot)?;
        let sizes = flow_sizes(rows, batch, evaluations);

        let mut caches = Caches::new(self, at(placed.labels), rows)?;
        let mut before = vec![];
        for index in 0..prepared.tokens {
            let here = tokens.address + (index * slot) as u64;
            if index > 0 {
                for stream in 0..rows / batch {
                    self.device.copy(here - slot as u64, caches.token.address + (stream * bytes) as u64, bytes)?;
                }
                self.device.copy(at(placed.positions[index - 1]), caches.position.address, 8 * rows)?;
                caches.step()?;
            }
            if index < prepared.given() {
                self.device.copy(at(placed.prefix[index]), here, bytes)?;
                continue;
            }
            let inputs = [
                caches.z.address,
                at(placed.noise[index - prepared.given()]),
                at(placed.guidance[index]),
                at(placed.times),
                at(placed.updates),
            ];
            self.run(Stage::Flow, &sizes, &inputs, &[here])?;
            if !before.is_empty() {
                self.settle(take(&mut before))?;
                progress(index);
            }
            before = take(&mut *self.spans.borrow_mut());
        }
        self.settle(before)?;
        progress(prepared.tokens);
        let values = self.downloaded(&tokens)?;
        let times = self.taken()?;
        Ok(Some((self.gathered(prepared, &values, slot / 4)?, times)))
    }
}

impl<D: Device> TrtEngine<D> {
    /// Collects tokens `[B, N, E]` from slots of `slot` values, each with one token per image, `[B, E]`.
    fn gathered(&self, prepared: &PreparedRequest, values: &[f32], slot: usize) -> Result<Array3<f32>> {
        let (batch, embed) = (prepared.batch(), self.config.generator.embed);
        let mut tokens = Array3::zeros((batch, prepared.tokens, embed));
        for (index, slot) in values.chunks_exact(slot).enumerate() {
            let token = ArrayView2::from_shape((batch, embed), &slot[..batch * embed]);
            let token = token.or_run("token")?;
            check_finite(&self.name, index, token)?;
            tokens.index_axis_mut(Axis(1), index).assign(&token);
        }
        Ok(tokens)
    }
}

/// All inputs of a rollout, and the offset of each.
struct Placed {
    arena: Arena,
    labels: u64,
    times: u64,
    updates: u64,
    positions: Vec<u64>,
    guidance: Vec<u64>,
    noise: Vec<u64>,
    prefix: Vec<u64>,
}

impl Placed {
    fn new(prepared: &PreparedRequest, labels: &[i64]) -> Self {
        let (rows, batch) = (labels.len(), prepared.batch());
        let mut arena = Arena::default();
        let labels = arena.push(integer_bytes(labels));
        let times = arena.push(float_bytes(&prepared.sampling.tableau.times));
        let updates = arena.push(float_bytes(&prepared.sampling.tableau.updates));
        let positions =
            (0..prepared.tokens).map(|index| arena.push(integer_bytes(&vec![index as i64; rows]))).collect();
        let guidance = prepared.guidance.iter().map(|&value| arena.push(float_bytes(&vec![value; batch]))).collect();
        let mut slices = |array: &Array3<f32>| -> Vec<u64> {
            (0..array.dim().1).map(|index| arena.push(float_bytes(array.slice(s![.., index, ..])))).collect()
        };
        let (noise, prefix) = (slices(&prepared.noise), slices(&prepared.prefix));
        Self { arena, labels, times, updates, positions, guidance, noise, prefix }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_of_every_precision_are_mixed() {
        let (a, b) = ([1.0f32, -2.0, 0.5], [3.0f32, 2.0, 0.5]);
        let expected = [1.5f32, -1.0, 0.5];
        assert_eq!(mixed(Precision::Fp32, &float_bytes(&a), &float_bytes(&b), 0.25), float_bytes(&expected));
        let halves = |values: [f32; 3]| values.map(|value| f16::from_f32(value).to_le_bytes()).concat();
        assert_eq!(mixed(Precision::Fp16, &halves(a), &halves(b), 0.25), halves(expected));
        let brains = |values: [f32; 3]| values.map(|value| bf16::from_f32(value).to_le_bytes()).concat();
        assert_eq!(mixed(Precision::Bf16, &brains(a), &brains(b), 0.25), brains(expected));
    }
}
