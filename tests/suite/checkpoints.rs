//! Checkpoints as PyTorch, its users and their tools write them. Each gives the weights of the fixture, or is refused.

use std::collections::HashMap;

use candle_core::Tensor;
use eqim::checkpoint::tensors::{self, TensorFile};
use eqim::checkpoint::{self, Hints, Loaded, Origin, WeightSet, WeightSets};
use eqim::close::{largest_difference, values};
use eqim::config::Preset;
use eqim::engine::candle::{CandleEngine, to_tensor};
use eqim::generate::generate;
use eqim::request::{Noise, Request};
use eqim::weights::Weights;
use eqim::{Config, Result};
use serde_json::json;

use crate::common::bins::{Workplace, export_line};
use crate::common::{Fixture, file, fixtures};
use eqim_fuzz::torch::{
    Files, arguments, bytes, call, checkpoint, contiguous, deflated, dict, files, float, global, integer, list,
    namespace, storage, stored, stream, tensor, text, tuple, without_crc,
};

/// Pickled tensors by name.
type State = Vec<(String, Vec<u8>)>;

/// A tensor of the fixture by name.
#[derive(Clone)]
struct Named {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// The fixture, and a folder for altered copies of its checkpoints.
struct Case {
    place: Workplace,
    config: Config,
    /// Tensors of the generator's average, in their order in the checkpoint's names.
    generator: Vec<Named>,
    expected: Weights,
}

const GENERATOR: &str = "generator.pth";
const TOKENIZER: &str = "tokenizer.ckpt";

fn is_tokenizers(name: &str) -> bool {
    ["encoder.", "decoder.", "quant_layer.", "post_quant_layer."].iter().any(|part| name.starts_with(part))
}

impl Case {
    fn new() -> Self {
        let fixture = Fixture::open(fixtures());
        let place = Workplace::new(&fixture);
        let hints = Hints { heads: Some(fixture.heads), ..Hints::default() };
        let (generator, tokenizer) = (place.path(GENERATOR), place.path(TOKENIZER));
        let (config, expected) = checkpoint::load(&generator, &tokenizer, WeightSet::Ema, &hints).unwrap();
        let named = |(name, tensor): (&str, &Tensor)| Named {
            name: name.into(),
            shape: tensor.dims().to_vec(),
            values: values(tensor).unwrap(),
        };
        let generator = expected.iter().filter(|(name, _)| !is_tokenizers(name)).map(named).collect();
        Self { place, config, generator, expected }
    }

    /// Settings that the tensors do not contain.
    fn hints(&self) -> Hints {
        let model = &self.config.generator;
        Hints {
            preset: None,
            heads: Some(model.heads),
            window: Some(model.window),
            vae_norm: Some(model.vae_norm),
            steps: Some(model.steps),
        }
    }

    fn load(&self, generator: &str, tokenizer: &str, sets: WeightSets, hints: &Hints) -> Result<Loaded> {
        checkpoint::load_described(&self.place.path(generator), &self.place.path(tokenizer), sets, hints)
    }

    /// Loads with another generator.
    fn with_generator(&self, file: &str, contents: impl AsRef<[u8]>) -> Result<Loaded> {
        self.place.write(file, contents);
        self.load(file, TOKENIZER, WeightSets::default(), &self.hints())
    }

    /// Asserts that the weights and the configuration are those of the fixture.
    #[track_caller]
    fn same(&self, loaded: Result<Loaded>) {
        let loaded = loaded.unwrap();
        assert_eq!(loaded.config, self.config);
        for ((name, found), (other, expected)) in loaded.weights.iter().zip(self.expected.iter()) {
            assert_eq!(name, other);
            assert_eq!(values(found).unwrap(), values(expected).unwrap(), "{name}");
        }
    }

    /// The generator's tensors, each in a storage of its own.
    fn apart(&self) -> (State, Vec<Vec<u8>>) {
        let pickled = |(key, named): (usize, &Named)| {
            let storage = storage("FloatStorage", &key.to_string(), "cpu", named.values.len());
            (named.name.clone(), tensor(storage, 0, &named.shape, &contiguous(&named.shape)))
        };
        let pickles = self.generator.iter().enumerate().map(pickled).collect();
        (pickles, self.generator.iter().map(|named| bytes(&named.values)).collect())
    }

    /// A checkpoint whose root has these entries and the generator's storages.
    fn archive(&self, root: impl FnOnce(State) -> Vec<u8>) -> Files {
        let (pickles, storages) = self.apart();
        checkpoint(&root(pickles), &storages)
    }
}

fn message(loaded: Result<Loaded>) -> String {
    let error = loaded.unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

#[test]
fn values_of_a_big_endian_machine_are_swapped() {
    let case = Case::new();
    let mut all = files(case.place.read(GENERATOR));
    all.retain(|(name, _)| !name.ends_with("byteorder"));
    let folder = all[0].0.split('/').next().unwrap().to_string();
    for (_, contents) in all.iter_mut().filter(|(name, _)| name.contains("/data/")) {
        contents.chunks_exact_mut(4).for_each(<[u8]>::reverse);
    }
    let with = |order: &str| {
        let byteorder = (format!("{folder}/byteorder"), order.as_bytes().to_vec());
        stored(&all.iter().cloned().chain([byteorder]).collect())
    };
    case.same(case.with_generator("big.pth", with("big")));
    let refused = message(case.with_generator("odd.pth", with("middle")));
    assert!(refused.contains("byteorder \"middle\", expected little or big"), "{refused}");
}

#[test]
fn a_flipped_bit_is_found_and_its_tensor_named() {
    let case = Case::new();
    let (_, storages) = case.apart();
    let whole = stored(&case.archive(|state| dict(&[("model_ema", dict(&state))])));
    case.same(case.with_generator("whole.pth", &whole));
    for (index, named) in case.generator.iter().enumerate().step_by(7) {
        let start = whole.windows(storages[index].len()).position(|window| window == storages[index]).unwrap();
        let mut flipped = whole.clone();
        // The last bit of the mantissa of the last value.
        flipped[start + storages[index].len() - 4] ^= 1;
        let refused = message(case.with_generator("flipped.pth", flipped));
        assert!(refused.contains(&format!("tensor {}: storage", named.name)), "{refused}");
        assert!(refused.contains("is damaged"), "{refused}");
    }
    let pickle = whole.windows(9).position(|window| window == b"model_ema").unwrap();
    let mut flipped = whole;
    flipped[pickle] ^= 1;
    let refused = message(case.with_generator("flipped.pth", flipped));
    assert!(refused.contains("data.pkl is damaged"), "{refused}");
}

#[test]
fn archives_without_crc_and_packed_again_are_read() {
    let case = Case::new();
    let plain = files(case.place.read(GENERATOR));
    case.same(case.with_generator("without.pth", without_crc(&plain)));
    case.same(case.with_generator("deflated.pth", deflated(&plain)));
    let moved: Files = plain.iter().map(|(name, contents)| (format!("copies/{name}"), contents.clone())).collect();
    let beside = ("__MACOSX/copies/._data.pkl".to_string(), vec![0; 64]);
    let finder = ("__MACOSX/copies/data.pkl".to_string(), vec![0; 64]);
    case.same(case.with_generator("macos.pth", stored(&[vec![beside, finder], moved].concat())));
}

#[test]
fn any_strides_and_one_storage_for_all_are_read() {
    let case = Case::new();
    // All tensors in one storage, matrices as transposed views.
    let (mut all, mut state) = (vec![], vec![]);
    for named in &case.generator {
        let (offset, flat) = (all.len(), &named.values);
        let stride = match named.shape[..] {
            [rows, columns] => {
                all.extend((0..rows * columns).map(|i| flat[i % rows * columns + i / rows]));
                vec![1, rows]
            }
            _ => {
                all.extend(flat);
                contiguous(&named.shape)
            }
        };
        state.push((&named.name, offset, &named.shape, stride));
    }
    let one = storage("FloatStorage", "0", "cuda:3", all.len());
    let state = state.iter().map(|(name, offset, shape, stride)| (name, tensor(one.clone(), *offset, shape, stride)));
    let state: Vec<_> = state.collect();
    let root = dict(&[("model_ema", dict(&state))]);
    case.same(case.with_generator("views.pth", stored(&checkpoint(&root, &[bytes(&all)]))));
}

#[test]
fn tensors_that_share_a_storage_are_compared_with_the_model_before_they_are_read() {
    let case = Case::new();
    let (state, mut storages) = case.apart();
    // 4000 tensors of 64 MB: 256 GB, if they were read.
    let large = storages.len();
    storages.push(vec![0; 1 << 26]);
    let shape = [1 << 12, 1 << 12];
    let view = tensor(storage("FloatStorage", &large.to_string(), "cpu", 1 << 24), 0, &shape, &contiguous(&shape));
    let extra = (0..4000).map(|index| (format!("extra.{index}.weight"), view.clone()));
    let state: Vec<_> = state.into_iter().chain(extra).collect();
    let root = dict(&[("model_ema", dict(&state))]);
    let refused = message(case.with_generator("many.pth", deflated(&checkpoint(&root, &storages))));
    assert!(refused.contains("tensor extra.0.weight is not part of this model (4000 such tensors)"), "{refused}");
}

/// Asserts that a generator gives the fixture's weights, when each tensor is pickled by `wrap`.
#[track_caller]
fn wrapped(case: &Case, wrap: impl Fn(Vec<u8>) -> Vec<u8>) {
    let root = |state: State| {
        let state: Vec<_> = state.into_iter().map(|(name, tensor)| (name, wrap(tensor))).collect();
        dict(&[("model_ema", dict(&state))])
    };
    case.same(case.with_generator("wrapped.pth", stored(&case.archive(root))));
}

#[test]
fn parameters_and_subclasses_are_tensors() {
    let case = Case::new();
    let utils = |name| global("torch._utils", name);
    let hooks = || call(global("collections", "OrderedDict"), &[]);
    let attributes = dict(&[("no_weight_decay", vec![0x88])]);
    wrapped(&case, |tensor| call(utils("_rebuild_parameter"), &[tensor, vec![0x88], hooks()]));
    wrapped(&case, |tensor| {
        call(utils("_rebuild_parameter_with_state"), &[tensor, vec![0x88], hooks(), attributes.clone()])
    });
    // torch._tensor._rebuild_from_type_v2(function, type, arguments, state), where the tensor is a call of the function.
    let function = global("torch._utils", "_rebuild_tensor_v2");
    wrapped(&case, |tensor| {
        let arguments = tensor[function.len()..tensor.len() - 1].to_vec();
        let kind = global("torch.nn.parameter", "Buffer");
        call(global("torch._tensor", "_rebuild_from_type_v2"), &[function.clone(), kind, arguments, attributes.clone()])
    });
    // An OrderedDict, and a subclass of dict.
    for class in [global("collections", "OrderedDict"), global("easydict", "EasyDict")] {
        let root = |state: State| {
            let entries = dict(&state)[1..].to_vec();
            dict(&[("model_ema", [class.clone(), b")R".to_vec(), entries].concat())])
        };
        case.same(case.with_generator("dicts.pth", stored(&case.archive(root))));
    }
}

#[test]
fn tensors_whose_values_would_be_others_are_refused() {
    let case = Case::new();
    let refused = |wrap: &dyn Fn(&Named, Vec<u8>) -> Vec<u8>| {
        let (state, storages) = case.apart();
        let state = state.into_iter().zip(&case.generator).map(|((name, tensor), named)| {
            let tensor = if name == "z_proj.weight" { wrap(named, tensor) } else { tensor };
            (name, tensor)
        });
        let root = dict(&[("model_ema", dict(&state.collect::<Vec<_>>()))]);
        message(case.with_generator("other.pth", stored(&checkpoint(&root, &storages))))
    };
    // A view with the bit for negated values.
    let negated = refused(&|named, _| {
        let place = storage("FloatStorage", "0", "cpu", 1);
        let arguments = arguments(place, 0, &named.shape, &contiguous(&named.shape));
        let metadata = dict(&[("neg", vec![0x88])]);
        call(global("torch._utils", "_rebuild_tensor_v2"), &[&arguments[..], &[metadata]].concat())
    });
    assert!(negated.contains("tensor z_proj.weight is a view with negated or conjugated values"), "{negated}");
    let sparse = refused(&|_, tensor| call(global("torch._utils", "_rebuild_sparse_tensor"), &[tensor]));
    assert!(sparse.contains("tensor z_proj.weight is saved by torch._utils._rebuild_sparse_tensor"), "{sparse}");
    let long =
        refused(&|named, _| tensor(storage("LongStorage", "0", "cpu", 1), 0, &named.shape, &contiguous(&named.shape)));
    assert!(long.contains("tensor z_proj.weight is of torch.LongStorage, expected float32"), "{long}");
    // Outside of the storage, and in one that does not exist.
    let place = |key: &str| storage("FloatStorage", key, "cpu", 1);
    let at = |key: &str, offset: usize| {
        refused(&|named, _| tensor(place(key), offset, &named.shape, &contiguous(&named.shape)))
    };
    let beyond = at("0", 1 << 20);
    assert!(beyond.contains("tensor z_proj.weight (and 1 others in the same storage): storage 0: has"), "{beyond}");
    let overflow = at("0", usize::MAX >> 1);
    assert!(overflow.contains("tensor z_proj.weight is too large: its size in bytes overflows"), "{overflow}");
    for key in ["777", "../../../../etc/passwd"] {
        let missing = at(key, 0);
        assert!(
            missing.contains(&format!("tensor z_proj.weight: storage {key}: specified file not found")),
            "{missing}"
        );
    }
    let spread = refused(&|named, _| tensor(storage("FloatStorage", "0", "cpu", 1), 0, &named.shape, &[1 << 30, 1]));
    assert!(spread.contains("tensor z_proj.weight has") && spread.contains("spread over"), "{spread}");
}

#[test]
fn prefixes_of_wrappers_are_taken_off() {
    let case = Case::new();
    for prefix in ["module.", "_orig_mod.", "_forward_module.", "_orig_mod.module.", "model.", "net.generator."] {
        let root = |state: State| {
            let state: Vec<_> = state.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)).collect();
            dict(&[("state", dict(&state))])
        };
        case.same(case.with_generator("prefix.pth", stored(&case.archive(root))));
    }
    let twice = |state: State| {
        let again = ("module.z_proj.weight".to_string(), state[0].1.clone());
        dict(&[("model_ema", dict(&[state, vec![again]].concat()))])
    };
    let refused = message(case.with_generator("twice.pth", stored(&case.archive(twice))));
    assert!(refused.contains("is the same tensor as"), "{refused}");
}

#[test]
fn bare_and_nested_state_dicts_are_found() {
    let case = Case::new();
    let raw = |state: &[(String, Vec<u8>)]| {
        // The same shapes with the values of the neighbour of the same shape are other weights.
        let mut other = state.to_vec();
        other.iter_mut().for_each(|(_, tensor)| tensor.clear());
        other
    };
    let empty = |state: &[(String, Vec<u8>)]| {
        dict(&raw(state).iter().map(|(name, _)| (name, b"N".to_vec())).collect::<Vec<_>>())
    };
    let roots: [&dyn Fn(State) -> Vec<u8>; 6] = [
        &|state| dict(&state),
        &|state| dict(&[("state_dict", dict(&state))]),
        &|state| dict(&[("ema", dict(&state))]),
        &|state| dict(&[("trainer", dict(&[("model_ema", dict(&state)), ("epoch", integer(3))]))]),
        &|state| dict(&[("model_ema", b"N".to_vec()), ("model", dict(&state))]),
        // The average is taken, and the other not looked at.
        &|state| dict(&[("weights", empty(&state)), ("weights_ema", dict(&state))]),
    ];
    for root in roots {
        case.same(case.with_generator("nested.pth", stored(&case.archive(root))));
    }
    let two = |state: State| dict(&[("a", dict(&state)), ("b", dict(&state))]);
    let refused = message(case.with_generator("two.pth", stored(&case.archive(two))));
    assert!(refused.contains("has several state dicts, expected one: a, b"), "{refused}");
    let module = |state: State| {
        let object = [global("models", "Generator"), b")\x81".to_vec()].concat();
        dict(&[("model_ema", [object, dict(&[("_modules", dict(&state))]), b"b".to_vec()].concat())])
    };
    let refused = message(case.with_generator("module.pth", stored(&case.archive(module))));
    assert!(refused.contains("`model_ema` is a whole module (an object of models.Generator)"), "{refused}");
}

#[test]
fn an_average_that_is_a_list_has_the_names_of_the_model() {
    let case = Case::new();
    let (state, mut storages) = case.apart();
    let averages: Vec<Vec<u8>> = state.iter().map(|(_, tensor)| tensor.clone()).collect();
    // The trained weights are zeros.
    let zeros = storages.len();
    storages.push(vec![0; storages.iter().map(Vec::len).max().unwrap()]);
    let trained = case.generator.iter().map(|named| {
        let place = storage("FloatStorage", &zeros.to_string(), "cpu", named.values.len());
        (named.name.clone(), tensor(place, 0, &named.shape, &contiguous(&named.shape)))
    });
    let trained = dict(&trained.collect::<Vec<_>>());
    let with = |averages: &[Vec<u8>]| {
        let root = dict(&[("model", trained.clone()), ("model_ema", list(averages))]);
        stored(&checkpoint(&root, &storages))
    };
    case.same(case.with_generator("list.pth", with(&averages)));
    let refused = message(case.with_generator("short.pth", with(&averages[1..])));
    assert!(refused.contains("`model_ema` is a list of") && refused.contains("and `model` names"), "{refused}");
    let swapped = [&averages[1..], &averages[..1]].concat();
    let refused = message(case.with_generator("swapped.pth", with(&swapped)));
    assert!(refused.contains("in the list `model_ema` and"), "{refused}");
}

#[test]
fn each_half_has_its_own_choice_of_weights() {
    let case = Case::new();
    let (raw, ema) = (Some(WeightSet::Raw), Some(WeightSet::Ema));
    let load = |generator, tokenizer| {
        case.load(GENERATOR, TOKENIZER, WeightSets { generator, tokenizer }, &case.hints()).unwrap()
    };
    let is_average = |loaded: &Loaded, name: &str| {
        values(loaded.weights.find(name).unwrap()).unwrap() == values(case.expected.find(name).unwrap()).unwrap()
    };
    for (sets, expected) in [
        ((None, None), [true, true]),
        ((raw, ema), [false, true]),
        ((ema, raw), [true, false]),
        ((raw, raw), [false; 2]),
    ] {
        let loaded = load(sets.0, sets.1);
        assert_eq!(["z_proj.weight", "decoder.conv_in.weight"].map(|name| is_average(&loaded, name)), expected);
    }
    // Without averages, the generator's trained weights go with the tokenizer's averages.
    let trained = |state: State| dict(&[("model", dict(&state)), ("model_ema", b"N".to_vec())]);
    let loaded = case.with_generator("trained.pth", stored(&case.archive(trained))).unwrap();
    assert!(loaded.taken.starts_with("model of ") && loaded.taken.contains("the EMA of all"), "{}", loaded.taken);
    assert!(is_average(&loaded, "decoder.conv_in.weight"));
    let refused = case.load("trained.pth", TOKENIZER, WeightSet::Ema.into(), &case.hints()).unwrap_err();
    assert_eq!((refused.field(), refused.exit_code()), (Some("generator_weights"), 2), "{refused}");
}

/// A tokenizer checkpoint of the fixture with tensors renamed, or removed if there is no new name.
fn tokenizer(case: &Case, rename: impl Fn(&str) -> Option<String>) -> Vec<u8> {
    let (_, averages) = checkpoint::load_tokenizer_alone(&case.place.path(TOKENIZER), Some(WeightSet::Ema)).unwrap();
    let (_, trained) = checkpoint::load_tokenizer_alone(&case.place.path(TOKENIZER), Some(WeightSet::Raw)).unwrap();
    let average = |name: &str| {
        let (part, rest) = name.split_once('.').unwrap();
        format!("ema_{part}.{}", rest.replace('.', ""))
    };
    let named = trained.iter().map(|(name, tensor)| (name.to_string(), tensor));
    let named = named.chain(averages.iter().map(|(name, tensor)| (average(name), tensor)));
    let (mut state, mut storages) = (vec![], vec![]);
    for (name, weights) in named.filter_map(|(name, tensor)| Some((rename(&name)?, tensor))) {
        let values = values(weights).unwrap();
        let place = storage("FloatStorage", &storages.len().to_string(), "cpu", values.len());
        state.push((name, tensor(place, 0, weights.dims(), &contiguous(weights.dims()))));
        storages.push(bytes(&values));
    }
    let counter = tensor(storage("LongStorage", &storages.len().to_string(), "cpu", 1), 0, &[], &[]);
    storages.push(vec![0; 8]);
    for buffer in ["colorize", "total_ops", "encoder.total_params", "loss.steps", "ema_decoder.num_updates"] {
        state.push((buffer.into(), counter.clone()));
    }
    stored(&checkpoint(&dict(&[("state_dict", dict(&state))]), &storages))
}

#[test]
fn tokenizers_have_averages_tensor_by_tensor() {
    let case = Case::new();
    let load = |file: &str, contents: Vec<u8>| {
        case.place.write(file, contents);
        case.load(GENERATOR, file, WeightSets::default(), &case.hints())
    };
    let whole = load("whole.ckpt", tokenizer(&case, |name| Some(name.into())));
    assert_eq!(whole.as_ref().unwrap().passed_over, ["colorize", "encoder.total_params", "total_ops"]);
    case.same(whole);
    // Compiled: the wrapper is in the names of the decoder, also inside of the averages.
    let compiled = |name: &str| {
        let name = name.replace("ema_decoder.", "ema_decoder._orig_mod");
        Some(if name.starts_with("decoder.") { name.replacen("decoder.", "decoder._orig_mod.", 1) } else { name })
    };
    case.same(load("compiled.ckpt", tokenizer(&case, compiled)));
    case.same(load("module.ckpt", tokenizer(&case, |name| Some(format!("module.{name}")))));
    // The encoder was frozen, so it has no averages.
    let frozen =
        load("frozen.ckpt", tokenizer(&case, |name| (!name.starts_with("ema_encoder")).then(|| name.into()))).unwrap();
    assert!(frozen.taken.contains("the EMA of") && frozen.taken.contains("raw tensors"), "{}", frozen.taken);
    let (_, raw) = checkpoint::load_tokenizer_alone(&case.place.path(TOKENIZER), Some(WeightSet::Raw)).unwrap();
    for (name, expected) in [("encoder.conv_in.weight", &raw), ("decoder.conv_in.weight", &case.expected)] {
        let [found, expected] = [&frozen.weights, expected].map(|of| values(of.find(name).unwrap()).unwrap());
        assert_eq!(found, expected, "{name}");
    }
    let strict = case.load(GENERATOR, "frozen.ckpt", WeightSet::Ema.into(), &case.hints()).unwrap_err();
    assert_eq!(strict.field(), Some("tokenizer_weights"), "{strict}");
    // A trained tensor that the model has not is no buffer.
    let more = |name: &str| Some(name.replace("decoder.norm_out.weight", "decoder.temb.weight"));
    let refused = message(load("more.ckpt", tokenizer(&case, more)));
    assert!(refused.contains("tensor decoder.norm_out.weight") && refused.contains("is missing"), "{refused}");
}

#[test]
fn plain_and_sharded_safetensors_are_read_with_flags() {
    let case = Case::new();
    let all: Vec<(&str, Tensor)> = case.expected.iter().map(|(name, tensor)| (name, tensor.clone())).collect();
    let text = || HashMap::from([("format".to_string(), "pt".to_string())]);
    tensors::write(&case.place.path("plain.safetensors"), &all, text()).unwrap();
    case.same(case.load("plain.safetensors", "plain.safetensors", WeightSets::default(), &case.hints()));
    let unknown = message(case.load("plain.safetensors", TOKENIZER, WeightSets::default(), &Hints::default()));
    assert!(unknown.contains("heads is unknown"), "{unknown}");

    let middle = all.len() / 2;
    let mut map = serde_json::Map::new();
    for (file, part) in [("model-1.safetensors", &all[..middle]), ("model-2.safetensors", &all[middle..])] {
        tensors::write(&case.place.path(file), part, text()).unwrap();
        map.extend(part.iter().map(|(name, _)| (name.to_string(), json!(file))));
    }
    let index = "model.safetensors.index.json";
    let write =
        |map: &serde_json::Map<_, _>| case.place.write(index, json!({"metadata": {}, "weight_map": map}).to_string());
    write(&map);
    case.same(case.load(index, index, WeightSets::default(), &case.hints()));
    for (file, mentions) in [
        ("model-1.safetensors", "says that model-1.safetensors has the tensor z_proj.weight"),
        ("../model-1.safetensors", "names a file outside of its folder"),
        ("model-3.safetensors", "model-3.safetensors: No such file"),
    ] {
        map["z_proj.weight"] = json!(file);
        write(&map);
        let refused = message(case.load(index, TOKENIZER, WeightSets::default(), &case.hints()));
        assert!(refused.contains(mentions), "{refused}");
    }
}

#[test]
fn a_header_that_begins_like_a_pickle_is_read() {
    let case = Case::new();
    let all: Vec<(&str, Tensor)> = case.expected.iter().map(|(name, tensor)| (name, tensor.clone())).collect();
    tensors::write(&case.place.path("plain.safetensors"), &all, HashMap::new()).unwrap();
    let file = case.place.read("plain.safetensors");
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    // A length of …0280 in hexadecimal: its bytes are those of a pickle of protocol 2.
    let padded = (length & !0xffff) + 0x1_0280;
    let mut longer = (padded as u64).to_le_bytes().to_vec();
    longer.extend(&file[8..8 + length]);
    longer.resize(8 + padded, b' ');
    longer.extend(&file[8 + length..]);
    assert!(longer.starts_with(b"\x80\x02"));
    case.same(case.with_generator("padded.safetensors", longer));
}

#[test]
fn the_format_before_pytorch_1_6_is_read() {
    let case = Case::new();
    let (state, storages) = case.apart();
    // Its references to storages have a sixth element.
    let old = |pickle: &[u8]| {
        let reference = b"tQ";
        let mut parts = vec![];
        let mut rest = pickle;
        while let Some(at) = rest.windows(2).position(|window| window == reference) {
            parts.extend([&rest[..at], b"NtQ"]);
            rest = &rest[at + 2..];
        }
        parts.push(rest);
        parts.concat()
    };
    let state: Vec<_> = state.iter().map(|(name, tensor)| (name, old(tensor))).collect();
    let root = dict(&[("model_ema", dict(&state))]);
    let whole = stream(&root, &storages);
    case.same(case.with_generator("old.pth", &whole));
    let cut = message(case.with_generator("cut.pth", &whole[..whole.len() - 1]));
    assert!(cut.contains("is cut off"), "{cut}");
}

/// `numpy.float64` or `numpy.int64` with the bytes of its value, as protocol 2 writes them.
fn scalar(code: &str, value: [u8; 8]) -> Vec<u8> {
    let kind = call(global("numpy", "dtype"), &[text(code), vec![0x89], vec![0x88]]);
    let state = tuple(&[integer(3), text("<"), b"N".to_vec(), b"N".to_vec(), b"N".to_vec()]);
    let kind = [kind, state, b"b".to_vec()].concat();
    let latin1: String = value.iter().map(|byte| char::from(*byte)).collect();
    let value = call(global("_codecs", "encode"), &[text(&latin1), text("latin1")]);
    call(global("numpy._core.multiarray", "scalar"), &[kind, value])
}

#[test]
fn values_of_args_are_understood_or_refused() {
    let case = Case::new();
    let model = &case.config.generator;
    let load = |args: Vec<u8>, hints: Hints| {
        let root = |state: State| dict(&[("model_ema", dict(&state)), ("args", args)]);
        case.place.write("args.pth", stored(&case.archive(root)));
        case.load("args.pth", TOKENIZER, WeightSets::default(), &hints)
    };
    let heads = || Hints { heads: Some(model.heads), ..Hints::default() };
    let [window, steps] = [model.window, model.steps].map(|value| value as i64);
    let plain = || {
        [
            ("cond_length", integer(window)),
            ("vae_norm", float(model.vae_norm)),
            ("num_sampling_steps", text(&steps.to_string())),
        ]
    };
    let numpy = [
        ("cond_length", scalar("i8", window.to_le_bytes())),
        ("vae_norm", scalar("f8", model.vae_norm.to_le_bytes())),
        ("num_sampling_steps", scalar("i8", steps.to_le_bytes())),
    ];
    for args in [namespace(&plain()), dict(&plain()), namespace(&numpy)] {
        let loaded = load(args, heads());
        let origins: Vec<_> = loaded.as_ref().unwrap().inferred.iter().map(|value| value.origin).take(5).collect();
        assert_eq!(origins, [Origin::Flag, Origin::Args, Origin::Args, Origin::Args, Origin::Shapes]);
        case.same(loaded);
    }
    let bad = [
        ("cond_length", "window", float(2.5), "`args.cond_length` is 2.5"),
        ("cond_length", "window", integer(-1), "`args.cond_length` is -1"),
        ("vae_norm", "vae_norm", vec![0x88], "`args.vae_norm` is True"),
        ("vae_norm", "vae_norm", call(global("decimal", "Decimal"), &[text("1")]), "is an object of decimal.Decimal"),
        ("num_sampling_steps", "steps", text("ddim25"), "`args.num_sampling_steps` is \"ddim25\""),
    ];
    for (key, field, value, mentions) in bad {
        let with: Vec<_> =
            plain().into_iter().map(|(name, usual)| (name, if name == key { value.clone() } else { usual })).collect();
        let refused = load(namespace(&with), Hints { preset: Some(Preset::Small), ..heads() }).unwrap_err();
        assert_eq!((refused.field(), refused.exit_code()), (Some(field), 2), "{refused}");
        assert!(refused.to_string().contains(mentions), "{refused}");
        case.same(load(namespace(&with), case.hints()));
    }
    let other = [
        global("omegaconf.dictconfig", "DictConfig"),
        b")\x81".to_vec(),
        dict(&[("_content", dict(&plain()))]),
        b"b".to_vec(),
    ];
    let refused = load(other.concat(), heads()).unwrap_err().to_string();
    assert!(
        refused.contains("`args` is an object of omegaconf.dictconfig.DictConfig, which is not understood"),
        "{refused}"
    );
}

#[test]
fn random_states_beside_the_weights_are_passed_over() {
    let case = Case::new();
    let wide = [&[0x8a, 16][..], &[7; 16]].concat();
    let surrogate = b"X\x03\x00\x00\x00\xed\xa0\x80".to_vec();
    let root = |state: State| {
        let random = tuple(&[wide, surrogate, list(&vec![integer(1 << 40); 625])]);
        dict(&[("random", random), ("model_ema", dict(&state))])
    };
    case.same(case.with_generator("random.pth", stored(&case.archive(root))));
}

#[test]
fn presets_are_hints_and_the_shapes_decide() {
    let sizes = |preset: Preset, flow_dim: usize| {
        let mut config = preset.config();
        config.generator.flow_dim = flow_dim;
        let shapes = eqim::model::parameters(&config).unwrap().into_iter().collect();
        let stored = Hints { preset: Some(preset), ..Hints::default() };
        let (found, origins) = checkpoint::infer_generator(&shapes, &Hints::default(), &stored).unwrap();
        assert_eq!(found, config.generator, "{preset:?}");
        assert_eq!([origins[0].origin, origins[1].origin], [Origin::Args, Origin::Preset]);
    };
    assert_eq!(Preset::from_reference_name("tiny_model"), Some(Preset::Tiny));
    sizes(Preset::Tiny, 1536);
    sizes(Preset::Small, 1536);
    sizes(Preset::Large, 64);
}

#[test]
fn an_export_says_what_it_took_and_keeps_it() {
    let fixture = Fixture::open(fixtures());
    let place = Workplace::new(&fixture);
    let said = place.run(&format!("{} --no-validate -o bundle", export_line(&fixture))).succeeded().stdout;
    let described = said.split("writing").next().unwrap();
    insta::assert_snapshot!(described.trim_end());
    let text = String::from_utf8(place.read("bundle/config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["inferred"][0], json!({"name": "heads", "value": "2", "origin": "flag"}));
    // A bundle of an older version has no such list.
    config.as_object_mut().unwrap().remove("inferred");
    place.write("bundle/config.json", config.to_string());
    place.run("eqim-export inspect bundle").succeeded();
    // Both halves at once, as in older versions.
    place
        .run(&format!("{} --generator-weights raw --tokenizer-weights raw --no-validate -o raw", export_line(&fixture)))
        .succeeded();
    let read = |bundle: &str, name: &str| {
        values(&TensorFile::open(&place.path(bundle).join("model.safetensors")).unwrap().read(name).unwrap()).unwrap()
    };
    for name in ["z_proj.weight", "decoder.conv_in.weight"] {
        assert_ne!(read("raw", name), read("bundle", name), "{name}");
    }
}

#[test]
fn an_adapter_of_peft_is_merged_by_the_export() {
    let fixture = Fixture::open(fixtures());
    let place = Workplace::new(&fixture);
    place.write("adapter.safetensors", std::fs::read(file("training/tests/fixtures/adapter.safetensors")).unwrap());
    let line = format!("{} --adapter adapter.safetensors --adapter-scale 2 -o bundle", export_line(&fixture));
    place.run(&line).succeeded();
    let options = "--class 1 --seed 3 --tokens 6 --steps 4 --save-tokens tokens.safetensors";
    place.run(&format!("eqim-run --engine bundle {options} -o a.png")).succeeded();

    let hints = Hints { heads: Some(fixture.heads), ..Hints::default() };
    let (generator, tokenizer) = (fixture.folder.join("generator.pth"), fixture.folder.join("tokenizer.ckpt"));
    let (mut config, mut weights) = checkpoint::load(&generator, &tokenizer, WeightSet::Ema, &hints).unwrap();
    let tokens = |config: &Config, weights: &Weights| {
        let engine = CandleEngine::new(config.clone(), weights.clone());
        let request = Request { steps: 4, noise: Noise::Seed(3), ..Request::new(config, [Some(1)], 6) };
        to_tensor(generate(&engine, &request, |_| {}).unwrap().tokens.view()).unwrap()
    };
    let before = tokens(&config, &weights);
    checkpoint::adapter::merge(&place.path("adapter.safetensors"), 2.0, &mut config, &mut weights).unwrap();
    let expected = tokens(&config, &weights);
    let found = TensorFile::open(&place.path("tokens.safetensors")).unwrap().read("tokens").unwrap();
    let apart = |other: &Tensor| largest_difference(&values(&found).unwrap(), &values(other).unwrap());
    println!("{:e} from the merged model, {:e} from the generator", apart(&expected), apart(&before));
    assert!(apart(&expected) <= 1e-4 && apart(&before) > 1e-3);
    place.run(&line.replace("adapter.safetensors", "bundle/model.safetensors")).failed(2, &["is no low-rank adapter"]);
    place.run(&line.replace("scale 2", "scale nan")).failed(2, &["--adapter-scale"]);
}
