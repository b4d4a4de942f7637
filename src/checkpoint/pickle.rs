//! Reads the part of Python's pickle format that `torch.save` writes, without running any code of the pickle.
//!
//! Candle's reader is not used. It accepts only archives whose pickle is a dictionary of tensors. It also copies the
//! values that a pickle refers to, so a small hostile file can fill the memory.
//!
//! All values are stored in one arena and refer to each other by index. A hostile file can therefore neither expand
//! through shared values nor overflow the stack through nested ones.

use std::collections::HashMap;

use crate::{Error, Result};

/// Index of a value in a [`Pickle`].
pub type Id = usize;

/// One unpickled value.
#[derive(Clone, Debug)]
pub enum Value {
    /// `None`.
    None,
    /// A Boolean.
    Bool(bool),
    /// An integer of up to 64 bits.
    Int(i64),
    /// A floating-point number.
    Float(f64),
    /// Text, or bytes as Latin-1.
    Text(String),
    /// A tuple, list or set.
    Sequence(Vec<Id>),
    /// A dictionary.
    Dict(Vec<(Id, Id)>),
    /// A global name, `module.name`.
    Global(String),
    /// An object: the call of a global with arguments. The call is recorded, not run.
    Object {
        /// The global that is called.
        class: Id,
        /// Arguments of the call.
        arguments: Id,
        /// Argument of `__setstate__`, if there is one.
        state: Option<Id>,
    },
    /// A reference to data outside of the pickle. In PyTorch's files, this is the storage of a tensor.
    Persistent(Id),
    /// A value that is not stored, such as an integer of more than 64 bits or text with lone surrogates.
    Opaque(&'static str),
}

/// Most instructions of a pickle. Every value takes at least one, so this limits the memory of a hostile pickle. The
/// largest published checkpoint has a quarter of a million, with its optimizer.
const MOST_INSTRUCTIONS: usize = 4_000_000;

/// All values of a pickle.
#[derive(Debug, Default)]
pub struct Pickle {
    values: Vec<Value>,
}

impl Pickle {
    /// The value at `id`.
    pub fn get(&self, id: Id) -> &Value {
        &self.values[id]
    }

    /// All values.
    pub fn values(&self) -> impl Iterator<Item = &Value> {
        self.values.iter()
    }

    /// The text at `id`.
    pub fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The integer at `id`.
    pub fn int(&self, id: Id) -> Option<i64> {
        match self.get(id) {
            Value::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// The number at `id`, which may be written as text (as the reference's `num_sampling_steps` is).
    pub fn number(&self, id: Id) -> Option<f64> {
        match self.get(id) {
            Value::Int(value) => Some(*value as f64),
            Value::Float(value) => Some(*value),
            Value::Text(text) => text.trim().parse().ok(),
            _ => None,
        }
    }

    /// The global name at `id`.
    pub fn global(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Global(name) => Some(name),
            _ => None,
        }
    }

    /// Bytes at `id`: stored as such, or as text that Python encodes as Latin-1 (protocol 2 has no bytes).
    pub fn bytes(&self, id: Id) -> Option<Vec<u8>> {
        let text = match self.call(id) {
            Some(("_codecs.encode", arguments)) => *self.sequence(arguments)?.first()?,
            Some(_) => return None,
            None => id,
        };
        self.text(text)?.chars().map(|char| u8::try_from(u32::from(char)).ok()).collect()
    }

    /// What the value at `id` is, for messages.
    pub fn describe(&self, id: Id) -> String {
        match self.get(id) {
            Value::None => "None".into(),
            Value::Bool(value) => if *value { "True" } else { "False" }.into(),
            Value::Int(value) => value.to_string(),
            Value::Float(value) => value.to_string(),
            Value::Text(text) => format!("{:?}", text.chars().take(40).collect::<String>()),
            Value::Sequence(items) => format!("a list of {} values", items.len()),
            Value::Dict(entries) => format!("a dictionary of {} entries", entries.len()),
            Value::Global(name) => name.clone(),
            Value::Object { class, .. } => match self.get(*class) {
                Value::Global(name) => format!("an object of {name}"),
                _ => "an object".into(),
            },
            Value::Persistent(_) => "a storage".into(),
            Value::Opaque(what) => (*what).into(),
        }
    }

    /// The Boolean at `id`.
    pub fn boolean(&self, id: Id) -> Option<bool> {
        match self.get(id) {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// The tuple of sizes at `id`. A `torch.Size` is pickled as a call with a tuple.
    pub fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        let items = match self.call(id) {
            Some(("torch.Size", arguments)) => *self.sequence(arguments)?.first()?,
            _ => id,
        };
        self.sequence(items)?.iter().map(|&id| usize::try_from(self.int(id)?).ok()).collect()
    }

    /// The argument of `__setstate__` of the object at `id`.
    pub fn state(&self, id: Id) -> Option<Id> {
        match self.get(id) {
            Value::Object { state, .. } => *state,
            _ => None,
        }
    }

    /// The elements of the tuple, list or set at `id`.
    pub fn sequence(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Value::Sequence(items) => Some(items),
            _ => None,
        }
    }

    /// The entries of the dictionary at `id`, or the attributes of an object such as `argparse.Namespace`.
    pub fn entries(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Value::Dict(entries) => Some(entries),
            Value::Object { state: Some(state), .. } => match self.get(*state) {
                Value::Dict(entries) => Some(entries),
                _ => None,
            },
            _ => None,
        }
    }

    /// The value of a text key in the dictionary or object at `id`.
    pub fn item(&self, id: Id, key: &str) -> Option<Id> {
        self.entries(id)?.iter().find(|(name, _)| self.text(*name) == Some(key)).map(|(_, value)| *value)
    }

    /// The name of the global whose call gives the object at `id`, and the arguments of the call.
    pub fn call(&self, id: Id) -> Option<(&str, Id)> {
        match self.get(id) {
            Value::Object { class, arguments, .. } => Some((self.global(*class)?, *arguments)),
            _ => None,
        }
    }
}

/// Reads the pickle at the start of `bytes`. Returns its values, the index of the root, and the length of the pickle.
///
/// # Errors
/// [`Error::input`] naming the position of the instruction that cannot be read.
pub fn read(bytes: &[u8]) -> Result<(Pickle, Id, usize)> {
    let mut machine =
        Machine { bytes, at: 0, pickle: Pickle::default(), stack: vec![], marks: vec![], memo: HashMap::new() };
    for _ in 0..MOST_INSTRUCTIONS {
        let at = machine.at;
        match machine.instruction() {
            Ok(None) => {}
            Ok(Some(root)) => return Ok((machine.pickle, root, machine.at)),
            Err(problem) => return Err(Error::input(format!("pickle, byte {at}"), problem)),
        }
    }
    Err(Error::input("pickle", format!("has more than {MOST_INSTRUCTIONS} instructions")))
}

/// The virtual machine of the pickle format. Python's `pickletools.py` documents its instructions.
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    pickle: Pickle,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

type Step<T> = Result<T, String>;

impl Machine<'_> {
    fn take(&mut self, length: usize) -> Step<&[u8]> {
        let end = self.at.checked_add(length).filter(|end| *end <= self.bytes.len()).ok_or("it ends too early")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn unsigned(&mut self, length: usize) -> Step<u64> {
        Ok(self.take(length)?.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    /// A two's complement integer of up to 8 bytes.
    fn signed(&mut self, length: usize) -> Step<i64> {
        let unused = 64 - 8 * length as u32;
        Ok(if length == 0 { 0 } else { (self.unsigned(length)? << unused) as i64 >> unused })
    }

    /// A two's complement integer of any length. Random states hold integers of 128 bits and more; none is needed.
    fn long(&mut self, length: u64) -> Step<()> {
        match length {
            0..=8 => self.integer(|machine| machine.signed(length as usize)),
            _ => {
                self.take(length as usize)?;
                self.push(Value::Opaque("an integer of more than 64 bits"));
                Ok(())
            }
        }
    }

    fn line(&mut self) -> Step<String> {
        let length = self.bytes[self.at..].iter().position(|byte| *byte == b'\n').ok_or("a line without end")?;
        let line = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.at += 1;
        Ok(line)
    }

    fn text(&mut self, length: u64) -> Step<()> {
        // Python writes lone surrogates as they are, which is not UTF-8.
        let text = std::str::from_utf8(self.take(length as usize)?).map(str::to_string);
        self.push(text.map_or(Value::Opaque("text that is not Unicode"), Value::Text));
        Ok(())
    }

    fn latin1(&mut self, length: u64) -> Step<()> {
        let text = self.take(length as usize)?.iter().map(|byte| char::from(*byte)).collect();
        self.push(Value::Text(text));
        Ok(())
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.pickle.values.len());
        self.pickle.values.push(value);
    }

    fn pop(&mut self) -> Step<Id> {
        if self.marks.last().is_some_and(|mark| *mark >= self.stack.len()) {
            return Err("a mark is in the place of a value".into());
        }
        self.stack.pop().ok_or_else(|| "a value is missing".into())
    }

    fn top(&self) -> Step<Id> {
        self.stack.last().copied().ok_or_else(|| "a value is missing".into())
    }

    fn pop_to_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().filter(|mark| *mark <= self.stack.len()).ok_or("a mark is missing")?;
        Ok(self.stack.split_off(mark))
    }

    fn tuple(&mut self, length: usize) -> Step<()> {
        let start = self.stack.len().checked_sub(length).ok_or("a value is missing")?;
        let items = self.stack.split_off(start);
        self.push(Value::Sequence(items));
        Ok(())
    }

    fn append(&mut self, items: Vec<Id>) -> Step<()> {
        let list = self.top()?;
        match &mut self.pickle.values[list] {
            Value::Sequence(list) => list.extend(items),
            // A subclass of list.
            object @ Value::Object { .. } => *object = Value::Sequence(items),
            _ => return Err("elements for something that is not a list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Step<()> {
        let dict = self.top()?;
        let (pairs, []) = items.as_chunks::<2>() else { return Err("a key without value".into()) };
        let pairs = pairs.iter().map(|[key, value]| (*key, *value));
        match &mut self.pickle.values[dict] {
            Value::Dict(entries) => entries.extend(pairs),
            // A subclass of dict.
            object @ Value::Object { .. } => *object = Value::Dict(pairs.collect()),
            _ => return Err("entries for something that is not a dictionary".into()),
        }
        Ok(())
    }

    fn call(&mut self) -> Step<()> {
        let arguments = self.pop()?;
        let class = self.pop()?;
        let dict = self.pickle.global(class) == Some("collections.OrderedDict");
        self.push(if dict { Value::Dict(vec![]) } else { Value::Object { class, arguments, state: None } });
        Ok(())
    }

    fn build(&mut self) -> Step<()> {
        let new = self.pop()?;
        let object = self.top()?;
        if let Value::Object { state, .. } = &mut self.pickle.values[object] {
            *state = Some(new);
        }
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) {
        self.push(Value::Global(format!("{module}.{name}")));
    }

    fn memoize(&mut self, key: u64) -> Step<()> {
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Step<()> {
        self.stack.push(*self.memo.get(&key).ok_or_else(|| format!("memo entry {key} does not exist"))?);
        Ok(())
    }

    /// Runs one instruction. Returns the root after the last one.
    fn instruction(&mut self) -> Step<Option<Id>> {
        match self.take(1)?[0] {
            b'.' => return Ok(Some(self.pop()?)),
            0x80 => drop(self.take(1)?),                                        // PROTO
            0x95 => drop(self.take(8)?),                                        // FRAME
            b'(' => self.marks.push(self.stack.len()),                          // MARK
            b'0' => drop(self.pop()?),                                          // POP
            b'1' => drop(self.pop_to_mark()?),                                  // POP_MARK
            b'2' => self.stack.push(self.top()?),                               // DUP
            b'N' => self.push(Value::None),                                     // NONE
            0x88 => self.push(Value::Bool(true)),                               // NEWTRUE
            0x89 => self.push(Value::Bool(false)),                              // NEWFALSE
            b'K' => self.integer(|m| m.unsigned(1).map(|value| value as i64))?, // BININT1
            b'M' => self.integer(|m| m.unsigned(2).map(|value| value as i64))?, // BININT2
            b'J' => self.integer(|m| m.signed(4))?,                             // BININT
            0x8a => self.unsigned(1).and_then(|length| self.long(length))?,     // LONG1
            0x8b => self.unsigned(4).and_then(|length| self.long(length))?,     // LONG4
            b'G' => {
                let value = f64::from_bits(self.unsigned(8)?.swap_bytes());
                self.push(Value::Float(value)); // BINFLOAT
            }
            b'X' => self.unsigned(4).and_then(|length| self.text(length))?, // BINUNICODE
            0x8c => self.unsigned(1).and_then(|length| self.text(length))?, // SHORT_BINUNICODE
            0x8d => self.unsigned(8).and_then(|length| self.text(length))?, // BINUNICODE8
            b'U' | b'C' => self.unsigned(1).and_then(|length| self.latin1(length))?, // SHORT_BINSTRING, SHORT_BINBYTES
            b'T' | b'B' => self.unsigned(4).and_then(|length| self.latin1(length))?, // BINSTRING, BINBYTES
            0x8e | 0x96 => self.unsigned(8).and_then(|length| self.latin1(length))?, // BINBYTES8, BYTEARRAY8
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(&module, &name); // GLOBAL
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let both = (self.pickle.text(module).map(String::from), self.pickle.text(name).map(String::from));
                let (Some(module), Some(name)) = both else { return Err("a global name that is not text".into()) };
                self.global(&module, &name); // STACK_GLOBAL
            }
            b'q' => self.unsigned(1).and_then(|key| self.memoize(key))?, // BINPUT
            b'r' => self.unsigned(4).and_then(|key| self.memoize(key))?, // LONG_BINPUT
            0x94 => self.memoize(self.memo.len() as u64)?,               // MEMOIZE
            b'h' => self.unsigned(1).and_then(|key| self.recall(key))?,  // BINGET
            b'j' => self.unsigned(4).and_then(|key| self.recall(key))?,  // LONG_BINGET
            b')' => self.push(Value::Sequence(vec![])),                  // EMPTY_TUPLE
            b']' | 0x8f => self.push(Value::Sequence(vec![])),           // EMPTY_LIST, EMPTY_SET
            b'}' => self.push(Value::Dict(vec![])),                      // EMPTY_DICT
            0x85 => self.tuple(1)?,                                      // TUPLE1
            0x86 => self.tuple(2)?,                                      // TUPLE2
            0x87 => self.tuple(3)?,                                      // TUPLE3
            b't' | b'l' | 0x91 => {
                let items = self.pop_to_mark()?;
                self.push(Value::Sequence(items)); // TUPLE, LIST, FROZENSET
            }
            b'a' => self.pop().and_then(|item| self.append(vec![item]))?, // APPEND
            b'e' | 0x90 => self.pop_to_mark().and_then(|items| self.append(items))?, // APPENDS, ADDITEMS
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?; // SETITEM
            }
            b'u' => self.pop_to_mark().and_then(|items| self.set_items(&items))?, // SETITEMS
            b'R' | 0x81 => self.call()?,                                          // REDUCE, NEWOBJ
            0x92 => self.pop().and_then(|_keywords| self.call())?,                // NEWOBJ_EX
            b'b' => self.build()?,                                                // BUILD
            b'Q' => {
                let id = self.pop()?;
                self.push(Value::Persistent(id)); // BINPERSID
            }
            other => return Err(format!("instruction {other:#04x} is not one that torch.save writes")),
        }
        Ok(None)
    }

    fn integer(&mut self, read: impl FnOnce(&mut Self) -> Step<i64>) -> Step<()> {
        let value = read(self)?;
        self.push(Value::Int(value));
        Ok(())
    }
}
