//! Checkpoints: pickles, archives, streams and `.safetensors` files.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use eqim::checkpoint::tensors::{self, TensorFile};
use eqim::checkpoint::{self, Hints, StoredConfig, WeightSets};
use eqim::{Config, Result};

use super::{Place, write};
use crate::small::{self, Checkpoint, Half};
use crate::target::{Hostile, Target};
use crate::torch;

/// Settings that the tensors of the small model do not contain.
fn hints() -> Hints {
    let g = small::config().generator;
    Hints { preset: None, heads: Some(g.heads), window: None, vae_norm: None, steps: Some(g.steps) }
}

/// All targets with checkpoints.
pub(super) fn all() -> Result<Vec<Box<dyn Target>>> {
    let [generator, tokenizer] = [Half::Generator, Half::Tokenizer].map(Checkpoint::of);
    let (generator, tokenizer, shared) = (generator?, tokenizer?, Checkpoint::shared(Half::Generator)?);
    let pickled = |checkpoint: &Checkpoint| [b"\x80\x02", &checkpoint.pickle[..], b"."].concat();
    let pickle = |name, half, seeds: &[&Checkpoint], hostile| {
        let storages = seeds[0].storages.clone();
        let seeds = seeds.iter().map(|seed| pickled(seed)).collect();
        Model::new(name, half, Form::Pickle(storages), seeds, hostile)
    };
    let archives =
        [torch::stored(&generator.files()), torch::deflated(&shared.files()), torch::stored(&shared.files())];
    let streams = vec![torch::stream(&generator.pickle, &generator.storages)];
    Ok(vec![
        Box::new(pickle("generator-pickle", Half::Generator, &[&generator], pickles as fn() -> Vec<Hostile>)?),
        Box::new(pickle("tokenizer-pickle", Half::Tokenizer, &[&tokenizer], Vec::new)?),
        Box::new(Model::new("archive", Half::Generator, Form::Archive, archives.into(), flipped)?),
        Box::new(Model::new("stream", Half::Generator, Form::File, streams, Vec::new)?),
        Box::new(Model::new("safetensors", Half::Generator, Form::File, safetensors()?, headers)?),
        Box::new(Tokens::new()?),
    ])
}

/// What an input is.
enum Form {
    /// The pickle of an archive with these storages and correct CRCs.
    Pickle(Vec<Vec<u8>>),
    /// An archive, whose CRCs protect the weights.
    Archive,
    /// A whole file.
    File,
}

/// Loads a model from one half of it and the other half of the small model.
struct Model {
    name: &'static str,
    half: Half,
    form: Form,
    seeds: Vec<Vec<u8>>,
    hostile: fn() -> Vec<Hostile>,
    _place: Place,
    path: PathBuf,
    other: PathBuf,
}

impl Model {
    fn new(
        name: &'static str,
        half: Half,
        form: Form,
        seeds: Vec<Vec<u8>>,
        hostile: fn() -> Vec<Hostile>,
    ) -> Result<Self> {
        let place = Place::new()?;
        let (path, other) = (place.path("weights"), place.path("tokenizer.safetensors"));
        let stored = StoredConfig { generator: None, tokenizer: Some(small::config().tokenizer) };
        let tensors = Half::Tokenizer.tensors()?;
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (&name[..], tensor.clone())).collect();
        checkpoint::write(&other, &stored, &tensors)?;
        Ok(Self { name, half, form, seeds, hostile, _place: place, path, other })
    }
}

impl Target for Model {
    fn name(&self) -> &'static str {
        self.name
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        self.seeds.clone()
    }

    fn hostile(&self) -> Vec<Hostile> {
        (self.hostile)()
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn read(&mut self, input: &[u8]) -> Result<String> {
        match &self.form {
            Form::Pickle(storages) => {
                let mut files = torch::checkpoint(&[], storages);
                files[0].1 = input.to_vec();
                write(&self.path, &torch::stored(&files))?;
            }
            Form::Archive | Form::File => write(&self.path, input)?,
        }
        match self.half {
            Half::Generator => {
                let (config, weights) = checkpoint::load(&self.path, &self.other, WeightSets::default(), &hints())?;
                // The class names of the small model are not in its checkpoints.
                small::identity(&config, &weights)
            }
            Half::Tokenizer => {
                let (config, weights) = checkpoint::load_tokenizer_alone(&self.path, None)?;
                small::identity(&config, &weights)
            }
        }
    }

    fn is_sealed(&self) -> bool {
        matches!(self.form, Form::Archive)
    }
}

/// Pickles that grow, that contain themselves, or that describe tensors without their values.
fn pickles() -> Vec<Hostile> {
    const MANY: usize = 64 << 20;
    let with = |pickle: &[u8]| [b"\x80\x02", pickle, b"."].concat();
    let repeated = |instruction: &[u8]| with(&instruction.repeat(MANY / instruction.len()));
    let tensor = |shape: &[usize], stride: &[usize]| {
        let place = torch::storage("FloatStorage", "0", "cpu", 1 << 40);
        with(&torch::dict(&[("model", torch::dict(&[("z_proj.weight", torch::tensor(place, 0, shape, stride))]))]))
    };
    // A list that is its own only element.
    let own = with(b"]q\0h\0a");
    // Each list holds the one before twice: 2^60 paths.
    let doubled: Vec<u8> =
        (1..60u8).flat_map(|level| [b']', b'h', level - 1, b'a', b'h', level - 1, b'a', b'q', level]).collect();
    vec![
        ("64 MB of NONE", repeated(b"N")),
        ("64 MB of EMPTY_TUPLE", repeated(b")")),
        ("64 MB of MEMOIZE", with(&[b"N".to_vec(), vec![0x94; MANY]].concat())),
        ("64 MB of MARK", repeated(b"(")),
        ("64 MB of one text", with(&torch::text(&"x".repeat(MANY)))),
        ("a list in itself", own),
        ("lists in lists", with(&[b"]q\0".to_vec(), doubled].concat())),
        ("a million lists, each in the next", with(&[b"]".repeat(1 << 20), b"a".repeat((1 << 20) - 1)].concat())),
        ("a tensor of many axes", tensor(&[1; 10_000], &[0; 10_000])),
        ("a tensor of 2^60 values", tensor(&[1 << 30, 1 << 30], &[0, 0])),
        ("a tensor whose size overflows", tensor(&[usize::MAX >> 1, 8], &[1, 1])),
        ("a tensor whose stride overflows", tensor(&[8, 2], &[usize::MAX >> 1, 1])),
    ]
}

/// Archives of which one bit of a weight is another.
fn flipped() -> Vec<Hostile> {
    let Ok(checkpoint) = Checkpoint::of(Half::Generator) else { return vec![] };
    let whole = torch::stored(&checkpoint.files());
    let Some(storage) = checkpoint.storages.iter().max_by_key(|bytes| bytes.len()) else { return vec![] };
    let at = whole.windows(storage.len()).position(|window| window == storage).unwrap_or_default();
    let flip = |byte: usize| {
        let mut bytes = whole.clone();
        bytes[at + byte] ^= 1;
        bytes
    };
    vec![
        ("a bit of the first weight", flip(0)),
        ("a bit of the last weight", flip(storage.len() - 1)),
        ("half of the file", whole[..whole.len() / 2].to_vec()),
    ]
}

/// `.safetensors` files with both halves, and with the generator alone.
fn safetensors() -> Result<Vec<Vec<u8>>> {
    let place = Place::new()?;
    let path = place.path("model.safetensors");
    let tensors = Half::Generator.tensors()?;
    let tensors: Vec<(&str, Tensor)> = tensors.iter().map(|(name, tensor)| (&name[..], tensor.clone())).collect();
    let Config { generator, .. } = small::config();
    checkpoint::write(&path, &StoredConfig { generator: Some(generator), tokenizer: None }, &tensors)?;
    let ours = eqim::files::read(&path)?;
    Ok(vec![ours])
}

/// Headers that are large, or whose length is that of another format.
fn headers() -> Vec<Hostile> {
    let file = |header: &str, padded: usize| {
        let mut header = header.as_bytes().to_vec();
        header.resize(header.len().max(padded), b' ');
        [&(header.len() as u64).to_le_bytes()[..], &header, &[0; 8]].concat()
    };
    let one = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let many: Vec<String> =
        (0..1_700_000).map(|i| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#)).collect();
    vec![
        ("a header of 0x280 bytes", file(one, 0x280)),
        ("a header of 0x10380 bytes", file(one, 0x10380)),
        ("1.7 million tensors", file(&format!("{{{}}}", many.join(",")), 0)),
        ("a header without an end", [&u64::MAX.to_le_bytes()[..], one.as_bytes()].concat()),
        ("nested lists", file(&"[".repeat(1 << 20), 0)),
    ]
}

/// Reads all tensors of a `.safetensors` file.
struct Tokens {
    _place: Place,
    path: PathBuf,
    seed: Vec<u8>,
}

impl Tokens {
    fn new() -> Result<Self> {
        let place = Place::new()?;
        let path = place.path("tokens.safetensors");
        let tensors = Half::Generator.tensors()?;
        let tensors: Vec<(&str, Tensor)> =
            tensors.iter().take(3).map(|(name, tensor)| (&name[..], tensor.clone())).collect();
        tensors::write(&path, &tensors, HashMap::from([("eqim".into(), "text".into())]))?;
        let seed = eqim::files::read(&path)?;
        Ok(Self { _place: place, path, seed })
    }
}

impl Target for Tokens {
    fn name(&self) -> &'static str {
        "tensors"
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        vec![self.seed.clone()]
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn read(&mut self, input: &[u8]) -> Result<String> {
        write(&self.path, input)?;
        let mut file = TensorFile::open(&self.path)?;
        for name in file.tensors().into_keys().collect::<Vec<_>>() {
            file.read(&name)?;
        }
        Ok(String::new())
    }
}
