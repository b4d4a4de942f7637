//! The scheduler: whatever is in the batch and whoever cancels, an image is the one that it is alone.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::mpsc;

use eqim::checkpoint::WeightSet;
use eqim::close::Tolerance;
use eqim::engine::candle::CandleEngine;
use eqim::engine::{Engine, Row, Session};
use eqim::generate::batch::Sequence;
use eqim::generate::generate;
use eqim::generate::memory;
use eqim::generate::scheduler::{Capacity, Event, Order, Scheduler};
use eqim::generate::tiles::{Strip, Tiling, decode_tiles};
use eqim::generate::worker::{self, Command, Worker};
use eqim::request::condition::ClassSchedule;
use eqim::request::solver::{Solver, Tableau};
use eqim::request::{Noise, PreparedRequest, Request};
use eqim::{Config, Error, Result};
use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView3, ArrayView4, Axis, s};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::common::{Fixture, assert_close, fixtures};

const TILING: Tiling = Tiling { tile: 4, overlap: 2 };
const ANY: Capacity = Capacity { images: 4, bytes: u64::MAX };

fn engine() -> CandleEngine {
    Fixture::open(fixtures()).engine(WeightSet::Ema)
}

/// What an image has sent.
#[derive(Default)]
struct Received {
    tokens: Vec<Vec<f32>>,
    strips: Vec<Strip>,
    /// Previews, with the number of tokens that were known and the number of final columns.
    previews: Vec<(usize, usize, Strip)>,
    done: bool,
    failed: Option<String>,
}

type Results = Rc<RefCell<BTreeMap<usize, Received>>>;
type Events = Box<dyn FnMut(Event) -> ControlFlow<()>>;

/// Keeps the events of image `number`. Breaks after `most` tokens.
fn keep(results: &Results, number: usize, most: usize) -> Events {
    let results = Rc::clone(results);
    Box::new(move |event| {
        let mut results = results.borrow_mut();
        let received = results.entry(number).or_default();
        assert!(!received.done && received.failed.is_none(), "image {number}: {event:?} after its end");
        match event {
            Event::Token(index, token) => {
                assert_eq!(index, received.tokens.len(), "image {number}");
                received.tokens.push(token.to_vec());
            }
            Event::Strip(strip) => {
                assert_eq!(strip.index, received.strips.len(), "image {number}");
                received.strips.push(strip);
            }
            Event::Preview(strip) => {
                let done = received.strips.last().map_or(0, |last| last.x + last.pixels.dim().2);
                assert!(strip.x >= done, "image {number}: a preview at {} of final columns to {done}", strip.x);
                received.previews.push((received.tokens.len(), done, strip));
            }
            Event::Done => received.done = true,
            Event::Failed(error) => received.failed = Some(error.to_string()),
        }
        if received.tokens.len() >= most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
}

fn request(config: &Config, seed: u64, class: Option<usize>, tokens: usize, guided: bool) -> Request {
    Request {
        cfg: if guided { 1.5 + seed as f32 % 3.0 } else { 1.0 },
        solver: Solver::Ab2,
        steps: 2,
        noise: Noise::Seed(seed),
        ..Request::new(config, [class], tokens)
    }
}

fn order(config: &Config, number: usize, request: &Request, events: Events) -> Order<Events> {
    let prepared = PreparedRequest::new(config, request).unwrap();
    let sequence = Sequence::of_batch(&prepared).remove(0);
    let tiling = request.tokens.is_multiple_of(2).then_some(TILING);
    Order { number, priority: 0, sequence, sampling: prepared.sampling, tiling, previewed: false, events }
}

/// Asserts that an image is the one that the request makes alone.
fn is_alone(engine: &dyn Engine, request: &Request, received: &Received) {
    let alone = generate(engine, request, |_| {}).unwrap().tokens.index_axis_move(Axis(0), 0);
    assert!(received.done && received.tokens.len() == request.tokens);
    let found: Vec<f32> = received.tokens.concat();
    // Products of a batch are summed in another order than products of one row.
    assert_close(format_args!("{:?}", request.classes), &found, &alone, Tolerance::ACTIVATION);
    if request.tokens.is_multiple_of(2) {
        let tokens = Array2::from_shape_vec(alone.dim(), found).unwrap();
        let mut strips = received.strips.iter();
        decode_tiles(engine, TILING, tokens.view(), |expected| {
            let found = strips.next().unwrap();
            assert_eq!((found.x, &found.pixels), (expected.x, &expected.pixels));
            Ok(())
        })
        .unwrap();
        assert!(strips.next().is_none());
    } else {
        assert!(received.strips.is_empty());
    }
}

/// What is shown before the tiles are decoded: from the first token on, the newest columns, and all of them.
#[test]
fn previews_show_the_newest_tokens() {
    let engine = engine();
    let config = engine.config();
    let width = config.tokenizer.token_width();
    let request = request(config, 1, Some(1), 40, false);
    // A tile that is ready comes instead of a preview.
    let tiles = Tiling { tile: 16, overlap: 4 };
    for (tiling, expected) in [(Tiling::whole(40), &[1, 2, 4, 8, 16, 24, 32][..]), (tiles, &[1, 2, 4, 8, 20, 32])] {
        let results = Results::default();
        let mut scheduler = Scheduler::new(&engine, ANY);
        let order = order(config, 0, &request, keep(&results, 0, usize::MAX));
        scheduler.submit(Order { tiling: Some(tiling), previewed: true, ..order });
        scheduler.finish().unwrap();
        let received = results.borrow_mut().remove(&0).unwrap();
        let tokens = Array2::from_shape_vec((40, received.tokens[0].len()), received.tokens.concat()).unwrap();
        let mut shown = 0;
        for (index, (known, done, preview)) in received.previews.iter().enumerate() {
            let (begin, end) = (preview.x / width, (preview.x + preview.pixels.dim().2) / width);
            assert_eq!((preview.index, end), (index, *known), "the newest token is shown at once");
            shown = shown.max(done / width);
            assert!(begin <= shown && end > shown, "tokens {begin} to {end} are shown after {shown}");
            shown = end;
            let from = begin.saturating_sub(2);
            // A single token is its own neighbour.
            let decoded: Vec<usize> = if end == 1 { vec![0, 0] } else { (from..end).collect() };
            let alone = engine.decode_tokens(tokens.select(Axis(0), &decoded).insert_axis(Axis(0)).view()).unwrap();
            let columns = alone.slice(s![0, .., .., (begin - from) * width..(end - from) * width]);
            assert_close(format_args!("preview {index}"), &preview.pixels, columns, Tolerance::ACTIVATION);
        }
        let known: Vec<usize> = received.previews.iter().map(|(known, ..)| *known).collect();
        assert_eq!(known, expected);
        let strips: usize = received.strips.iter().map(|strip| strip.pixels.dim().2).sum();
        assert_eq!((received.strips.len(), strips), (tiling.count(40), 40 * width));
    }
}

/// Somebody who watches sees the first token at once, however many tiles of others wait.
#[test]
fn a_first_preview_does_not_wait_for_tiles() {
    let (engine, results) = (engine(), Results::default());
    let config = engine.config();
    let request = |number: usize| request(config, number as u64, Some(0), 20, false);
    let mut scheduler = Scheduler::new(&engine, ANY);
    // Each turn decodes one tile, and generates what three halves of a tile need.
    for number in 0..3 {
        scheduler.submit(order(config, number, &request(number), keep(&results, number, usize::MAX)));
    }
    for _ in 0..12 {
        scheduler.turn().unwrap();
    }
    let order = order(config, 3, &request(3), keep(&results, 3, usize::MAX));
    scheduler.submit(Order { previewed: true, ..order });
    scheduler.finish().unwrap();
    let (known, ..) = results.borrow()[&3].previews[0];
    assert_eq!(known, 1);
    is_alone(&engine, &request(3), &results.borrow()[&3]);
}

/// 200 images of two ways of sampling arrive at random, a quarter is cancelled, a quarter gets another class.
#[test]
fn images_are_alone_whoever_comes_and_goes() {
    const IMAGES: usize = 200;
    let (engine, results, random) = (engine(), Results::default(), &mut ChaCha8Rng::seed_from_u64(7));
    let config = engine.config();
    let classes = config.generator.class_num;
    let mut scheduler = Scheduler::new(&engine, Capacity { images: 8, ..ANY });
    let mut requests: Vec<Request> = vec![];
    let (mut cancelled, mut amended) = (vec![], 0);
    loop {
        while requests.len() < IMAGES && random.random_bool(0.5) {
            let number = requests.len();
            let class = Some(random.random_range(0..=classes)).filter(|&class| class < classes);
            let (tokens, guided) = (random.random_range(2..14), random.random_bool(0.6));
            let request = request(config, number as u64, class, tokens, guided);
            // One in eight is no longer wanted after some tokens.
            let most = if random.random_bool(0.125) { random.random_range(1..4) } else { usize::MAX };
            let order = order(config, number, &request, keep(&results, number, most));
            let previewed = order.tiling.is_some() && random.random_bool(0.5);
            scheduler.submit(Order { priority: random.random_range(0..3), previewed, ..order });
            requests.push(request);
        }
        if !requests.is_empty() && random.random_bool(0.25) {
            let number = random.random_range(requests.len().saturating_sub(20)..requests.len());
            if scheduler.cancel(number).unwrap() {
                cancelled.push(number);
            }
        }
        if !requests.is_empty() && random.random_bool(0.4) {
            let number = random.random_range(requests.len().saturating_sub(20)..requests.len());
            let known = results.borrow().get(&number).map_or(0, |received| received.tokens.len());
            let class = ClassSchedule::Constant(Some(random.random_range(0..classes)));
            if let Some((first, classes)) = scheduler.amend(number, &class) {
                assert!(first == 0 && known == 0 || first > known, "{first} after {known} tokens");
                classes.check(requests[number].tokens).unwrap();
                requests[number].classes = vec![classes];
                amended += 1;
            }
        }
        let metrics = scheduler.metrics();
        assert!(metrics.batches.iter().sum::<usize>() <= 8 && metrics.batches.len() <= 2, "{metrics:?}");
        if !scheduler.turn().unwrap() && requests.len() == IMAGES {
            break;
        }
    }
    let results = results.borrow();
    let mut complete = 0;
    for (number, request) in requests.iter().enumerate() {
        match results.get(&number) {
            Some(received) if received.done => {
                is_alone(&engine, request, received);
                complete += 1;
            }
            Some(received) => assert!(cancelled.contains(&number) || received.tokens.len() < 4),
            None => assert!(cancelled.contains(&number), "image {number} was lost"),
        }
    }
    let metrics = scheduler.metrics();
    assert_eq!((metrics.done, metrics.done + metrics.cancelled), (complete, IMAGES as u64));
    assert!(complete > 100 && cancelled.len() > 20 && amended > 40, "{complete} {} {amended}", cancelled.len());
    assert!(metrics.batches.is_empty() && metrics.waiting == 0);
}

#[test]
fn higher_priorities_begin_first_and_batches_take_turns() {
    let (engine, results) = (engine(), Results::default());
    let config = engine.config();
    let mut scheduler = Scheduler::new(&engine, Capacity { images: 2, ..ANY });
    for (number, priority, guided) in [(0, 0, false), (1, 5, true), (2, 5, false), (3, 1, true)] {
        let order = order(config, number, &request(config, 1, Some(0), 5, guided), keep(&results, number, usize::MAX));
        scheduler.submit(Order { priority, ..order });
    }
    let tokens = |number: usize| results.borrow().get(&number).map_or(0, |received| received.tokens.len());
    for turn in 1..=10 {
        scheduler.turn().unwrap();
        assert_eq!([0, 3].map(tokens), [0, 0], "turn {turn}");
        assert!(tokens(1).abs_diff(tokens(2)) <= 1 && tokens(1) + tokens(2) == turn, "turn {turn}");
    }
    scheduler.finish().unwrap();
    assert!((0..4).all(|number| results.borrow()[&number].done));
}

#[test]
fn a_tile_does_not_wait_for_all_tiles() {
    let (engine, results) = (engine(), Results::default());
    let config = engine.config();
    let mut scheduler = Scheduler::new(&engine, ANY);
    for number in 0..4 {
        let request = request(config, number as u64, Some(0), 12, false);
        scheduler.submit(order(config, number, &request, keep(&results, number, usize::MAX)));
    }
    let decoded = || results.borrow().values().map(|received| received.strips.len()).sum::<usize>();
    let tokens = || results.borrow().values().map(|received| received.tokens.len()).sum::<usize>();
    let mut before = (0, 0);
    while scheduler.turn().unwrap() {
        let now = (decoded(), tokens());
        assert!(now.0 - before.0 <= 1, "two tiles in one turn");
        // All images get a token in every turn, also in those with a tile.
        assert!(now.1 == before.1 + 4 || now.1 == 4 * 12, "{now:?} after {before:?}");
        before = now;
    }
    assert_eq!(before, (4 * TILING.count(12), 4 * 12));
}

#[test]
fn memory_is_bounded_before_an_image_begins() {
    let (engine, results) = (engine(), Results::default());
    let config = engine.config();
    let request = |guided| request(config, 1, Some(0), 5, guided);
    let evaluations = Solver::Ab2.evaluations(2);
    let bytes = memory::of_image(config, evaluations, true);
    assert!(bytes == 2 * memory::of_image(config, evaluations, false));
    let mut scheduler = Scheduler::new(&engine, Capacity { images: 4, bytes: bytes + bytes / 2 });
    for number in 0..3 {
        scheduler.submit(order(config, number, &request(number != 1), keep(&results, number, usize::MAX)));
    }
    let mut most = 0;
    while scheduler.turn().unwrap() {
        most = most.max(scheduler.metrics().batches.iter().sum::<usize>());
    }
    // One with guidance and one without fit, but not two with guidance.
    assert_eq!(most, 2);
    assert!((0..3).all(|number| results.borrow()[&number].done));

    let mut scheduler = Scheduler::new(&engine, Capacity { images: 4, bytes: bytes - 1 });
    scheduler.submit(order(config, 4, &request(true), keep(&results, 4, usize::MAX)));
    let refused = results.borrow()[&4].failed.clone().unwrap();
    assert!(refused.starts_with("steps is too large") && !scheduler.turn().unwrap(), "{refused}");
}

/// An engine whose sampler fails once, whose decoder fails at first, or whose sessions always fail.
struct Failing {
    engine: CandleEngine,
    calls: Cell<usize>,
    fails_at: usize,
    /// Number of images that are not decoded.
    undecoded: Cell<usize>,
    /// Whether pixels are not finite.
    is_blank: Cell<bool>,
    is_stuck: bool,
}

impl Failing {
    fn new(fails_at: usize, undecoded: usize, is_stuck: bool) -> Self {
        Self {
            engine: engine(),
            calls: Cell::new(0),
            fails_at,
            undecoded: Cell::new(undecoded),
            is_blank: Cell::new(false),
            is_stuck,
        }
    }
}

impl Engine for Failing {
    fn config(&self) -> &Config {
        self.engine.config()
    }

    fn name(&self) -> &str {
        "failing"
    }

    fn session(&self) -> Result<Box<dyn Session + '_>> {
        if self.is_stuck { Ok(Box::new(Stuck)) } else { self.engine.session() }
    }

    fn sample(
        &self,
        z: ArrayView2<f32>,
        noise: ArrayView2<f32>,
        guidance: &[f32],
        tableau: &Tableau,
    ) -> Result<Array2<f32>> {
        self.calls.set(self.calls.get() + 1);
        if self.calls.get() == self.fails_at {
            return Err(Error::run("sampler", "no memory"));
        }
        self.engine.sample(z, noise, guidance, tableau)
    }

    fn decode(&self, latents: ArrayView3<f32>) -> Result<Array4<f32>> {
        if let Some(left) = self.undecoded.get().checked_sub(1) {
            self.undecoded.set(left);
            return Err(Error::run("decoder", "no memory"));
        }
        let pixels = self.engine.decode(latents)?;
        Ok(if self.is_blank.get() { pixels * f32::NAN } else { pixels })
    }

    fn encode(&self, images: ArrayView4<f32>) -> Result<Array3<f32>> {
        self.engine.encode(images)
    }
}

#[test]
fn an_engine_that_fails_once_generates_what_comes_after() {
    let engine = Failing::new(3, 0, false);
    let (config, results) = (engine.config().clone(), Results::default());
    let mut scheduler = Scheduler::new(&engine, ANY);
    let request = |number: usize| request(&config, number as u64, Some(0), 6, false);
    for number in 0..2 {
        scheduler.submit(order(&config, number, &request(number), keep(&results, number, usize::MAX)));
    }
    let error = scheduler.finish().unwrap_err();
    assert!(!error.is_input() && error.to_string().contains("no memory"), "{error}");
    for number in 0..2 {
        let failed = results.borrow()[&number].failed.clone().unwrap();
        assert!(failed.contains("no memory"), "{failed}");
    }
    assert_eq!(scheduler.metrics().failed, 2);
    scheduler.submit(order(&config, 2, &request(2), keep(&results, 2, usize::MAX)));
    scheduler.finish().unwrap();
    is_alone(&engine.engine, &request(2), &results.borrow()[&2]);
}

#[test]
fn an_image_that_cannot_be_decoded_leaves_its_row() {
    let engine = Failing::new(0, 1, false);
    let (config, results) = (engine.config().clone(), Results::default());
    for (previewed, tokens) in [(true, 1), (false, TILING.tile)] {
        engine.undecoded.set(1);
        results.borrow_mut().clear();
        let mut scheduler = Scheduler::new(&engine, ANY);
        let request = |number: usize| request(&config, number as u64, Some(0), 8, false);
        for number in 0..2 {
            let order = order(&config, number, &request(number), keep(&results, number, usize::MAX));
            scheduler.submit(Order { previewed: previewed && number == 0, ..order });
        }
        let error = std::iter::repeat_with(|| scheduler.turn()).find_map(Result::err).unwrap();
        assert!(error.to_string().contains("no memory"), "{error}");
        assert_eq!((scheduler.metrics().batches, scheduler.metrics().failed), (vec![1], 1));
        assert_eq!(results.borrow()[&1].tokens.len(), tokens);
        scheduler.finish().unwrap();
        assert!(results.borrow()[&0].failed.as_ref().unwrap().contains("no memory"));
        is_alone(&engine.engine, &request(1), &results.borrow()[&1]);
    }
}

/// The engine has not failed: other images go on, and it stays ready.
#[test]
fn an_image_with_a_pixel_that_is_not_finite_fails_alone() {
    let engine = Failing::new(0, 0, false);
    let (config, results) = (engine.config().clone(), Results::default());
    let mut scheduler = Scheduler::new(&engine, ANY);
    let request = |number: usize| request(&config, number as u64, Some(0), if number == 0 { 4 } else { 8 }, false);
    for number in 0..2 {
        scheduler.submit(order(&config, number, &request(number), keep(&results, number, usize::MAX)));
    }
    engine.is_blank.set(true);
    while scheduler.metrics().failed == 0 {
        scheduler.turn().unwrap();
    }
    engine.is_blank.set(false);
    scheduler.finish().unwrap();
    let failed = results.borrow()[&0].failed.clone().unwrap();
    assert!(failed.contains("a pixel is not finite"), "{failed}");
    is_alone(&engine.engine, &request(1), &results.borrow()[&1]);
}

/// A session that cannot be arranged, so that no image can begin or leave.
struct Stuck;

impl Session for Stuck {
    fn arrange(&mut self, _rows: &[Row]) -> Result<Array2<f32>> {
        Err(Error::run("session", "no memory"))
    }

    fn step(&mut self, _tokens: ArrayView2<f32>, _positions: &[i64]) -> Result<Array2<f32>> {
        Err(Error::run("session", "no memory"))
    }
}

#[test]
fn images_that_cannot_begin_fail() {
    let engine = Failing::new(0, 0, true);
    let (config, results) = (engine.config().clone(), Results::default());
    let mut scheduler = Scheduler::new(&engine, ANY);
    // They are sampled in different ways, so that they would begin in two batches.
    for (number, guided) in [(0, false), (1, true)] {
        let request = request(&config, 0, Some(0), 5, guided);
        scheduler.submit(order(&config, number, &request, keep(&results, number, usize::MAX)));
    }
    assert!(scheduler.turn().unwrap_err().to_string().contains("no memory"));
    assert!(results.borrow()[&0].failed.is_some() && results.borrow()[&1].failed.is_some());
    assert!(!scheduler.turn().unwrap(), "nothing is left");
    assert_eq!(engine.calls.get(), 0, "no image has begun");
}

/// A worker whose engine is open.
fn start(open: impl FnOnce() -> Result<Box<dyn Engine>> + Send + 'static) -> Worker {
    let (opened, is_open) = mpsc::channel();
    let worker = Worker::start("test", ANY, open, move |result| opened.send(result).unwrap()).unwrap();
    is_open.recv().unwrap().unwrap();
    assert!(worker.state().is_ready);
    worker
}

/// Name of the engine. When it is known, the worker has told what it did before.
fn name_of(worker: &Worker) -> String {
    let (reply, called) = mpsc::channel();
    worker.send(Command::Call(Box::new(move |engine| reply.send(engine.name().to_string()).unwrap()))).unwrap();
    called.recv().unwrap()
}

/// Several threads ask one worker. It ends when all of them are gone, after all images.
#[test]
fn a_worker_serves_threads() {
    let worker = start(|| Ok(Box::new(engine())));
    let config = engine().config().clone();
    let (one, two) = (request(&config, 1, Some(0), 6, true), request(&config, 2, Some(1), 900, false));
    let (events, received) = mpsc::channel();
    let generate = |number: usize, request: &Request, events: &mpsc::Sender<(usize, Event)>| {
        let events = events.clone();
        let send_on = move |event| match events.send((number, event)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        };
        let order = worker::order(&config, request, Some(TILING), false, Box::new(send_on)).unwrap();
        worker.send(Command::Generate(Box::new(Order { number, tiling: None, ..order }))).unwrap();
    };
    generate(1, &one, &events);
    // The receiver of the second image goes away after its first event.
    let (gone, first) = mpsc::channel();
    generate(2, &two, &gone);
    drop(gone);
    assert!(matches!(first.recv().unwrap(), (2, Event::Token(0, _))));
    drop(first);
    // The third one is cancelled, and gets new classes before.
    generate(3, &two, &events);
    let (reply, amended) = mpsc::channel();
    let amended_to = Box::new(move |found| reply.send(found).unwrap());
    worker.send(Command::Amend(3, ClassSchedule::Constant(Some(2)), amended_to)).unwrap();
    assert!(amended.recv().unwrap().is_some());
    worker.send(Command::Cancel(3)).unwrap();
    drop(events);
    let of_one: Vec<Event> = received.iter().filter(|(number, _)| *number == 1).map(|(_, event)| event).collect();
    assert_eq!(of_one.len(), 7);
    assert!(matches!(of_one.last(), Some(Event::Done)));
    assert_eq!(name_of(&worker), "Candle");
    let metrics = worker.state().metrics.clone();
    assert_eq!((metrics.done, metrics.cancelled, metrics.failed), (1, 2, 0));
    worker.close();
}

#[test]
fn a_worker_is_not_ready_after_its_decoder_failed() {
    let worker = start(|| Ok(Box::new(Failing::new(0, 1, false))));
    let config = engine().config().clone();
    for (is_done, seed) in [(false, 1), (true, 2)] {
        let (events, received) = mpsc::channel();
        let keep = move |event| {
            events.send(event).unwrap();
            ControlFlow::Continue(())
        };
        let order =
            worker::order(&config, &request(&config, seed, None, 6, false), None, false, Box::new(keep)).unwrap();
        worker.send(Command::Generate(Box::new(order))).unwrap();
        match received.iter().last().unwrap() {
            Event::Done => assert!(is_done),
            Event::Failed(error) => assert!(!is_done && error.to_string().contains("no memory"), "{error}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(name_of(&worker), "failing");
        assert_eq!(worker.state().is_ready, is_done);
    }
    worker.close();
}
