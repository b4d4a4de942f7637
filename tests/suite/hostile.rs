//! Broken, wrong and hostile input. Every case ends with exit code 2 and a message that names the problem, and changes
//! no file.

use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;

use candle_core::{DType, Device, Tensor};
use eqim::checkpoint::CONFIG_KEY;
use eqim::checkpoint::tensors::{self, TensorFile};
use serde_json::{Value, json};

use crate::common::bins::Workplace;
use crate::common::{Fixture, MEMORY, all, fixtures};
use eqim_fuzz::torch::{call, dict, global, integer, text, tuple, zip_file};

fn first() -> Fixture {
    Fixture::open(fixtures())
}

// Checkpoints.

/// Command lines that export with one of the fixture's two checkpoints replaced.
const GENERATOR: &str = "eqim-export onnx --tokenizer tokenizer.ckpt --heads 2 -o out --generator";
const TOKENIZER: &str = "eqim-export onnx --generator generator.pth --heads 2 -o out --tokenizer";

#[test]
fn truncated_checkpoints() {
    let place = Workplace::new(&first());
    for (line, file) in [(GENERATOR, "generator.pth"), (TOKENIZER, "tokenizer.ckpt")] {
        let whole = place.read(file);
        for length in [0, 3, 10, 1000, whole.len() / 2, whole.len() - 1] {
            let name = format!("{length}-of-{file}");
            place.write(&name, &whole[..length]);
            place.refused(&format!("{line} {name}"));
        }
    }
    insta::assert_snapshot!(place.messages());
}

#[test]
fn files_that_are_no_checkpoints() {
    let place = Workplace::new(&first());
    let noise: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    place.write("noise.bin", &noise);
    place.write("zip.bin", [b"PK\x03\x04", &noise[..]].concat());
    place.write("old.bin", [b"\x80\x02\x8a\x0a", &noise[..]].concat());
    place.write("text.txt", "These are no weights.\n".repeat(100));
    image::RgbImage::new(64, 64).save(place.path("picture.png")).unwrap();
    place.write("empty.zip", zip_file(&[]));
    place.write("other.zip", zip_file(&[("readme.txt", b"hello")]));
    place.write("pointer.pth", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2576\n");
    place.write("page.pth", "<!DOCTYPE html><html><head><title>Sign in</title></head></html>");
    place.write("error.pth", r#"{"error": "Repository not found"}"#);
    place.write("weights.tar", [&[b'a'; 257][..], b"ustar", &[0; 1000]].concat());
    place.write("weights.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x00");
    place.write("utf16.json", b"\xff\xfe{\0\"\0a\0\"\0");
    place.write("inner.zip", zip_file(&[("weights/generator.pth", b"hello")]));
    place.write("script.pt", zip_file(&[("a/data.pkl", b"N."), ("a/constants.pkl", b"N."), ("a/code/b.py", b"")]));
    std::fs::create_dir(place.path("folder")).unwrap();
    let files = [
        "pointer.pth",
        "page.pth",
        "error.pth",
        "weights.tar",
        "weights.gz",
        "utf16.json",
        "inner.zip",
        "script.pt",
        "noise.bin",
        "zip.bin",
        "old.bin",
        "text.txt",
        "picture.png",
        "empty.zip",
        "other.zip",
        "folder",
        "missing.pth",
    ];
    for file in files {
        for line in [GENERATOR, TOKENIZER] {
            place.refused(&format!("{line} {file}"));
        }
    }
    insta::assert_snapshot!(place.messages());
}

#[test]
fn checkpoints_of_something_else() {
    let [one, other] = all();
    let place = Workplace::new(&one);
    std::fs::copy(other.folder.join("generator.pth"), place.path("other.pth")).unwrap();
    std::fs::copy(other.folder.join("tokenizer.ckpt"), place.path("other.ckpt")).unwrap();
    place.refused(&format!("{GENERATOR} tokenizer.ckpt"));
    place.refused(&format!("{TOKENIZER} generator.pth"));
    place.refused(&format!("{TOKENIZER} other.ckpt"));
    place.refused(&format!("{GENERATOR} other.pth"));
    insta::assert_snapshot!(place.messages());
}

#[test]
fn export_flags() {
    let place = Workplace::new(&first());
    place.write("file", "");
    let flags = [
        "",
        "--heads 3",
        "--heads 0",
        "--heads 32",
        "--heads 99999999999999999999",
        "--heads 2 --window 0",
        "--heads 2 --window 1000000",
        "--heads 2 --vae-norm nan",
        "--heads 2 --vae-norm inf",
        "--heads 2 --vae-norm=-1",
        "--heads 2 --vae-norm 0",
        "--heads 2 --steps 0",
        "--heads 2 --opset 5",
        "--heads 2 --opset 21",
        "--heads 2 --atol nan",
        "--heads 2 --atol=-1",
        "--heads 2 --dtype int8",
        "--heads 2 --generator-weights best",
        "--heads 2 --tokenizer-weights best",
        "--preset gigantic",
        "--preset huge",
        "--heads 2 --no-validate --atol 1",
        "--random small",
        "--random gigantic",
        "--heads 2 -o missing/out",
        "--heads 2 -o file",
        "--heads 2 -o file/out",
        "--heads 2 -o .",
        "--frobnicate",
        "--heads 2 --seed 3",
    ];
    for flags in flags {
        let output = if flags.contains("-o ") { "" } else { "-o out" };
        let line = format!("eqim-export onnx --generator generator.pth --tokenizer tokenizer.ckpt {flags} {output}");
        place.refused(&line.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    place.refused("eqim-export onnx --heads 2 -o out");
    place.refused("eqim-export onnx --generator generator.pth -o out");
    place.refused("eqim-export onnx --generator generator.pth --tokenizer tokenizer.ckpt --heads 2");
    insta::assert_snapshot!(place.messages());
}

// Pickles.

/// A tensor as `torch.save` writes it.
struct Saved<'a> {
    storage_type: &'a str,
    storage: &'a str,
    offset: i64,
    shape: &'a [i64],
    stride: Option<&'a [i64]>,
}

const STORAGE: &str = "0";
const STORAGE_FLOATS: usize = 256;

fn saved(shape: &[i64]) -> Saved<'_> {
    Saved { storage_type: "FloatStorage", storage: STORAGE, offset: 0, shape, stride: None }
}

impl Saved<'_> {
    fn pickle(&self) -> Vec<u8> {
        let contiguous = |axis: usize| self.shape[axis + 1..].iter().fold(1i64, |all, n| all.saturating_mul(*n));
        let stride: Vec<i64> =
            self.stride.map_or_else(|| (0..self.shape.len()).map(contiguous).collect(), <[i64]>::to_vec);
        let [shape, stride] = [self.shape, &stride].map(|n| tuple(&n.iter().copied().map(integer).collect::<Vec<_>>()));
        let kind = global("torch", self.storage_type);
        let place = tuple(&[text("storage"), kind, text(self.storage), text("cpu"), integer(STORAGE_FLOATS as i64)]);
        let storage = [place, b"Q".to_vec()].concat();
        let hooks = call(global("collections", "OrderedDict"), &[]);
        let arguments = [storage, integer(self.offset), shape, stride, vec![0x89], hooks];
        call(global("torch._utils", "_rebuild_tensor_v2"), &arguments)
    }
}

/// A generator checkpoint with this state dict.
fn generator(state: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let pickle = [dict(&[("model_ema", dict(state))]), b".".to_vec()].concat();
    let values = [0; 4 * STORAGE_FLOATS];
    zip_file(&[("archive/data.pkl", &pickle), (&format!("archive/data/{STORAGE}"), &values)])
}

#[test]
fn tensors_that_are_not_in_their_storage() {
    // All tensors from which the sizes of the generator are read; `bad` replaces one of them.
    const USUAL: [(&str, &[i64]); 6] = [
        ("class_emb.weight", &[5, 8]),
        ("diffloss.net.input_proj.weight", &[8, 4]),
        ("diffloss.net.time_embed.mlp.0.weight", &[8, 16]),
        ("encoder_blocks.0.mlp.fc1.weight", &[16, 8]),
        ("encoder_pos_embed_learned", &[1, 4, 8]),
        ("z_proj.weight", &[8, 4]),
    ];
    let place = Workplace::new(&first());
    let line = "eqim-export onnx --tokenizer tokenizer.ckpt --heads 2 --window 3 --vae-norm 1 --steps 9 -o out --generator bad.pth";
    let refused = |name: &str, bad: Vec<u8>| {
        let usual =
            USUAL.iter().filter(|(usual, _)| *usual != name).map(|(name, shape)| (*name, saved(shape).pickle()));
        place.write("bad.pth", generator(&usual.chain([(name, bad)]).collect::<Vec<_>>()));
        place.refused(line);
    };
    let z_proj = |bad: Saved| refused("z_proj.weight", bad.pickle());

    const HUGE: i64 = 1 << 40;
    z_proj(saved(&[8, HUGE]));
    z_proj(saved(&[HUGE, HUGE]));
    z_proj(saved(&[8, 64]));
    z_proj(Saved { offset: STORAGE_FLOATS as i64 - 8, ..saved(&[8, 4]) });
    z_proj(Saved { offset: i64::MAX, ..saved(&[8, 4]) });
    z_proj(Saved { offset: i64::MAX / 4, ..saved(&[8, 4]) });
    z_proj(Saved { storage: "77", ..saved(&[8, 4]) });
    z_proj(Saved { storage: "../../../../etc/passwd", ..saved(&[8, 4]) });
    z_proj(Saved { storage_type: "DoubleStorage", ..saved(&[16, 16]) });
    z_proj(Saved { offset: -1, ..saved(&[8, 4]) });
    z_proj(saved(&[-8, 4]));
    z_proj(saved(&[i64::MIN, i64::MIN]));
    z_proj(saved(&[8]));
    z_proj(saved(&[]));
    z_proj(saved(&[1; 1000]));
    z_proj(Saved { stride: Some(&[1, 8]), ..saved(&[8, 4]) });
    z_proj(Saved { stride: Some(&[0, 0]), ..saved(&[8, 4]) });
    z_proj(Saved { stride: Some(&[4]), ..saved(&[8, 4]) });
    z_proj(Saved { storage_type: "QInt8Storage", ..saved(&[8, 4]) });
    // No size is read from this one, so only reading it can fail.
    for shape in [&[HUGE, HUGE, 0][..], &[-1], &[8, HUGE]] {
        refused("extra", saved(shape).pickle());
    }
    refused("z_proj.weight", text("no tensor"));
    refused("z_proj.weight", call(global("os", "system"), &[text("touch owned")]));
    refused("z_proj.weight", call(global("torch._utils", "_rebuild_tensor_v2"), &[]));

    // A parameter that contains itself, and parameters nested a thousand times.
    let parameter = global("torch._utils", "_rebuild_parameter");
    let itself = [&parameter[..], b"]q\x00Rq\x01", b"h\x00h\x01a0"].concat();
    refused("z_proj.weight", itself);
    let wrapped = (0..1000).fold(saved(&[8, 4]).pickle(), |inner, _| call(parameter.clone(), &[inner]));
    refused("z_proj.weight", wrapped);
    // Sizes of 0 are refused by the checks of the configuration.
    place.write("bad.pth", generator(&USUAL.map(|(name, shape)| (name, saved(&vec![0; shape.len()]).pickle()))));
    place.refused(line);
    insta::assert_snapshot!(place.messages());
}

#[test]
fn storages_that_are_missing_or_short() {
    let fixture = first();
    let place = Workplace::new(&fixture);
    for (line, file) in [(GENERATOR, "generator.pth"), (TOKENIZER, "tokenizer.ckpt")] {
        let mut archive = zip::ZipArchive::new(Cursor::new(place.read(file))).unwrap();
        let mut files = vec![];
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index).unwrap();
            let mut contents = vec![];
            std::io::copy(&mut entry, &mut contents).unwrap();
            files.push((entry.name().unwrap().into_owned(), contents));
        }
        let bad = format!("bad-{file}");
        let short = |keep: fn(usize) -> usize| {
            let cut =
                |name: &str, bytes: &'_ [u8]| if name.contains("/data/") { keep(bytes.len()) } else { bytes.len() };
            let files: Vec<_> = files.iter().map(|(name, bytes)| (&name[..], &bytes[..cut(name, bytes)])).collect();
            zip_file(&files)
        };
        for keep in [|_| 0, |length| length - 1] {
            place.write(&bad, short(keep));
            place.refused(&format!("{line} {bad}"));
        }
        let without: Vec<_> = files.iter().filter(|(name, _)| !name.contains("/data/")).collect();
        let without: Vec<_> = without.iter().map(|(name, bytes)| (&name[..], &bytes[..])).collect();
        place.write(&bad, zip_file(&without));
        place.refused(&format!("{line} {bad}"));
    }
    insta::assert_snapshot!(place.messages());
}

#[test]
fn pickles_that_are_not_of_torch_save() {
    let nested = |levels: usize| [&b")"[..], &vec![0x85; levels], b"."].concat();
    // Sixty lists, each with ten references to the list before: 10^60 values if the lists were copied.
    let laughs = (0..60u8).fold(b"]q\x00".to_vec(), |mut pickle, level| {
        pickle.extend(b"](");
        pickle.extend([b'h', level].repeat(10));
        pickle.extend([b'e', b'q', level + 1]);
        pickle
    });
    let root_in_itself = b"}q\x00X\x09\x00\x00\x00model_emah\x00s.";
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", b"".into()),
        ("no end", b"}".into()),
        ("an empty stack", b".".into()),
        ("deep tuples", nested(1_000_000)),
        ("a memo bomb", [&laughs[..], b"."].concat()),
        ("a memo bomb as model", [&b"}"[..], &text("model_ema"), &laughs, b"s."].concat()),
        ("a dictionary in itself", root_in_itself.into()),
        ("a list in itself", b"]q\x00h\x00a.".into()),
        ("an unknown instruction", b"\xff.".into()),
        ("instructions of protocol 0", b"S'text'\n.".into()),
        ("a mark and nothing", b"(.".into()),
        ("a tuple without mark", b"t.".into()),
        ("a list without mark", b"]e.".into()),
        ("pop of a mark", b"N(0.".into()),
        ("a tuple over a mark", b"NN(\x86t.".into()),
        ("marks closed twice", b"((NtNtt.".into()),
        ("marks without their values", b"N((\x85tt.".into()),
        ("elements for a dictionary", b"}Na.".into()),
        ("entries for a list", b"](NNu.".into()),
        ("a key without value", b"}(Nu.".into()),
        ("a call of nothing", b"R.".into()),
        ("a state for nothing", b"Nb.".into()),
        ("a global that is no text", b"NN\x93.".into()),
        ("a global without end", b"ctorch".into()),
        ("a global without name", b"ctorch\n".into()),
        ("nothing memorized", b"h\x07.".into()),
        ("nothing to memorize", b"q\x07.".into()),
        ("a large memo", b"Nr\xff\xff\xff\xff0j\xff\xff\xff\xff.".into()),
        ("text that is too short", b"X\xff\xff\xff\xffabc.".into()),
        ("text of all memory", b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc.".into()),
        ("text that is no text", b"X\x02\x00\x00\x00\xff\xfe.".into()),
        ("values without end", b"N".repeat(5_000_000)),
        ("entries without end", [&b"N"[..], &b"\x94".repeat(5_000_000)].concat()),
        ("a long integer", [&[0x8a, 255][..], &[1; 255], b"."].concat()),
        ("an integer without bytes", b"\x8a\x00.".into()),
        ("a frame of nothing", b"\x95\x01.".into()),
        ("a model that is text", [&b"}"[..], &text("model_ema"), &text("?"), b"s."].concat()),
        ("a model without tensors", [&b"}"[..], &text("model_ema"), b"}s."].concat()),
        ("keys that are no text", [&b"}"[..], &text("model_ema"), b"}N)sK\x01)s", b"s."].concat()),
        ("something run", [&call(global("os", "system"), &[text("touch owned")])[..], b"."].concat()),
    ];
    let place = Workplace::new(&first());
    for (name, pickle) in &cases {
        let file = format!("{}.pth", name.replace(' ', "-"));
        place.write(&file, zip_file(&[("archive/data.pkl", pickle)]));
        for line in [GENERATOR, TOKENIZER] {
            place.refused(&format!("{line} {file}"));
        }
    }
    insta::assert_snapshot!(place.messages());
}

// Checkpoints of eqim.

/// A `.safetensors` file with this header and data.
fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

#[test]
fn safetensors_that_lie() {
    let place = Workplace::with_bundle(&first());
    let whole = place.read("bundle/model.safetensors");
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"z_proj.weight": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#)
    };
    let simple = |dtype, shape, offsets| safetensors(&tensor(dtype, shape, offsets), &[0; 8]);
    let with_length = |length: u64| [&length.to_le_bytes(), &whole[8..]].concat();
    let cases = [
        ("short", whole[..5].to_vec()),
        ("header-only", whole[..8].to_vec()),
        ("half-a-header", whole[..200].to_vec()),
        ("half", whole[..whole.len() / 2].to_vec()),
        ("one-less", whole[..whole.len() - 1].to_vec()),
        ("one-more", [&whole[..], b"!"].concat()),
        ("no-header", with_length(0)),
        ("header-too-short", with_length(100)),
        ("header-beyond-the-end", with_length(whole.len() as u64)),
        ("header-of-all-memory", with_length(u64::MAX)),
        ("header-of-gigabytes", with_length(99_999_999)),
        ("a-large-header", safetensors(&" ".repeat(20_000_000), &[])),
        ("no-json", safetensors("certainly", &[])),
        ("deep-json", safetensors(&"[".repeat(1_000_000), &[])),
        ("a-list", safetensors("[]", &[])),
        ("offsets-beyond-the-end", simple("F32", "[4]", "[0, 16]")),
        ("offsets-of-all-memory", simple("F32", "[4611686018427387903]", "[0, 18446744073709551612]")),
        ("offsets-backwards", simple("F32", "[2]", "[8, 0]")),
        ("offsets-negative", simple("F32", "[2]", "[-8, 0]")),
        ("offsets-with-a-gap", simple("F32", "[1]", "[4, 8]")),
        ("shape-of-more", simple("F32", "[3]", "[0, 8]")),
        ("shape-negative", simple("F32", "[-2]", "[0, 8]")),
        ("shape-that-overflows", simple("F32", "[4294967296, 4294967296, 4294967296]", "[0, 8]")),
        ("unknown-type", simple("F33", "[2]", "[0, 8]")),
        ("no-metadata", simple("F32", "[2]", "[0, 8]")),
        ("metadata-of-others", safetensors(r#"{"__metadata__": {"format": "pt"}}"#, &[])),
    ];
    for (name, contents) in cases {
        let file = format!("{name}.safetensors");
        place.write(&file, contents);
        for line in [GENERATOR, TOKENIZER] {
            place.refused(&format!("{line} {file}"));
        }
    }
    insta::assert_snapshot!(place.messages());
}

/// Contents of a `.safetensors` file.
#[derive(Clone)]
struct Contents {
    tensors: BTreeMap<String, Tensor>,
    text: HashMap<String, String>,
}

impl Contents {
    fn read(place: &Workplace, file: &str) -> Self {
        let mut file = TensorFile::open(&place.path(file)).unwrap();
        let names: Vec<String> = file.tensors().into_keys().collect();
        let keys = [CONFIG_KEY];
        Self {
            text: keys.map(|key| (key.to_string(), file.text(key).unwrap().to_string())).into(),
            tensors: names.into_iter().map(|name| (name.clone(), file.read(&name).unwrap())).collect(),
        }
    }

    fn write(self, place: &Workplace, file: &str) {
        let tensors: Vec<_> = self.tensors.iter().map(|(name, tensor)| (&name[..], tensor.clone())).collect();
        tensors::write(&place.path(file), &tensors, self.text).unwrap();
    }
}

const BOTH: &str = "eqim-export onnx --generator bad.safetensors --tokenizer bad.safetensors -o out";

#[test]
fn tensors_that_are_not_the_models() {
    let place = Workplace::with_bundle(&first());
    let whole = Contents::read(&place, "bundle/model.safetensors");
    let poisoned = |name: &str, value: f32| {
        let tensor = &whole.tensors[name];
        let mut values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        *values.last_mut().unwrap() = value;
        Tensor::from_vec(values, tensor.shape(), &Device::Cpu).unwrap()
    };
    let refused = |name: &str, tensor: Option<Tensor>, flags: &str| {
        let mut bad = whole.clone();
        bad.tensors.remove(name);
        bad.tensors.extend(tensor.map(|tensor| (name.to_string(), tensor)));
        bad.write(&place, "bad.safetensors");
        place.refused(&format!("{BOTH}{flags}"));
    };
    for name in ["z_proj.weight", "encoder_blocks.1.attn.qkv.bias", "decoder.mid.attn_1.q.weight", "quant_layer.bias"] {
        refused(name, None, "");
        refused(name, Some(Tensor::zeros((7, 7), DType::F32, &Device::Cpu).unwrap()), "");
        refused(name, Some(Tensor::zeros(0, DType::F32, &Device::Cpu).unwrap()), "");
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            refused(name, Some(poisoned(name, value)), "");
        }
        refused(name, Some(poisoned(name, -1e6)), " --dtype fp16");
    }
    for name in ["extra", "encoder.extra", "encoder_blocks.3.attn.qkv.weight", ""] {
        refused(name, Some(Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap()), "");
    }
    insta::assert_snapshot!(place.messages());
}

#[test]
fn metadata_that_is_not_a_model() {
    let place = Workplace::with_bundle(&first());
    let whole = Contents::read(&place, "bundle/model.safetensors");
    let refused = |text: Option<String>| {
        let mut bad = whole.clone();
        bad.text.remove(CONFIG_KEY);
        bad.text.extend(text.map(|text| (CONFIG_KEY.to_string(), text)));
        bad.write(&place, "bad.safetensors");
        place.refused(BOTH);
    };
    for flags in ["--generator-weights raw", "--tokenizer-weights raw", "--preset huge"] {
        let line = format!("{} {flags}", BOTH.replace("bad.", "bundle/model."));
        place.refused(&line);
    }
    refused(None);
    for text in ["", "null", "{}", "[[[", r#"{"generator": {"depth": 3}}"#, "{\"vae_norm\": NaN}"] {
        refused(Some(text.into()));
    }
    refused(Some("[".repeat(1_000_000)));
    let most = u64::MAX;
    let multiple = (most - 31).into();
    let edits: [(&str, Value); 28] = [
        ("/generator/depth", json!(1_000_000_000)),
        ("/generator/depth", json!(1024)),
        ("/generator/depth", json!(0)),
        ("/generator/depth", json!(2)),
        ("/generator/heads", json!(0)),
        ("/generator/heads", json!(3)),
        ("/generator/dim", json!(most)),
        ("/generator/dim", json!(-32)),
        ("/generator/dim", json!(64)),
        ("/generator/mlp_dim", json!(1 << 20)),
        ("/generator/class_num", json!(0)),
        ("/generator/buffer", json!(most)),
        ("/generator/window", json!(0)),
        ("/generator/window", json!(most)),
        ("/generator/time_dim", json!(7)),
        ("/generator/steps", json!(0)),
        ("/generator/vae_norm", json!("NaN")),
        ("/generator/vae_norm", json!(-0.5)),
        ("/generator/embed", json!(6)),
        ("/tokenizer/rows", json!(0)),
        ("/tokenizer/rows", json!(most)),
        ("/tokenizer/image_channels", json!(4)),
        ("/tokenizer/encoder/levels", json!([])),
        ("/tokenizer/encoder/res_blocks", json!(most)),
        ("/tokenizer/decoder/z_channels", json!(0)),
        ("/tokenizer/decoder/conv_in", json!(48)),
        ("/tokenizer/decoder/levels/0/channels", multiple),
        ("/tokenizer/len_down_scale", json!(0)),
    ];
    for (pointer, value) in edits {
        let mut config: Value = serde_json::from_str(&whole.text[CONFIG_KEY]).unwrap();
        *config.pointer_mut(pointer).unwrap() = value;
        refused(Some(config.to_string()));
    }
    insta::assert_snapshot!(place.messages());
}

// Bundles.

#[test]
fn bundles_that_are_not_whole() {
    let place = Workplace::with_bundle(&first());
    let refused = |bundle: &str| {
        for backend in ["candle", "ort"] {
            let line = format!("eqim-run --tokens 3 -o out.png --backend {backend} --engine {bundle}");
            place.refused(&line);
        }
        place.refused(&format!("eqim-export inspect {bundle}"));
    };
    std::fs::create_dir(place.path("empty")).unwrap();
    refused("empty");
    refused("missing");
    refused("generator.pth");

    for file in place.listing_of("bundle") {
        let (path, aside) = (place.path(&format!("bundle/{file}")), place.path("aside"));
        let contents = std::fs::read(&path).unwrap();
        std::fs::rename(&path, &aside).unwrap();
        refused("bundle");
        std::fs::create_dir(&path).unwrap();
        refused("bundle");
        std::fs::remove_dir(&path).unwrap();
        for length in [0, 10, contents.len() / 2, contents.len() - 1] {
            std::fs::write(&path, &contents[..length]).unwrap();
            refused("bundle");
        }
        if file.ends_with(".onnx") {
            let mut edited = contents.clone();
            edited[contents.len() / 2] ^= 1;
            std::fs::write(&path, edited).unwrap();
            refused("bundle");
        }
        std::fs::rename(&aside, &path).unwrap();
    }
    place.run("eqim-run --engine bundle --tokens 3 -o out.png").succeeded();
    insta::assert_snapshot!(place.messages());
}

#[test]
fn weights_that_were_edited() {
    let place = Workplace::with_bundle(&first());
    let mut weights = place.read("bundle/model.safetensors");
    let length = weights.len();
    weights[length - 3] ^= 1;
    place.write("bundle/model.safetensors", weights);
    place.refused("eqim-export inspect bundle");
    insta::assert_snapshot!(place.messages());
}

#[test]
fn descriptions_that_are_not_of_the_bundle() {
    let [one, other] = all();
    let place = Workplace::with_bundle(&one);
    let whole = place.read("bundle/config.json");
    let run = "eqim-run --engine bundle --tokens 3 -o out.png";
    let refused_by_all = |contents: &[u8]| {
        place.write("bundle/config.json", contents);
        for line in [&format!("{run} --backend candle"), &format!("{run} --backend ort"), "eqim-export inspect bundle"]
        {
            place.refused(line);
        }
    };
    let deep = "[".repeat(1_000_000);
    for garbage in ["", "weights", "[]", "{}", "null", r#"{"format": "new"}"#, r#"{"format": 1}"#, &deep] {
        refused_by_all(garbage.as_bytes());
    }
    refused_by_all(&Workplace::with_bundle(&other).read("bundle/config.json"));

    place.write("decoder.onnx", place.read("bundle/decoder.onnx"));
    place.write("model.safetensors", place.read("bundle/model.safetensors"));
    let absolute = place.path("decoder.onnx");
    let edits: [(&str, Value); 20] = [
        ("/format", json!(2)),
        ("/format", json!(-1)),
        ("/precision", json!("fp8")),
        ("/graphs", json!({})),
        ("/graphs/decoder/file", json!("../decoder.onnx")),
        ("/graphs/decoder/file", json!(absolute)),
        ("/graphs/decoder/file", json!("sub\\decoder.onnx")),
        ("/graphs/decoder/file", json!("")),
        ("/graphs/decoder/file", json!("..")),
        ("/graphs/decoder/file", json!("encoder.onnx")),
        ("/graphs/decoder/inputs", json!([])),
        ("/graphs/decoder/sha256", json!("")),
        ("/graphs/decoder/sha256", json!("äöüäöüäöüäöü")),
        ("/weights/file", json!("../model.safetensors")),
        ("/weights/bytes", json!(3)),
        ("/model/generator/heads", json!(0)),
        ("/model/generator/depth", json!(1_000_000_000)),
        ("/model/generator/depth", json!(2)),
        ("/model/generator/dim", json!(64)),
        ("/model/tokenizer/embed", json!(6)),
    ];
    for (pointer, value) in edits {
        let mut config: Value = serde_json::from_slice(&whole).unwrap();
        *config.pointer_mut(pointer).unwrap() = value;
        refused_by_all(config.to_string().as_bytes());
    }

    // The inputs of the graphs do not show the number of classes; the configuration in the file of the weights does.
    let mut config: Value = serde_json::from_slice(&whole).unwrap();
    *config.pointer_mut("/model/generator/class_num").unwrap() = json!(1000);
    refused_by_all(config.to_string().as_bytes());
    insta::assert_snapshot!(place.messages());
}

// Runs.

#[test]
fn run_flags() {
    let place = Workplace::with_bundle(&first());
    place.write("file", "");
    std::fs::create_dir(place.path("folder.png")).unwrap();
    let cases = [
        "--tokens 0",
        "--tokens 1",
        "--tokens=-1",
        "--tokens 1000001",
        "--tokens 18446744073709551615",
        "--tokens 400000 --class 0,1,2",
        "--tokens 4 --width 16",
        "--width 0",
        "--width 4",
        "--width 17",
        "--width 18446744073709551615",
        "--class 5",
        "--class 3,1000000",
        "--class cat",
        "--class=",
        "--class 1,,2",
        "--class=-1",
        "--class 1.5",
        "--cfg NaN",
        "--cfg inf",
        "--cfg=-inf",
        "--cfg=-1",
        "--cfg 1e39",
        "--cfg much",
        "--cfg-schedule cosine",
        "--steps 0",
        "--steps 100001",
        "--seed=-1",
        "--seed 18446744073709551616",
        "--threads 0",
        "--threads 1000000",
        "--backend tensorrt",
        "--frobnicate",
        "-o missing/out.png",
        "-o folder.png",
        "-o file/out.png",
        "-o out.jpg",
        "-o out",
        "-o .png",
        "--save-tokens missing/saved.safetensors",
        "--save-tokens folder.png",
        "--save-tokens file/saved.safetensors",
        "-o same.png --save-tokens same.png",
        "--seed 3 --noise file",
        "-o same.png --save-tokens ./same.png",
        "--save-tokens bundle/model.safetensors",
        "-o bundle/out.png",
        "--tile none --tokens 30000",
    ];
    for flags in cases {
        place.refused(&format!("eqim-run --engine bundle {flags}"));
    }
    place.refused("eqim-run --tokens 3");
    // More than the memory of any machine.
    let many = ["0"; 9000].join(",");
    let too_large = ["--steps is too large: the flow head's modulations for this many images would take"];
    place.run(&format!("eqim-run --engine bundle --steps 100000 --cfg 2 --class {many}")).failed(2, &too_large);
    insta::with_settings!({filters => MEMORY}, { insta::assert_snapshot!(place.messages()) });
}

fn write_tokens(place: &Workplace, file: &str, key: &str, tensor: Tensor) {
    candle_core::safetensors::save(&HashMap::from([(key, tensor)]), place.path(file)).unwrap();
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

/// Writes tensors `key` (tokens or noise) that a run of one class with E = 8 cannot use, and asserts that all are
/// refused.
fn refuse_tensors(place: &Workplace, flag: &str, key: &str, line: &str) {
    let poisoned = |value: f32| {
        let values: Vec<f32> = (0..24).map(|i| if i == 20 { value } else { 0.5 }).collect();
        Tensor::from_vec(values, (1, 3, 8), &Device::Cpu).unwrap()
    };
    let cases = [
        ("wrong-embed", key, zeros(&[1, 3, 6])),
        ("wrong-batch", key, zeros(&[2, 3, 8])),
        ("no-batch", key, zeros(&[0, 3, 8])),
        ("no-tokens", key, zeros(&[1, 0, 8])),
        ("flat", key, zeros(&[3, 8])),
        ("scalar", key, zeros(&[])),
        ("integers", key, zeros(&[1, 3, 8]).to_dtype(DType::I64).unwrap()),
        ("nan", key, poisoned(f32::NAN)),
        ("infinite", key, poisoned(f32::NEG_INFINITY)),
        ("wrong-key", "latents", zeros(&[1, 3, 8])),
    ];
    let refused = |file: &str| place.refused(&format!("{line} {flag} {file}"));
    for (name, key, tensor) in cases {
        let file = format!("{name}.safetensors");
        write_tokens(place, &file, key, tensor);
        refused(&file);
    }
    write_tokens(place, "whole.safetensors", key, zeros(&[1, 3, 8]));
    let whole = place.read("whole.safetensors");
    for length in [0, 5, whole.len() / 2, whole.len() - 1] {
        place.write("truncated.safetensors", &whole[..length]);
        refused("truncated.safetensors");
    }
    place.write("notes.txt", "three tokens, please");
    for file in ["notes.txt", "missing.safetensors", "bundle", "generator.pth"] {
        refused(file);
    }
}

#[test]
fn prefixes_of_tokens() {
    let place = Workplace::with_bundle(&first());
    let line = "eqim-run --engine bundle --backend candle -o out.png --tokens";
    refuse_tensors(&place, "--prefix", "tokens", &format!("{line} 5"));
    for tokens in [2, 3] {
        place.refused(&format!("{line} {tokens} --prefix whole.safetensors"));
    }
    place.run(&format!("{line} 4 --prefix whole.safetensors")).succeeded();
    write_tokens(&place, "two.safetensors", "tokens", zeros(&[2, 3, 8]));
    place.refused(&format!("{line} 4 --class 0,1,2 --prefix two.safetensors"));
    insta::assert_snapshot!(place.messages());
}

#[test]
fn noise_that_does_not_fit() {
    let place = Workplace::with_bundle(&first());
    let line = "eqim-run --engine bundle --backend candle -o out.png --tokens";
    refuse_tensors(&place, "--noise", "noise", &format!("{line} 3"));
    place.refused(&format!("{line} 4 --noise whole.safetensors"));
    place.refused(&format!("{line} 2 --noise whole.safetensors"));
    write_tokens(&place, "prefix.safetensors", "tokens", zeros(&[1, 2, 8]));
    let line = format!("{line} 4 --prefix prefix.safetensors --noise whole.safetensors");
    place.refused(&line);
    place.run("eqim-run --engine bundle --tokens 3 --noise whole.safetensors -o out.png").succeeded();
    insta::assert_snapshot!(place.messages());
}

#[test]
fn tensors_of_sixty_four_gigabytes() {
    let place = Workplace::with_bundle(&first());
    for key in ["tokens", "noise"] {
        let tokens = 1u64 << 31;
        let header = json!({ key: { "dtype": "F32", "shape": [1, tokens, 8], "data_offsets": [0, 32 * tokens] } });
        let file = format!("{key}.safetensors");
        place.write(&file, safetensors(&header.to_string(), &[]));
        let sparse = std::fs::File::options().write(true).open(place.path(&file)).unwrap();
        sparse.set_len(sparse.metadata().unwrap().len() + 32 * tokens).unwrap();
    }
    let line = "eqim-run --engine bundle --backend candle -o out.png --tokens 5";
    place.refused(&format!("{line} --prefix tokens.safetensors"));
    place.refused(&format!("{line} --noise noise.safetensors"));
    insta::assert_snapshot!(place.messages());
}

/// A PNG without pixels, whose header claims `width × height` pixels.
fn promised_png(width: u32, height: u32) -> Vec<u8> {
    let chunk = |kind: &[u8], data: &[u8]| {
        let body = [kind, data].concat();
        let crc = body.iter().fold(u32::MAX, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1)))
        });
        [&(data.len() as u32).to_be_bytes(), &body[..], &(!crc).to_be_bytes()].concat()
    };
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &header), chunk(b"IDAT", &[]), chunk(b"IEND", &[])].concat()
}

#[test]
fn prefixes_that_are_pictures() {
    let place = Workplace::with_bundle(&first());
    let line = "eqim-run --engine bundle --backend candle -o out.png --tokens 5 --prefix";
    let picture = |file: &str, width, height| image::RgbImage::new(width, height).save(place.path(file)).unwrap();
    let refused = |file: &str| place.refused(&format!("{line} {file}"));
    picture("pixel.png", 1, 1);
    picture("narrow.png", 7, 32);
    picture("tower.png", 1, 3000);
    picture("sliver.png", 3000, 1);
    picture("long.png", 20, 32);
    picture("whole.png", 16, 32);
    picture("whole.jpg", 16, 32);
    place.write("huge.png", promised_png(100_000, 100_000));
    place.write("endless.png", promised_png(u32::MAX, u32::MAX));
    place.write("none.png", promised_png(0, 0));
    place.write("text.png", "a picture of a cat");
    for file in ["pixel", "narrow", "tower", "sliver", "long", "huge", "endless", "none", "text"] {
        refused(&format!("{file}.png"));
    }
    // A JPEG with data after its end, such as a motion photo of a camera, is valid.
    place.write("moving.jpg", [&place.read("whole.jpg")[..], b"moov\xff\xda\x01"].concat());
    // So is one with zeros, text or nothing in the place of its end.
    let whole = place.read("whole.jpg");
    for (name, end) in [("zeros.jpg", &[0; 512][..]), ("page.jpg", b"<html>"), ("open.jpg", b"")] {
        place.write(name, [&whole[..whole.len() - 2], end].concat());
    }
    for file in ["moving.jpg", "zeros.jpg", "page.jpg", "open.jpg"] {
        place.run(&format!("{line} {file}")).succeeded();
        std::fs::remove_file(place.path("out.png")).unwrap();
    }
    for file in ["whole.png", "whole.jpg"] {
        let whole = place.read(file);
        for length in [4, 20, 200, whole.len() - 14] {
            let name = format!("{length}-of-{file}");
            place.write(&name, &whole[..length]);
            refused(&name);
        }
        // A copy that was interrupted and filled up with zeros.
        let name = format!("filled-{file}");
        place.write(&name, [&whole[..whole.len() - 14], &[0; 512]].concat());
        refused(&name);
        place.run(&format!("{line} {file}")).succeeded();
        std::fs::remove_file(place.path("out.png")).unwrap();
    }
    insta::assert_snapshot!(place.messages());
}

#[test]
fn inspect_flags() {
    let place = Workplace::with_bundle(&first());
    for flags in
        ["bundle --tokens 1", "bundle --tokens 1000001", "bundle --steps 0", "bundle --steps 99999999999", "--json"]
    {
        place.refused(&format!("eqim-export inspect {flags}"));
    }
    insta::assert_snapshot!(place.messages());
}

#[test]
fn no_command_at_all() {
    let place = Workplace::new(&first());
    for line in ["eqim-export", "eqim-run", "eqim-export onnx", "eqim-export inspect"] {
        place.refused(line);
    }
    insta::assert_snapshot!(place.messages());
}
