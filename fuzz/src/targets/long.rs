//! The folder of an unfinished long image.

use std::path::{Path, PathBuf};

use eqim::digest::Hash;
use eqim::generate::tiles::Tiling;
use eqim::long::{Layout, Record, Sink, Verified, Work};
use eqim::picture::Side;
use eqim::request::settings::Settings;
use eqim::{Error, Result, ResultExt};
use ndarray::{Array1, Array3};

use super::{Place, write};
use crate::small;
use crate::target::{Hostile, Target};

/// Files of the folder.
const FILES: [&str; 4] = ["run.json", "tokens.f32", "tiles.jsonl", "pixels.rgb"];

/// Goes on from the folder of an unfinished image. An input is the files of the folder, each after its length.
pub(super) struct Unfinished {
    place: Place,
    path: PathBuf,
    seeds: Vec<Vec<u8>>,
}

impl Unfinished {
    pub(super) fn new() -> Result<Self> {
        let place = Place::new()?;
        let path = place.path("image.png");
        let mut target = Self { place, path, seeds: vec![] };
        // One seed for every number of tiles, so that each prefix of the work is known.
        target.seeds.push(target.packed()?);
        for tile in 0..layout().count() {
            target.go_on(tile)?;
            target.seeds.push(target.packed()?);
        }
        target.seeds.reverse();
        Ok(target)
    }

    fn folder(&self) -> PathBuf {
        self.place.path("image.png.partial")
    }

    fn open(&self) -> Result<Work> {
        Work::open(&self.path, record(), layout(), small::config().generator.embed)
    }

    /// Adds a tile to the work.
    fn go_on(&self, tile: usize) -> Result<()> {
        let (layout, mut work) = (layout(), self.open()?);
        let mut sink = Sink::open(&self.path, work.folder(), layout.size)?;
        work.verify(|tile, hash| Ok(sink.hash(&layout.columns(tile))?.as_deref() == Some(hash)))?;
        let columns = layout.columns(tile);
        let value = |index: usize| (index as f32 * 0.37 + tile as f32).sin();
        let pixels = Array3::from_shape_fn((3, layout.size.1, columns.len()), |(c, y, x)| value(c + 3 * y + 7 * x));
        sink.write(columns.start, pixels.view())?;
        let end = layout.tiling.end(tile, layout.tokens);
        let tokens: Vec<Array1<f32>> =
            (work.known()..end).map(|token| Array1::from_shape_fn(2, |axis| value(2 * token + axis))).collect();
        let hash = sink.hash(&columns)?.ok_or_else(|| Error::run("the fuzz target", "lost its pixels"))?;
        work.append(tile, &tokens, hash)
    }

    /// The files of the folder as an input.
    fn packed(&self) -> Result<Vec<u8>> {
        drop(self.open()?);
        let mut input = vec![];
        for name in FILES {
            let bytes = std::fs::read(self.folder().join(name)).unwrap_or_default();
            input.extend((bytes.len() as u32).to_le_bytes());
            input.extend(bytes);
        }
        Ok(input)
    }

    /// Writes the files of an input. What its lengths leave out is the last file.
    fn unpack(&self, mut input: &[u8]) -> Result<()> {
        let folder = self.folder();
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).or_run(folder.display()),
            _ => std::fs::create_dir(&folder).or_run(folder.display())?,
        }
        for name in FILES {
            let Some((length, rest)) = input.split_first_chunk() else { break };
            let length = (u32::from_le_bytes(*length) as usize).min(rest.len());
            write(&folder.join(name), &rest[..length])?;
            input = &rest[length..];
        }
        Ok(())
    }
}

/// An image of three tiles.
fn layout() -> Layout {
    let tiling = Tiling { tile: 8, overlap: 2 };
    Layout { tiling, tokens: 20, size: (20, 4), token_width: 1, side: Side::Left }
}

fn record() -> Record {
    let [backend, weights, given] = ["candle", "weights", "given"].map(String::from);
    Record { settings: Settings::default(), backend, threads: None, weights, given }
}

impl Target for Unfinished {
    fn name(&self) -> &'static str {
        "unfinished-image"
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        self.seeds.clone()
    }

    fn hostile(&self) -> Vec<Hostile> {
        let without = |lost: usize| {
            let _ = self.unpack(&self.seeds[0]);
            let _ = std::fs::remove_file(self.folder().join(FILES[lost]));
            self.packed().unwrap_or_default()
        };
        vec![("no tokens", without(1)), ("no journal", without(2)), ("no pixels", without(3))]
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn read(&mut self, input: &[u8]) -> Result<String> {
        self.unpack(input)?;
        let (layout, mut work) = (layout(), self.open()?);
        let mut sink = Sink::open(&self.path, work.folder(), layout.size)?;
        let Verified { tiles, .. } =
            work.verify(|tile, hash| Ok(sink.hash(&layout.columns(tile))?.as_deref() == Some(hash)))?;
        let mut hash = Hash::default();
        hash.add_values(&work.read(0)?);
        for tile in 0..tiles {
            hash.add(sink.hash(&layout.columns(tile))?.unwrap_or_default());
        }
        Ok(format!("{tiles} tiles {}", hash.hex()))
    }

    fn is_sealed(&self) -> bool {
        true
    }
}
