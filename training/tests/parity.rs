//! One training step of the generator, compared with the PyTorch reference on its recorded random inputs, and training
//! steps on a GPU, compared with those on a CPU.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use candle_core::{DType, Device, Tensor, Var};
use eqim::checkpoint::{self, Hints, WeightSet, adapter};
use eqim::close::{largest, largest_difference, values};
use eqim::engine::candle::open_device;
use eqim_training::adamw::Update;
use eqim_training::generator::{StepInputs, decays, loss, time};
use eqim_training::learner::{Learner, Losses, Measures};
use eqim_training::photos::Photos;
use eqim_training::ranks::Ranks;
use eqim_training::recipe::{Base, Recipe};
use eqim_training::run::Task;
use eqim_training::tokenizer::{Networks, TokenizerTask};
use image::{Rgb, RgbImage};

/// Cargo sets the variable, and so does `gpu.py` where there is no Cargo.
fn fixtures() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&package).join("../tests/fixtures")
}

/// The device of Candle that trains: the CPU, unless `EQIM_TEST_DEVICE` names another one.
fn device() -> Device {
    open_device(std::env::var("EQIM_TEST_DEVICE").as_deref().unwrap_or("cpu")).unwrap()
}

/// Relative tolerance for single precision, with sums in another order than in PyTorch.
const RELATIVE: f32 = 1e-5;

/// Gradients below this are rounding errors, such as the gradient of a key bias, which does not affect attention.
const NOTHING: f32 = 1e-3;

/// Asserts that values agree within [`RELATIVE`] of the largest value of the tensor.
fn close(name: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!(found.dims(), expected.dims(), "{name}");
    let [found, expected] = [found, expected].map(|tensor| values(tensor).unwrap());
    let (difference, scale) = (largest_difference(&found, &expected), largest(&expected).max(NOTHING));
    println!("{name}: {:e}", difference / scale);
    assert!(difference <= RELATIVE * scale, "{name}: {difference:e} beside {scale:e}");
}

const LEARNING_RATE: f64 = 1e-3;

#[test]
fn one_step_is_the_references() {
    let (folder, device) = (fixtures(), device());
    let expected: HashMap<String, Tensor> =
        candle_core::safetensors::load(folder.join("expected.safetensors"), &device).unwrap();
    let get = |name: &str| expected[&format!("train/{name}")].clone();
    let scalar = |name: &str| get(name).flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
    let hints = Hints { heads: Some(2), ..Hints::default() };
    let (config, weights) =
        checkpoint::load(&folder.join("generator.pth"), &folder.join("tokenizer.ckpt"), WeightSet::Raw, &hints)
            .unwrap();
    let config = config.generator;

    let tokens = get("latents");
    let (batch, n, embed) = tokens.dims3().unwrap();
    let copies = get("noise").dim(0).unwrap() / (batch * n);
    let labels = get("labels").to_vec1::<i64>().unwrap().into_iter();
    let dropped = get("drop_uniform").to_vec1::<f32>().unwrap();
    // 0.4 is `label_drop_prob` in meta.json.
    let labels = labels.zip(dropped).map(|(label, u)| if u < 0.4 { config.class_num as i64 } else { label });
    let times = get("t_uniform").flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(time);
    let inputs = StepInputs {
        tokens,
        labels: Tensor::from_iter(labels, &device).unwrap(),
        shift: get("rope_shift").to_vec1::<i64>().unwrap()[0] as usize,
        noise: get("noise").reshape((copies, batch, n, embed)).unwrap(),
        times: Tensor::from_iter(times, &device).unwrap().reshape((copies, batch, n)).unwrap(),
        training: None,
    };

    let tokenizer = ["encoder.", "decoder.", "quant_layer.", "post_quant_layer."];
    let own = weights.iter().filter(|(name, _)| !tokenizer.iter().any(|part| name.starts_with(part)));
    let mut learner = Learner::new(
        "generator",
        own.map(|(name, tensor)| (name.to_string(), tensor.clone())),
        &device,
        ranks(),
        false,
    )
    .unwrap();
    let parameters = learner.weights().unwrap();
    let objective = |inputs: &StepInputs| {
        let total = loss(&config, &parameters, inputs)?;
        Ok(Losses { total: total.clone(), parts: vec![("loss", total)] })
    };
    let shards = shards(&inputs, 8);
    let (gradients, measures) = learner.differentiate(&shards, 1, objective).unwrap();
    println!("loss: {:e}", measures["loss"] as f32 / scalar("loss") - 1.0);
    assert!((measures["loss"] as f32 / scalar("loss") - 1.0).abs() <= 1e-6, "{}", measures["loss"]);

    let mut compared = 0;
    for (name, expected) in
        expected.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("train/grad/")?, tensor)))
    {
        let found = gradients.get(name).unwrap_or_else(|| panic!("{name} has no gradient"));
        close(name, &found.reshape(expected.shape()).unwrap(), expected);
        compared += 1;
    }
    assert_eq!(compared, 79);

    let update = Update {
        learning_rate: LEARNING_RATE,
        betas: [0.9, 0.95],
        weight_decay: 0.02,
        decays: &decays,
        clip: Some(3.0),
        average: 0.9999,
    };
    let before = learner
        .weights()
        .unwrap()
        .iter()
        .map(|(name, x)| (name.to_string(), x.copy().unwrap()))
        .collect::<HashMap<_, _>>();
    let norm = learner.update(&gradients, &update).unwrap();
    println!("norm: {:e}", norm as f32 / scalar("grad_norm") - 1.0);
    assert!((norm as f32 / scalar("grad_norm") - 1.0).abs() <= RELATIVE, "{norm}");

    let after = learner.weights().unwrap();
    let average = learner.average().unwrap();
    for name in expected.keys().filter_map(|name| name.strip_prefix("train/after_step/")) {
        let expected = get(&format!("after_step/{name}"));
        let found = after.get(name, expected.dims()).unwrap();
        let difference = largest_difference(&values(&found).unwrap(), &values(&expected).unwrap());
        println!("{name}: {difference:e}");
        assert!(difference <= 1e-3 * LEARNING_RATE as f32, "{name}: {difference:e}");
        let averaged = ((&before[name] * 0.9999).unwrap() + (&found * 0.0001).unwrap()).unwrap();
        close(name, &average.get(name, expected.dims()).unwrap().to_dtype(DType::F32).unwrap(), &averaged);
    }
}

/// The expected values come from the package `peft` (`tests/fixtures/make_adapter.py`).
#[test]
fn adapters_and_their_gradients_are_those_of_peft() {
    const SCALE: f64 = 2.0;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let expected = candle_core::safetensors::load(folder.join("adapter_expected.safetensors"), &Device::Cpu).unwrap();
    let mlp = |layer: &str| format!("encoder_blocks.0.mlp.{layer}");
    let matrices = ["fc1", "fc2"].map(|layer| adapter::names(&format!("{}.weight", mlp(layer))));
    let vars = matrices.each_ref().map(|names| names.each_ref().map(|name| Var::from_tensor(&expected[name]).unwrap()));
    let linear = |x: &Tensor, layer: usize| {
        let name = mlp(["fc1", "fc2"][layer]);
        let [a, b] = &vars[layer];
        let weight = adapter::merged(&expected[&format!("{name}.weight")], a, b, SCALE).unwrap();
        let bias = &expected[&format!("{name}.bias")];
        x.matmul(&weight.t().unwrap()).unwrap().broadcast_add(bias).unwrap()
    };
    let y = linear(&linear(&expected["x"], 0).relu().unwrap(), 1);
    close("y", &y, &expected["y"]);
    let gradients = (y * &expected["direction"]).unwrap().sum_all().unwrap().backward().unwrap();
    for (names, vars) in matrices.iter().zip(&vars) {
        for (name, var) in names.iter().zip(vars) {
            close(name, gradients.get(var).unwrap(), &expected[&format!("gradient/{name}")]);
        }
    }
}

/// A training of one process.
fn ranks() -> Rc<Ranks> {
    Rc::new(Ranks::alone())
}

/// Shards of at most `most` rows, with their fractions of the batch.
fn shards(inputs: &StepInputs, most: usize) -> Vec<(f64, StepInputs)> {
    let batch = inputs.tokens.dim(0).unwrap();
    let shard = |start: usize| {
        let rows = most.min(batch - start);
        let shard = StepInputs {
            tokens: inputs.tokens.narrow(0, start, rows).unwrap(),
            labels: inputs.labels.narrow(0, start, rows).unwrap(),
            shift: inputs.shift,
            noise: inputs.noise.narrow(1, start, rows).unwrap(),
            times: inputs.times.narrow(1, start, rows).unwrap(),
            training: None,
        };
        (rows as f64 / batch as f64, shard)
    };
    (0..batch).step_by(most).map(shard).collect()
}

/// The metrics of two steps of the demo's tokenizer with a discriminator, on a photograph in `folder`. With one image
/// per step, the shards are the same on every device.
fn tokenizer_steps(folder: &Path, device: Device) -> Vec<Measures> {
    let mut recipe = Recipe::new(Base::Demo).tokenizer;
    (recipe.plan.batch_size, recipe.plan.validation) = (1, 0);
    (recipe.discriminator_weight, recipe.discriminator_channels, recipe.discriminator_start) = (0.1, 16, 0);
    let width = recipe.plan.tokens * recipe.model.token_width();
    let photos = Photos::open(folder, recipe.model.image_height(), width).unwrap();
    let mut task = TokenizerTask::new(recipe, photos, None, Networks::default(), device, ranks()).unwrap();
    (0..2).map(|step| task.step(step).unwrap()).collect()
}

#[test]
#[ignore = "needs a GPU: set EQIM_TEST_DEVICE=cuda:0"]
fn steps_of_the_tokenizer_are_those_of_the_cpu() {
    let device = device();
    assert!(!device.is_cpu(), "EQIM_TEST_DEVICE names no GPU");
    let folder = tempfile::tempdir().unwrap();
    let wave = |x: u32, y: u32| ((x as f32 / 7.0).sin() * (y as f32 / 11.0).cos() * 100.0 + 128.0) as u8;
    let photo = RgbImage::from_fn(400, 300, |x, y| Rgb([wave(x, y), wave(2 * x, y), wave(x, 3 * y)]));
    photo.save(folder.path().join("waves.png")).unwrap();
    let found = tokenizer_steps(folder.path(), device);
    let expected = tokenizer_steps(folder.path(), Device::Cpu);
    for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
        for (name, expected) in expected {
            let difference = (found[name] / expected - 1.0).abs();
            println!("step {step}, {name}: {difference:e}");
            assert!(difference <= 1e-4, "step {step}, {name}: {} beside {expected}", found[name]);
        }
    }
}
