//! A file of weights in any format, and the state dicts in it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::Tensor;

use super::container::Container;
use super::names::{canonical, prefix};
use super::pickle::{Id, Pickle, Value};
use super::shards::Shards;
use super::torch::{Layout, TorchFile};
use crate::{Error, Result};

/// Longest prefix of names that is taken off, in bytes.
const LONGEST_PREFIX: usize = 200;
/// Depth of dictionaries in which state dicts are looked for.
const DEEPEST: usize = 4;

/// An open file of weights.
#[derive(Debug)]
pub enum Source {
    /// A checkpoint of `torch.save`.
    Torch(TorchFile),
    /// One or several `.safetensors` files.
    Tensors(Shards),
}

/// A tensor in a file.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Name without the prefix of the state dict and without wrappers.
    pub name: String,
    /// Name in the file.
    pub stored: String,
    /// Index in the pickle, if the file has one.
    id: Option<Id>,
}

/// A dictionary of tensors.
#[derive(Clone, Debug)]
pub struct StateDict {
    /// Keys that lead to it, joined by dots. Empty for the whole file.
    pub path: String,
    /// Its tensors in their order in the file.
    pub entries: Vec<Entry>,
    /// The dictionaries that contain it, the innermost first.
    pub parents: Vec<Id>,
}

impl StateDict {
    /// Whether the path says that the values are moving averages.
    pub fn is_average(&self) -> bool {
        let last = self.path.rsplit('.').next().unwrap_or_default().to_lowercase();
        last.split('_').any(|word| word == "ema")
    }

    /// The entries by name.
    ///
    /// # Errors
    /// [`Error::input`] if two entries have the same name without their wrappers.
    pub fn by_name(&self) -> Result<BTreeMap<&str, &Entry>> {
        let mut named: BTreeMap<&str, &Entry> = BTreeMap::new();
        for entry in &self.entries {
            if let Some(other) = named.insert(&entry.name, entry) {
                let problem = format!("is the same tensor as {}: remove one of them", other.stored);
                return Err(Error::input(format!("tensor {}", entry.stored), problem));
            }
        }
        Ok(named)
    }
}

/// A tensor with its place, type and shape, before its values are read.
#[derive(Clone, Debug)]
pub struct Located {
    stored: String,
    /// Sizes of the axes.
    pub shape: Vec<usize>,
    layout: Option<Layout>,
}

impl Source {
    /// Opens a file of weights and reads everything except the values of its tensors.
    ///
    /// # Errors
    /// [`Error::input`] if the file is truncated, or in another format, which the message names if it is known.
    pub fn open(path: &Path) -> Result<Self> {
        if Container::is_one(path)? {
            return TorchFile::open(path).map(Self::Torch);
        }
        Shards::open(path).map(Self::Tensors)
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Torch(file) => file.path(),
            Self::Tensors(shards) => shards.path(),
        }
    }

    /// An input error about this file.
    pub fn bad(&self, problem: impl std::fmt::Display) -> Error {
        Error::input(self.path().display(), problem)
    }

    /// All state dicts that have a tensor of the name `anchor`, which may have a prefix.
    pub fn state_dicts(&self, anchor: &str) -> Vec<StateDict> {
        match self {
            Self::Tensors(shards) => {
                let entries: Vec<(&str, Option<Id>)> = shards.names().map(|name| (name, None)).collect();
                split(&entries, "", &[], anchor)
            }
            Self::Torch(file) => {
                let (mut found, mut seen) = (vec![], BTreeSet::new());
                search(file.pickle(), file.root(), (&mut vec![], &mut vec![]), anchor, (&mut found, &mut seen));
                found
            }
        }
    }

    /// The dictionary under `key` at the root of a checkpoint of `torch.save`. `None` if there is no such key, or if its
    /// value is `None`.
    ///
    /// # Errors
    /// [`Error::input`] if the value is not a dictionary of tensors.
    pub fn root_dict(&self, key: &str) -> Result<Option<StateDict>> {
        let Self::Torch(file) = self else { return Ok(None) };
        let pickle = file.pickle();
        let Some(id) = pickle.item(file.root(), key).filter(|&id| !matches!(pickle.get(id), Value::None)) else {
            return Ok(None);
        };
        self.refuse_module(id, &format!("`{key}`"))?;
        let Some(entries) = pickle.entries(id) else {
            return Err(self.bad(format!("`{key}` is {}, expected a state dict", pickle.describe(id))));
        };
        let entries = texts(pickle, entries);
        Ok(Some(StateDict { path: key.into(), entries: plain(&entries), parents: vec![file.root()] }))
    }

    /// The tensors of the list under `key`, which are in the order of `model`. `None` if the value is not a list.
    ///
    /// # Errors
    /// [`Error::input`] if the list has another length than `model`.
    pub fn root_list(&self, key: &str, model: &str) -> Result<Option<StateDict>> {
        let Self::Torch(file) = self else { return Ok(None) };
        let pickle = file.pickle();
        let Some(list) = pickle.item(file.root(), key).and_then(|id| pickle.sequence(id)) else { return Ok(None) };
        let mut state =
            self.root_dict(model)?.unwrap_or(StateDict { path: key.into(), entries: vec![], parents: vec![] });
        if state.entries.len() != list.len() {
            let problem = format!(
                "`{key}` is a list of {} tensors and `{model}` names {}: the list has no names of its own",
                list.len(),
                state.entries.len()
            );
            return Err(self.bad(problem));
        }
        for (entry, &id) in state.entries.iter_mut().zip(list) {
            let shape = |of: Id| -> Result<Vec<usize>> { Ok(file.layout(&entry.stored, of)?.shape().to_vec()) };
            let (found, expected) = (shape(id)?, entry.id.map_or(Ok(vec![]), shape)?);
            if found != expected {
                let problem = format!("has shape {found:?} in the list `{key}` and {expected:?} in `{model}`");
                return Err(self.bad(format!("tensor {} {problem}", entry.stored)));
            }
            entry.id = Some(id);
        }
        Ok(Some(StateDict { path: key.into(), ..state }))
    }

    /// An error if the file is a whole module instead of its state dict.
    ///
    /// # Errors
    /// [`Error::input`] that says so.
    pub fn refuse_whole_module(&self) -> Result<()> {
        match self {
            Self::Torch(file) => self.refuse_module(file.root(), "it"),
            Self::Tensors(_) => Ok(()),
        }
    }

    fn refuse_module(&self, id: Id, subject: &str) -> Result<()> {
        let Self::Torch(file) = self else { return Ok(()) };
        match file.pickle().item(id, "_modules") {
            None => Ok(()),
            Some(_) => Err(self.bad(format!(
                "{subject} is a whole module ({}), which only its own code can load: save its state_dict()",
                file.pickle().describe(id)
            ))),
        }
    }

    /// The keys at the root of a checkpoint, or the first names of tensors, for messages.
    pub fn contents(&self) -> String {
        let names: Vec<&str> = match self {
            Self::Torch(file) => file.keys(),
            Self::Tensors(shards) => shards.names().collect(),
        };
        let shown = names.len().min(8);
        let more = if names.len() > shown { format!(" and {} more", names.len() - shown) } else { String::new() };
        format!("{}{more}", names[..shown].join(", "))
    }

    /// All tensors of `.safetensors` files under their names in the files.
    pub fn names(&self) -> Vec<Entry> {
        match self {
            Self::Torch(_) => vec![],
            Self::Tensors(shards) => {
                let entry = |name: &str| Entry { name: name.into(), stored: name.into(), id: None };
                shards.names().map(entry).collect()
            }
        }
    }

    /// Finds the place, type and shape of a tensor.
    ///
    /// # Errors
    /// [`Error::input`] naming the tensor, if it cannot be read.
    pub fn locate(&self, entry: &Entry) -> Result<Located> {
        let stored = entry.stored.clone();
        match (self, entry.id) {
            (Self::Torch(file), Some(id)) => {
                let layout = file.layout(&stored, id)?;
                Ok(Located { stored, shape: layout.shape().to_vec(), layout: Some(layout) })
            }
            (Self::Tensors(shards), _) => Ok(Located { shape: shards.shape(&stored)?, stored, layout: None }),
            (Self::Torch(file), None) => Err(file.bad(format!("tensor {stored} is missing"))),
        }
    }

    /// Reads the values of tensors. The name in the file may differ from the name that `each` receives.
    ///
    /// # Errors
    /// [`Error::input`] naming the tensor that cannot be read; errors of `each`.
    pub fn read(
        &mut self,
        wanted: BTreeMap<String, Located>,
        mut each: impl FnMut(String, &Tensor) -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::Torch(file) => {
                let layouts = wanted.into_iter().filter_map(|(name, located)| Some((name, located.layout?)));
                file.read(layouts.collect(), each)
            }
            Self::Tensors(shards) => {
                wanted.into_iter().try_for_each(|(name, located)| each(name, &shards.read(&located.stored)?))
            }
        }
    }
}

fn texts<'a>(pickle: &'a Pickle, entries: &[(Id, Id)]) -> Vec<(&'a str, Option<Id>)> {
    entries.iter().filter_map(|&(key, value)| Some((pickle.text(key)?, Some(value)))).collect()
}

/// The entries of a dictionary without a prefix.
fn plain(entries: &[(&str, Option<Id>)]) -> Vec<Entry> {
    let entry = |&(stored, id): &(&str, Option<Id>)| Entry { name: canonical(stored), stored: stored.into(), id };
    entries.iter().map(entry).collect()
}

/// Splits a dictionary into one state dict per prefix before `anchor`.
fn split(entries: &[(&str, Option<Id>)], path: &str, parents: &[Id], anchor: &str) -> Vec<StateDict> {
    let entries = plain(entries);
    let ends = entries.iter().filter_map(|entry| prefix(&entry.name, anchor));
    let mut states: BTreeMap<String, Vec<Entry>> =
        ends.filter(|prefix| prefix.len() <= LONGEST_PREFIX).map(|prefix| (prefix.to_string(), vec![])).collect();
    for entry in &entries {
        let bytes = &entry.name.as_bytes()[..entry.name.len().min(LONGEST_PREFIX)];
        let dots = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'.');
        let starts = [0].into_iter().chain(dots.map(|(at, _)| at + 1));
        // The longest prefix that a name has is its own.
        let Some(start) = starts.rev().find(|&start| states.contains_key(&entry.name[..start])) else { continue };
        if let Some(state) = states.get_mut(&entry.name[..start]) {
            state.push(Entry { name: entry.name[start..].into(), ..entry.clone() });
        }
    }
    let joined = |prefix: &str| {
        let parts = [path, prefix.trim_end_matches('.')];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(".")
    };
    let state =
        |(prefix, entries): (String, _)| StateDict { path: joined(&prefix), entries, parents: parents.to_vec() };
    states.into_iter().map(state).collect()
}

/// Looks for state dicts in the dictionary at `id` and in those inside of it. Each dictionary is looked at once.
fn search(
    pickle: &Pickle,
    id: Id,
    (path, parents): (&mut Vec<String>, &mut Vec<Id>),
    anchor: &str,
    (found, seen): (&mut Vec<StateDict>, &mut BTreeSet<Id>),
) {
    // Objects can share the dictionary of their attributes.
    let attributes = pickle.state(id).unwrap_or(id);
    let Some(entries) = pickle.entries(id).filter(|_| path.len() <= DEEPEST && seen.insert(attributes)) else { return };
    let outer: Vec<Id> = [id].into_iter().chain(parents.iter().rev().copied()).collect();
    found.extend(split(&texts(pickle, entries), &path.join("."), &outer, anchor));
    parents.push(id);
    for &(key, value) in entries {
        let Some(key) = pickle.text(key) else { continue };
        path.push(key.to_string());
        search(pickle, value, (path, parents), anchor, (found, seen));
        path.pop();
    }
    parents.pop();
}
