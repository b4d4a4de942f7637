//! Recipes, shards of photographs, and states of unfinished trainings.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use candle_core::Device;
use eqim::digest::Hash;
use eqim::{Result, ResultExt, files, limits};
use eqim_training::photos::Photos;
use eqim_training::ranks::Ranks;
use eqim_training::recipe::{Base, Recipe};
use eqim_training::run::{Output, Task, run};
use eqim_training::shards::photographs;
use eqim_training::tokenizer::{Networks, TokenizerTask, check_memory};
use image::{Rgb, RgbImage};
use tar::{Builder, Header};

use super::{Place, write};
use crate::target::{Hostile, Target};

/// A tokenizer of one step.
const RECIPE: &str = r#"
[tokenizer.model]
rows = 8
embed = 4
groups = 2
[tokenizer.model.encoder]
z_channels = 2
conv_in = 4
levels = [{ channels = 4, attention = false }, { channels = 4, attention = false }, { channels = 4, attention = false }]
[tokenizer.model.decoder]
z_channels = 2
conv_in = 4
levels = [{ channels = 4, attention = false }, { channels = 4, attention = false }, { channels = 4, attention = false }]
[tokenizer.plan]
steps = 1
batch_size = 1
tokens = 4
validation = 1
log_every = 1
checkpoint_every = 1
sample_every = 1
"#;

/// All targets with trainings.
pub(super) fn all() -> Result<Vec<Box<dyn Target>>> {
    let place = Place::new()?;
    let path = place.path("recipe.toml");
    let shards = Place::new()?;
    let shard = shards.path("shard.tar");
    Ok(vec![
        Box::new(Recipes { _place: place, path }),
        Box::new(Shards { _place: shards, path: shard }),
        Box::new(State::new()?),
    ])
}

/// Reads a recipe.
struct Recipes {
    _place: Place,
    path: PathBuf,
}

impl Target for Recipes {
    fn name(&self) -> &'static str {
        "recipes"
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        let whole = Recipe::new(Base::Demo).text().unwrap_or_default();
        vec![RECIPE.into(), whole.into_bytes()]
    }

    fn hostile(&self) -> Vec<Hostile> {
        let with = |from: &str, to: &str| RECIPE.replacen(from, to, 1).into_bytes();
        vec![
            ("a level of 65536 channels", with("channels = 4", "channels = 65536")),
            ("a batch of 2^62", with("batch_size = 1", "batch_size = 4611686018427387904")),
            ("2^62 tokens", with("tokens = 4", "tokens = 4611686018427387904")),
            ("nested lists", [b"a = ".to_vec(), b"[".repeat(1 << 16)].concat()),
        ]
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn read(&mut self, input: &[u8]) -> Result<String> {
        write(&self.path, input)?;
        let recipe = Recipe::read(Base::Demo, &self.path)?;
        check_memory(&recipe.tokenizer, limits::memory()).map_err(|error| error.about(self.path.display()))?;
        Ok(String::new())
    }
}

/// Reads the members of a shard.
struct Shards {
    _place: Place,
    path: PathBuf,
}

/// A shard of members with these names and contents, whose first header says another length if one is given.
fn shard(members: &[(&str, &[u8])], length: Option<u64>) -> Vec<u8> {
    let mut builder = Builder::new(vec![]);
    for (index, (name, contents)) in members.iter().enumerate() {
        let mut header = Header::new_gnu();
        header.set_size(length.filter(|_| index == 0).unwrap_or(contents.len() as u64));
        // Writing to memory does not fail.
        let _ = builder.append_data(&mut header, name, *contents);
    }
    builder.into_inner().unwrap_or_default()
}

impl Target for Shards {
    fn name(&self) -> &'static str {
        "shards"
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        let long = format!("{}/3.png", "x".repeat(120));
        let named: [(&str, &[u8]); 3] = [("a/1.jpg", &[1; 700]), ("b/2.jpg", b"2"), (&long, b"3")];
        let numbered: [(&str, &[u8]); 4] = [("1.jpg", &[1; 700]), ("1.cls", b"7"), ("2.png", b"2"), ("2.cls", b"0\n")];
        vec![shard(&named, None), shard(&numbered, None)]
    }

    fn hostile(&self) -> Vec<Hostile> {
        let picture: [(&str, &[u8]); 1] = [("1.jpg", b"1")];
        let class: [(&str, &[u8]); 2] = [("1.cls", &[b'9'; 600]), ("1.jpg", b"1")];
        vec![
            ("a member of 2^62 bytes", shard(&picture, Some(1 << 62))),
            ("a member of 2^64-1 bytes", shard(&picture, Some(u64::MAX))),
            ("a class of 600 digits", shard(&class, None)),
        ]
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn read(&mut self, input: &[u8]) -> Result<String> {
        write(&self.path, input)?;
        let found = photographs(std::slice::from_ref(&self.path), &mut vec![])?;
        let read = found.iter().map(|shown| Ok(format!("{:?} {:?}", shown.label, shown.member.contents(&shown.path)?)));
        Ok(read.collect::<Result<Vec<_>>>()?.join("\n"))
    }
}

/// Resumes the training of a tokenizer.
struct State {
    _place: Place,
    output: Output,
    path: PathBuf,
    task: TokenizerTask,
    seed: Vec<u8>,
}

impl State {
    fn new() -> Result<Self> {
        let place = Place::new()?;
        let photos = place.path("photos");
        std::fs::create_dir(&photos).or_run(photos.display())?;
        for index in 0..2u8 {
            let picture = RgbImage::from_fn(48, 40, |x, y| Rgb([x as u8 * 4, y as u8 * 5, 90 * index]));
            let path = photos.join(format!("{index}.png"));
            picture.save(&path).or_run(path.display())?;
        }
        let recipe = place.path("recipe.toml");
        write(&recipe, RECIPE.as_bytes())?;
        let recipe = Recipe::read(Base::Demo, &recipe)?.tokenizer;
        let (height, width) = (recipe.model.image_height(), recipe.model.token_width() * recipe.plan.tokens);
        let photos = Photos::open(&photos, height, width)?;
        let folder = place.path("run");
        let ranks = Rc::new(Ranks::alone());
        let output = Output::open(&folder, true, &ranks)?;
        let networks = Networks::default();
        let mut task = TokenizerTask::new(recipe, photos, None, networks, Device::Cpu, ranks)?;
        run(&mut task, &output, 0)?;
        let path = folder.join("state.safetensors");
        let seed = files::read(&path)?;
        Ok(Self { _place: place, output, path, task, seed })
    }
}

impl Target for State {
    fn name(&self) -> &'static str {
        "training-state"
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        vec![self.seed.clone()]
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn read(&mut self, input: &[u8]) -> Result<String> {
        write(&self.path, input)?;
        let steps = self.output.resume(&mut self.task)?;
        let mut hash = Hash::default();
        for (name, tensor) in self.task.state() {
            hash.add(name);
            hash.add_values(&eqim::close::values(&tensor)?);
        }
        Ok(format!("{steps} steps {}", hash.hex()))
    }

    fn is_sealed(&self) -> bool {
        true
    }
}
