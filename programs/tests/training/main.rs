//! `eqim-train`, run from the command line with models and pictures that are small enough for a test.

mod place;
mod ranks;
mod shards;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use eqim::checkpoint::tensors::{self, TensorFile};
use eqim::checkpoint::{Hints, WeightSets, adapter};
use eqim::close::{largest_difference, values};
use eqim::digest::Hash;
use eqim_training::ranks::Ranks;
use serde_json::Value;

use place::{MICRO, Place, picture};

fn same(a: &Path, b: &Path) {
    assert!(fs::read(a).unwrap() == fs::read(b).unwrap(), "{} and {} differ", a.display(), b.display());
}

#[test]
fn both_halves_learn() {
    let place = Place::new();
    let said = place.trains(&place.tokenizer("-o t --steps 300"));
    assert!(said.contains("6 photographs (0 skipped), classes: dusk, noon"), "{said}");
    assert!(said.contains("PSNR"), "{said}");
    place.trains(&place.generator("-o g --steps 300"));
    for run in ["t", "g"] {
        let losses: Vec<f64> = place.metrics(run).iter().map(|line| line["loss"].as_f64().unwrap()).collect();
        let (first, last) = (losses[0], losses[losses.len() - 10..].iter().sum::<f64>() / 10.0);
        assert!(last < 0.5 * first, "{run}: from {first} to {last}");
        for file in ["loss.png", "samples/step-0000300.png"] {
            let image = image::open(place.path(run).join(file)).unwrap().to_rgb8();
            assert!(image.pixels().any(|pixel| pixel != image.get_pixel(0, 0)), "{run}/{file}");
        }
    }
    let model = place.path("g/generator.safetensors");
    let tokenizer = place.path("t/tokenizer.safetensors");
    let (config, _) = eqim::checkpoint::load(&model, &tokenizer, WeightSets::default(), &Hints::default()).unwrap();
    assert_eq!((config.generator.class_num, config.generator.embed), (2, 16));
    assert_eq!(config.generator.class_names, ["dusk", "noon"]);
}

#[test]
fn products_in_bf16_learn_as_well() {
    let place = Place::new();
    place.trains(&place.tokenizer("-o t"));
    fs::write(place.path("bf16.toml"), MICRO.replace("[generator.plan]", "[generator.plan]\nbf16 = true")).unwrap();
    place.trains(&place.generator("-o whole --steps 60"));
    place.trains(&place.generator("-o half --steps 60").replace("micro.toml", "bf16.toml"));
    let loss = |run: &str| place.metrics(run).pop().unwrap()["loss"].as_f64().unwrap();
    let (whole, half) = (loss("whole"), loss("half"));
    // The eight bits of the BF16 mantissa change every product by up to 0.4 %.
    assert!(whole != half && (half / whole - 1.0).abs() < 0.02, "{whole} and {half}");
    fs::write(place.path("bf16.toml"), MICRO.replace("[tokenizer.plan]", "[tokenizer.plan]\nbf16 = true")).unwrap();
    let said = place.fails(&place.tokenizer("-o x").replace("micro.toml", "bf16.toml"), 2);
    assert!(said.contains("tokenizer.plan.bf16"), "{said}");
}

#[test]
fn accumulation_gives_the_same_weights() {
    let place = Place::new();
    let passes = |count: usize| format!("betas = [0.9, 0.95]\naccumulate = {count}\nsteps = 20");
    for count in [1, 2, 4] {
        let recipe = MICRO.replace("batch_size = 3", "batch_size = 4").replace("batch_size = 9", "batch_size = 32");
        fs::write(place.path(&format!("{count}.toml")), recipe.replace("steps = 6", &passes(count))).unwrap();
    }
    for count in [1, 2, 4] {
        let recipe = format!("{count}.toml");
        place.trains(&place.tokenizer(&format!("-o t{count}")).replace("micro.toml", &recipe));
        let generator = place.generator(&format!("-o g{count}")).replace("micro.toml", &recipe);
        place.trains(&generator.replace("t/tokenizer", "t1/tokenizer"));
    }
    for count in [2, 4] {
        for part in ["t", "g"] {
            let [whole, parts] = [1, count].map(|count| place.path(&format!("{part}{count}/state.safetensors")));
            same(&whole, &parts);
        }
    }
    let said = place.trains(&place.tokenizer("-o t1 --resume").replace("micro.toml", "4.toml"));
    assert!(said.contains("resuming after step 20"), "{said}");
}

#[test]
fn a_generator_starts_from_another_one() {
    let place = Place::new();
    // A decay of 0 makes the average the weights of the last step. A step changes a weight by the learning rate at most.
    let last = MICRO.replace("schedule", "ema = 0.0\nschedule");
    fs::write(place.path("last.toml"), &last).unwrap();
    fs::write(place.path("slow.toml"), last.replace("base_learning_rate = 0.1", "base_learning_rate = 1e-9")).unwrap();
    place.trains(&place.tokenizer("-o t --steps 30").replace("micro.toml", "last.toml"));
    place.trains(&place.generator("-o g --steps 120").replace("micro.toml", "last.toml"));
    for (class, colour) in [("noon", [60, 120, 220]), ("storm", [70, 70, 90]), ("sunset", [220, 90, 30])] {
        fs::create_dir_all(place.path("others").join(class)).unwrap();
        for index in 0..2 {
            picture(48, 40, colour, index).save(place.path(&format!("others/{class}/{index}.png"))).unwrap();
        }
    }
    let others = |more: &str| place.generator(more).replace("--images photos", "--images others");
    let start = "--from g/generator.safetensors --classes sunset=dusk";
    let one = others(&format!("-o one --steps 1 {start}")).replace("micro.toml", "slow.toml");
    place.trains(&one);
    let table = |run: &str| {
        let (tensors, _) = stored(&place.path(run).join("generator.safetensors"));
        tensors["class_emb.weight"].to_vec2::<f32>().unwrap()
    };
    let (before, after) = (table("g"), table("one"));
    let mean: Vec<f32> = before[0].iter().zip(&before[1]).map(|(a, b)| (a + b) / 2.0).collect();
    // Classes: noon, storm, sunset from dusk, noon.
    for (row, expected) in [(0, &before[1]), (1, &mean), (2, &before[0])] {
        let close = after[row].iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-7);
        assert!(close, "row {row}: {:?}, expected {expected:?}", after[row]);
    }

    // What it knows already helps.
    place.trains(&others("-o anew --steps 1").replace("micro.toml", "slow.toml"));
    let loss = |run: &str| place.metrics(run)[0]["loss"].as_f64().unwrap();
    println!("loss {} from the start, {} from the checkpoint", loss("anew"), loss("one"));
    assert!(loss("one") < 0.9 * loss("anew"), "{} and {}", loss("one"), loss("anew"));

    // Frozen weights stay bit for bit, also after a resumption.
    let line = format!("-o part --freeze ^(diffloss|encoder_blocks.0) {start}");
    place.trains(&others(&format!("{line} --steps 3")));
    place.trains(&others(&format!("{line} --resume")));
    let (of_start, _) = stored(&place.path("g/generator.safetensors"));
    let (of_part, _) = stored(&place.path("part/generator.safetensors"));
    let equal = |name: &str| values(&of_start[name]).unwrap() == values(&of_part[name]).unwrap();
    let (kept, trained): (Vec<_>, Vec<_>) = of_part
        .keys()
        .filter(|name| *name != "class_emb.weight")
        .partition(|name| name.starts_with("diffloss") || name.starts_with("encoder_blocks.0"));
    assert!(kept.len() > 20 && kept.iter().all(|name| equal(name)));
    assert!(trained.iter().filter(|name| !equal(name)).count() > 20);
    let other = others(&format!("-o part --resume --freeze ^diffloss {start}"));
    assert!(place.fails(&other, 2).contains("frozen"), "{}", place.fails(&other, 2));

    let from = "-o x --from g/generator.safetensors";
    for (options, named) in [
        ("--classes noon=dawn", "--classes"),
        ("--classes noon", "NAME=CLASS"),
        ("--classes fog=dusk", "noon, storm, sunset"),
        ("--freeze .", "--freeze"),
        ("--freeze (", "--freeze"),
    ] {
        let said = place.fails(&others(&format!("{from} {options}")), 2);
        assert!(said.contains(named), "{options}: {said}");
    }
    assert!(place.fails(&others("-o x --freeze ."), 2).contains("--from"));
    let said = place.fails(&others("-o x --from t/tokenizer.safetensors"), 2);
    assert!(said.contains("t/tokenizer.safetensors"), "{said}");
}

#[test]
fn adapters_are_small_files_that_change_a_generator() {
    let place = Place::new();
    fs::write(place.path("last.toml"), MICRO.replace("schedule", "ema = 0.0\nschedule")).unwrap();
    let lora = MICRO.replace("[generator]", "[generator]\nlora_rank = 2").replace("schedule", "ema = 0.0\nschedule");
    fs::write(place.path("lora.toml"), lora).unwrap();
    place.trains(&place.tokenizer("-o t").replace("micro.toml", "last.toml"));
    place.trains(&place.generator("-o g").replace("micro.toml", "last.toml"));
    let line = place.generator("--from g/generator.safetensors").replace("micro.toml", "lora.toml");
    place.trains(&format!("{line} -o whole"));
    let said = place.trains(&format!("{line} -o parts --steps 3"));
    assert!(said.contains("the adapter is parts/adapter.safetensors"), "{said}");
    place.trains(&format!("{line} -o parts --resume"));
    for file in ["state.safetensors", "adapter.safetensors", "samples/step-0000006.png"] {
        same(&place.path("whole").join(file), &place.path("parts").join(file));
    }
    assert!(!place.path("whole/generator.safetensors").exists());

    let (base, _) = stored(&place.path("g/generator.safetensors"));
    let (adapter, _) = stored(&place.path("whole/adapter.safetensors"));
    let count = |tensors: &BTreeMap<String, Tensor>| tensors.values().map(Tensor::elem_count).sum::<usize>();
    assert!(count(&adapter) < count(&base) / 4, "{} of {}", count(&adapter), count(&base));
    assert_eq!(adapter.keys().filter(|name| name.contains(".lora_A.")).count(), 2 * 8);
    assert!(adapter.contains_key("class_emb.weight"));

    // Merged into the generator, it is what the training sampled with.
    let merge = |file: &str, scale: f64| {
        let (generator, tokenizer) = (place.path("g/generator.safetensors"), place.path("t/tokenizer.safetensors"));
        let loaded = eqim::checkpoint::load(&generator, &tokenizer, WeightSets::default(), &Hints::default());
        let (mut config, mut weights) = loaded.unwrap();
        adapter::merge(&place.path(file), scale, &mut config, &mut weights).map(|()| weights)
    };
    let weights = merge("whole/adapter.safetensors", 1.0).unwrap();
    let name = "encoder_blocks.1.mlp.fc2.weight";
    let [a, b] = adapter::names(name).map(|name| adapter[&name].clone());
    let expected = (&base[name] + b.matmul(&a).unwrap()).unwrap();
    assert_eq!(values(weights.find(name).unwrap()).unwrap(), values(&expected).unwrap());
    assert!(largest_difference(&values(&expected).unwrap(), &values(&base[name]).unwrap()) > 1e-4);
    assert_eq!(
        values(merge("whole/adapter.safetensors", 0.0).unwrap().find(name).unwrap()).unwrap(),
        values(&base[name]).unwrap()
    );

    // An adapter of another generator, and files that are none.
    place.trains(&place.generator("-o g --resume --steps 7").replace("micro.toml", "last.toml"));
    for (file, problem) in [
        ("whole/adapter.safetensors", "was trained on other weights"),
        ("g/generator.safetensors", "is no low-rank adapter"),
    ] {
        let error = merge(file, 1.0).unwrap_err();
        assert!(error.is_input() && error.to_string().contains(problem), "{error}");
    }
    let alone = place.generator("-o x").replace("micro.toml", "lora.toml");
    assert!(place.fails(&alone, 2).contains("--from"));
}

#[test]
fn a_resumed_run_goes_on_bit_for_bit() {
    let place = Place::new();
    let gan = MICRO.replace(
        "[tokenizer.model]\n",
        "[tokenizer]\ndiscriminator_weight = 0.5\ndiscriminator_start = 2\n[tokenizer.model]\n",
    );
    fs::write(place.path("gan.toml"), gan.replace("tokens = 4", "tokens = 8")).unwrap();
    let dino = Path::new(env!("CARGO_MANIFEST_DIR")).join("../training/tests/fixtures/dino.safetensors");
    place.trains(&place.tokenizer("-o t"));
    let lines = [
        place.tokenizer(""),
        place.generator(""),
        format!("tokenizer --images photos --recipe gan.toml --dino {}", dino.display()),
    ];
    for (index, line) in lines.iter().enumerate() {
        let (whole, parts) = (format!("whole{index}"), format!("parts{index}"));
        place.trains(&format!("{line} -o {whole}"));
        // Imitates a run that was killed after its first checkpoint: adds a later record and an incomplete line.
        place.trains(&format!("{line} -o {parts} --steps 3"));
        let state = place.path(&parts).join("metrics.jsonl");
        let text = fs::read_to_string(&state).unwrap();
        fs::write(&state, text + "{\"step\":5,\"loss\":1}\n{\"st").unwrap();
        place.trains(&format!("{line} -o {parts} --resume"));
        for file in ["state.safetensors", "samples/step-0000006.png"] {
            same(&place.path(&whole).join(file), &place.path(&parts).join(file));
        }
        let steps: Vec<u64> = place.metrics(&parts).iter().map(|line| line["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [2, 3, 4, 6]);
        let last = place.metrics(&parts).pop().unwrap();
        let judged = ["adversarial", "discriminator", "semantic"].map(|name| last.get(name).is_some());
        assert_eq!(judged, [line.contains("gan.toml"); 3], "{last}");
    }
}

#[test]
fn a_kill_loses_no_more_than_the_last_interval() {
    let place = Place::new();
    let mut child = place.command(&place.tokenizer("-o t --steps 100000")).stderr(Stdio::null()).spawn().unwrap();
    let (state, start) = (place.path("t/state.safetensors"), Instant::now());
    while !state.exists() && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(place.fails(&place.tokenizer("-o t --steps 100000"), 2).contains("--resume"));
    let mut child =
        place.command(&place.tokenizer("-o t --steps 100000 --resume")).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    child.kill().unwrap();
    let said = String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap();
    let after = said.split("resuming after step ").nth(1).unwrap().split_whitespace().next().unwrap();
    assert!(after.parse::<usize>().unwrap() >= 3, "{said}");
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint() {
    let place = Place::new();
    place.trains(&place.tokenizer("-o t --steps 3"));
    let before = fs::read(place.path("t/state.safetensors")).unwrap();
    place.recipe("wild.toml", "base_learning_rate = 0.1", "base_learning_rate = 1e30");
    place.fails(&place.tokenizer("-o t --resume").replace("micro.toml", "wild.toml"), 2);
    let said = place.fails(&place.tokenizer("-o w").replace("micro.toml", "wild.toml"), 1);
    assert!(said.contains("step ") && said.contains("not finite") && said.contains("no checkpoint"), "{said}");
    assert!(!place.path("w/state.safetensors").exists());
    assert!(before == fs::read(place.path("t/state.safetensors")).unwrap());
}

/// Contents of a `.safetensors` file.
fn stored(path: &Path) -> (BTreeMap<String, Tensor>, HashMap<String, String>) {
    let mut file = TensorFile::open(path).unwrap();
    let names: Vec<String> = file.tensors().into_keys().collect();
    let text = ["eqim-training", "latents"].map(|key| Some((key.to_string(), file.text(key)?.to_string())));
    let tensors = names.into_iter().map(|name| (name.clone(), file.read(&name).unwrap())).collect();
    (tensors, text.into_iter().flatten().collect())
}

fn store(path: &Path, tensors: &BTreeMap<String, Tensor>, text: HashMap<String, String>) {
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
    tensors::write(path, &tensors, text).unwrap();
}

/// A tensor with one value replaced.
fn poisoned(tensor: &Tensor, value: f32) -> Tensor {
    let mut all = values(tensor).unwrap();
    all[0] = value;
    Tensor::from_vec(all, tensor.dims(), tensor.device()).unwrap()
}

#[test]
fn a_step_that_overflows_is_not_saved() {
    let place = Place::new();
    place.recipe("wild.toml", "base_learning_rate = 0.1", "base_learning_rate = 1e30");
    let wild = |line: String| line.replace("micro.toml", "wild.toml");
    // The gradients of the first step are finite. It is the last one, so nothing else would notice.
    let said = place.fails(&wild(place.tokenizer("-o w --steps 1")), 1);
    assert!(said.contains("step 1: ") && said.contains("not finite") && said.contains("no checkpoint"), "{said}");
    place.trains(&place.tokenizer("-o t --steps 3"));
    let said = place.fails(&wild(place.generator("-o v --steps 1")), 1);
    assert!(said.contains("step 1: ") && said.contains("not finite"), "{said}");
    for file in ["w/tokenizer.safetensors", "w/state.safetensors", "v/generator.safetensors", "v/state.safetensors"] {
        assert!(!place.path(file).exists(), "{file}");
    }
}

#[test]
fn the_last_finite_checkpoint_stays() {
    let place = Place::new();
    let every = MICRO.replace("checkpoint_every = 3", "checkpoint_every = 1");
    fs::write(place.path("micro.toml"), &every).unwrap();
    place.trains(&place.tokenizer("-o t --steps 3"));
    // A second moment that is too small for its first moment: the next step overflows, its gradients are finite.
    let (mut tensors, text) = stored(&place.path("t/state.safetensors"));
    let name = "decoder.conv_out.weight";
    for (part, value) in [("first_moment", 3e38), ("second_moment", 0.0)] {
        let key = format!("tokenizer.{part}.{name}");
        tensors.insert(key.clone(), (tensors[&key].zeros_like().unwrap() + value).unwrap());
    }
    write_state(&place.path("t/state.safetensors"), &tensors, text);
    let kept = ["t/state.safetensors", "t/tokenizer.safetensors"].map(|file| fs::read(place.path(file)).unwrap());
    let said = place.fails(&place.tokenizer("-o t --resume"), 1);
    assert!(said.contains("step 4: tensor tokenizer.") && said.contains(name), "{said}");
    assert!(said.contains("not finite") && said.contains("the checkpoint of step 3 is kept"), "{said}");
    let left = ["t/state.safetensors", "t/tokenizer.safetensors"].map(|file| fs::read(place.path(file)).unwrap());
    assert!(kept == left);
}

/// Writes a training state with the hash that its tensors have.
fn write_state(path: &Path, tensors: &BTreeMap<String, Tensor>, mut text: HashMap<String, String>) {
    let mut saved: Value = serde_json::from_str(&text["eqim-training"]).unwrap();
    let mut hash = Hash::default();
    // In the order of the parameters, and for each parameter in the order of the parts.
    let parts = ["value", "first_moment", "second_moment", "average"];
    let parameters = tensors.keys().filter_map(|key| key.strip_prefix("tokenizer.value."));
    for (parameter, part) in parameters.flat_map(|parameter| parts.map(|part| (parameter, part))) {
        let key = format!("tokenizer.{part}.{parameter}");
        hash.add(&key);
        hash.add_values(&values(&tensors[&key]).unwrap());
    }
    saved["sha256"] = hash.hex().into();
    text.insert("eqim-training".into(), saved.to_string());
    store(path, tensors, text);
}

#[test]
fn a_state_that_was_changed_is_refused() {
    let place = Place::new();
    place.trains(&place.tokenizer("-o t --steps 3"));
    let path = place.path("t/state.safetensors");
    let (tensors, text) = stored(&path);
    let line = place.tokenizer("-o t --resume");
    let mut messages = String::new();
    let mut refused = |tensors: &BTreeMap<String, Tensor>, text: &HashMap<String, String>| {
        store(&path, tensors, text.clone());
        let before = fs::read(&path).unwrap();
        messages += &format!("{}\n", place.fails(&line, 2));
        assert!(before == fs::read(&path).unwrap());
    };
    let key = "tokenizer.first_moment.decoder.conv_out.bias";
    let with = |tensor: Tensor| {
        let mut edited = tensors.clone();
        edited.insert(key.into(), tensor);
        edited
    };
    let tensor = &tensors[key];
    for value in [f32::NAN, f32::INFINITY, 7.0] {
        refused(&with(poisoned(tensor, value)), &text);
    }
    refused(&with(tensor.to_dtype(DType::F16).unwrap()), &text);
    refused(&with(tensor.reshape((1, ())).unwrap()), &text);
    let mut missing = tensors.clone();
    missing.remove(key);
    refused(&missing, &text);
    let saved: Value = serde_json::from_str(&text["eqim-training"]).unwrap();
    let identity = saved["identity"].as_str().unwrap();
    let shorter = identity.rsplit_once("photographs").unwrap().0;
    let edits =
        [("steps", (u64::MAX).into()), ("steps", 7.into()), ("identity", "".into()), ("identity", shorter.into())];
    for (field, value) in edits {
        let mut saved = saved.clone();
        saved[field] = value;
        refused(&tensors, &HashMap::from([("eqim-training".to_string(), saved.to_string())]));
    }
    // The hash of the photographs depends on the encoder of PNGs.
    let hashes = vec![("[0-9a-f]{64}", "[hash]")];
    insta::with_settings!({filters => hashes}, { insta::assert_snapshot!(messages) });
}

/// A change of the latents, the lengths that take the place of theirs, and the problem that is reported.
type Edit = (fn(&Tensor) -> Tensor, &'static str, &'static str);

#[test]
fn latents_that_were_changed_are_encoded_again() {
    let place = Place::new();
    place.trains(&place.tokenizer("-o t --steps 3"));
    place.trains(&place.generator("-o g --steps 3"));
    let mut files: Vec<PathBuf> =
        fs::read_dir(place.path("g/latents")).unwrap().map(|entry| entry.unwrap().path()).collect();
    // The file of the photographs to train on is the larger one.
    files.sort_by_key(|file| std::cmp::Reverse(fs::metadata(file).unwrap().len()));
    assert_eq!(files.len(), 2);
    let whole: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    let file = &files[0];
    let edits: [Edit; 8] = [
        (|tokens| poisoned(tokens, f32::NAN), "", "tensor tokens has a value that is not finite"),
        (|tokens| poisoned(tokens, 7.0), "", "do not have their hash"),
        (|tokens| tokens.sum_all().unwrap(), "", "tensor tokens is"),
        (|tokens| tokens.narrow(0, 0, 1).unwrap(), "", "tensor tokens is"),
        (|tokens| tokens.to_dtype(DType::BF16).unwrap(), "", "tensor tokens is"),
        (|tokens| tokens.t().unwrap().contiguous().unwrap(), "", "tensor tokens is"),
        (|tokens| tokens.clone(), "[1,2]", "does not have the lengths of 15 views"),
        (|tokens| tokens.clone(), "[4294967295,4294967295,4,4,4,4,4,4,4,4,4,4,4,4,4]", "lengths that are too large"),
    ];
    for (edit, lengths, problem) in edits {
        let (mut tensors, mut text) = stored(file);
        let edited = edit(&tensors["tokens"]);
        tensors.insert("tokens".into(), edited);
        if !lengths.is_empty() {
            let content = format!("{{\"lengths\":{lengths},\"sha256\":\"\"}}");
            text.insert("latents".into(), content);
        }
        store(file, &tensors, text);
        let said = place.trains(&place.generator("-o g --resume"));
        assert!(said.contains(problem) && said.matches("are encoded again").count() == 1, "{said}");
        let again: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();
        assert!(whole == again);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_fails_is_an_error() {
    let place = Place::new();
    // Its first page is not mapped, so that reading gives EIO.
    std::os::unix::fs::symlink("/proc/self/mem", place.path("photos/noon/bad.png")).unwrap();
    let said = place.fails(&place.tokenizer("-o t --steps 1"), 1);
    assert!(said.contains("photos/noon/bad.png: cannot be read"), "{said}");
}

#[test]
fn pictures_that_cannot_be_used_are_named_skipped_and_counted() {
    let place = Place::new();
    let mut jpeg = vec![];
    picture(64, 40, [9, 9, 9], 0).write_to(&mut std::io::Cursor::new(&mut jpeg), image::ImageFormat::Jpeg).unwrap();
    fs::write(place.path("photos/noon/good.jpg"), &jpeg).unwrap();
    fs::write(place.path("photos/noon/half.jpg"), &jpeg[..jpeg.len() / 2]).unwrap();
    fs::write(place.path("photos/noon/text.jpeg"), "no picture").unwrap();
    fs::write(place.path("photos/noon/README.md"), "no picture, and none is expected").unwrap();
    picture(8, 8, [0; 3], 0).save(place.path("photos/dusk/small.png")).unwrap();
    let said = place.trains(&place.tokenizer("-o t --steps 1"));
    assert!(said.contains("7 photographs (3 skipped)"), "{said}");
    for name in ["half.jpg", "text.jpeg", "small.png: is 8×8 pixels, expected a height of at least 32"] {
        assert!(said.contains(name), "{said}");
    }
    assert!(!said.contains("README"), "{said}");
}

#[test]
fn input_that_cannot_be_used_is_refused_before_anything_is_written() {
    let place = Place::new();
    fs::create_dir_all(place.path("empty/class")).unwrap();
    fs::write(place.path("broken.toml"), "[tokenizer\n").unwrap();
    fs::write(place.path("unknown.toml"), "[tokenizer.plan]\nlearning_rate = 1\n").unwrap();
    fs::write(place.path("zero.toml"), "[tokenizer.plan]\nbatch_size = 0\n").unwrap();
    place.recipe("all.toml", "validation = 1", "validation = 6");
    place.recipe("large.toml", "levels = [{ channels = 8,", "levels = [{ channels = 65536,");
    place.recipe("high.toml", "rows = 8", "rows = 65536");
    place.recipe("batch.toml", "batch_size = 3", "batch_size = 4611686018427387904");
    place.recipe("tokens.toml", "tokens = 4", "tokens = 9223372036854775807");
    let cases = [
        "tokenizer --images empty -o x",
        "tokenizer --images none -o x",
        "tokenizer --images photos -o x",
        "tokenizer --images photos --recipe broken.toml -o x",
        "tokenizer --images photos --recipe unknown.toml -o x",
        "tokenizer --images photos --recipe zero.toml -o x",
        "tokenizer --images photos --recipe all.toml -o x",
        "tokenizer --images photos --recipe large.toml -o x",
        "tokenizer --images photos --recipe high.toml -o x",
        "tokenizer --images photos --recipe batch.toml -o x",
        "tokenizer --images photos --recipe tokens.toml -o x",
        "tokenizer --images photos --recipe micro.toml --steps 2147483648 -o x",
        "generator --images photos --tokenizer micro.toml --recipe micro.toml -o x",
        "tokenizer --images photos --recipe micro.toml -o micro.toml/x",
        "tokenizer --images photos --recipe micro.toml -o /proc/x",
    ];
    let mut messages = String::new();
    for line in cases {
        messages += &format!("$ eqim-train {line}\n{}\n", place.fails(line, 2));
        assert!(!place.path("x").join("state.safetensors").exists(), "{line}");
    }
    let memory = vec![(r"most \d+\.\d GB, the memory", "most # GB, the memory")];
    insta::with_settings!({filters => memory}, { insta::assert_snapshot!(messages) });
}

#[test]
fn a_state_of_another_training_is_refused() {
    let place = Place::new();
    place.trains(&place.tokenizer("-o t"));
    let before = fs::read(place.path("t/state.safetensors")).unwrap();
    place.recipe("wide.toml", "embed = 16", "embed = 24");
    let said = place.fails("tokenizer --images photos --recipe wide.toml -o t --resume", 2);
    assert!(said.contains("embed = 16") && said.contains("embed = 24"), "{said}");
    fs::create_dir_all(place.path("g")).unwrap();
    fs::copy(place.path("t/state.safetensors"), place.path("g/state.safetensors")).unwrap();
    let said = place.fails(&place.generator("-o g --resume"), 2);
    assert!(said.contains("is the training state of a tokenizer"), "{said}");
    assert!(before == fs::read(place.path("t/state.safetensors")).unwrap());
}

#[test]
fn a_folder_has_one_training() {
    let place = Place::new();
    let other = eqim_training::run::Output::open(&place.path("t"), false, &Ranks::alone()).unwrap();
    let said = place.fails(&place.tokenizer("-o t"), 1);
    assert!(said.contains(&format!("t/state.safetensors: is in use by process {}", std::process::id())), "{said}");
    drop(other);
    place.trains(&place.tokenizer("-o t --steps 1"));
    assert!(!place.path("t/state.safetensors.lock").exists());
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_an_error_that_loses_nothing() {
    let place = Place::new();
    place.trains(&place.tokenizer("-o t --steps 3"));
    let before = fs::read(place.path("t/state.safetensors")).unwrap();
    // A limit of 40 kB on the size of files imitates a full disk.
    let line = format!(
        "ulimit -f 40; trap '' XFSZ; exec {} {}",
        env!("CARGO_BIN_EXE_eqim-train"),
        place.tokenizer("-o t --resume")
    );
    let output = Command::new("bash").args(["-c", &line]).current_dir(place.path("")).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot be written"), "{said}");
    assert!(before == fs::read(place.path("t/state.safetensors")).unwrap());
    place.trains(&place.tokenizer("-o t --resume"));
}

#[test]
fn only_the_decoder_learns_in_stage_two() {
    let place = Place::new();
    place.trains(&place.tokenizer("-o t"));
    // The discriminator needs crops of 32 pixels.
    let settings =
        "decoder_only = true\ndiscriminator_weight = 0.5\ndiscriminator_channels = 4\ndiscriminator_start = 2\n";
    let stage2 = MICRO.replace("[tokenizer.model]\n", &format!("[tokenizer]\n{settings}[tokenizer.model]\n"));
    fs::write(place.path("stage2.toml"), stage2.replacen("tokens = 4", "tokens = 8", 1)).unwrap();
    let line = "tokenizer --images photos --recipe stage2.toml -o s";
    assert!(place.fails(line, 2).contains("--from"));
    place.trains(&format!("{line} --from t/tokenizer.safetensors"));
    let metrics = place.metrics("s");
    assert!(metrics[0]["discriminator"].is_null() && metrics[2]["discriminator"].is_number(), "{metrics:?}");
    // The run cannot be resumed with other frozen weights.
    place.trains(&place.tokenizer("-o u --seed 5"));
    let said = place.fails(&format!("{line} --from u/tokenizer.safetensors --resume"), 2);
    assert!(said.contains("frozen = "), "{said}");
    let load = |run: &str| {
        let path = place.path(run).join("tokenizer.safetensors");
        eqim::checkpoint::load_tokenizer_alone(&path, Default::default()).unwrap().1
    };
    let (before, after) = (load("t"), load("s"));
    for ((name, before), (_, after)) in before.iter().zip(after.iter()) {
        let equal = largest_difference(&values(before).unwrap(), &values(after).unwrap()) == 0.0;
        let stays = name.starts_with("encoder.") || name.starts_with("quant_layer.");
        // A key bias does not affect attention and has no gradient.
        assert!(equal == stays || name.ends_with(".k.bias"), "{name}");
    }
}

#[test]
fn pretrained_networks_take_part() {
    let place = Place::new();
    let network = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.native/efficientnet-lite0/efficientnet-lite0.pth");
    assert!(network.is_file(), "no {}: run `cargo xtask setup --training`", network.display());
    std::os::unix::fs::symlink(network, place.path("lite0.pth")).unwrap();
    place.recipe("micro.toml", "views = 3", "views = 3\nevaluation_images = 4");
    place.trains(&place.tokenizer("--perceptual lite0.pth --semantic lite0.pth --evaluate lite0.pth -o t --steps 2"));
    let last = place.metrics("t").pop().unwrap();
    for name in ["perceptual", "semantic", "validation_frechet_distance"] {
        assert!(last[name].as_f64().is_some_and(|value| value > 0.0), "{name}: {last}");
    }
    let said = place.fails(&place.tokenizer("-o t --steps 2 --resume"), 2);
    assert!(said.contains("perceptual = EfficientNet-Lite0"), "{said}");
    place.trains(&place.generator("--evaluate lite0.pth -o g --steps 2"));
    let last = place.metrics("g").pop().unwrap();
    assert!(last["validation_frechet_distance"].as_f64().is_some_and(|value| value > 0.0), "{last}");
}

#[test]
fn a_printed_recipe_is_one_that_can_be_given() {
    let place = Place::new();
    for preset in ["demo", "small", "base", "large", "huge"] {
        let output = place.run(&format!("recipe --preset {preset}"));
        fs::write(place.path("recipe.toml"), &output.stdout).unwrap();
        let base = clap::ValueEnum::from_str(preset, false).unwrap();
        let read = eqim_training::recipe::Recipe::read(base, &place.path("recipe.toml")).unwrap();
        assert_eq!(read, eqim_training::recipe::Recipe::new(base));
    }
}
