//! Writes GGUF files, sound ones and others.
use std::path::{Path, PathBuf};

/// A value of the metadata.
#[derive(Clone)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Floats(Vec<f32>),
    Ints(Vec<i32>),
    Bools(Vec<bool>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::Text(text.into())
    }
}

/// A tensor: shape with the outermost dimension first, the format's number of its type, its bytes.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    pub shape: Vec<u64>,
    pub kind: u32,
    pub bytes: Vec<u8>,
    /// Where it says it is; where it is by default.
    pub offset: Option<u64>,
}

impl Entry {
    /// Of f32.
    pub fn floats(name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Entry { name: name.into(), shape: shape.iter().map(|n| *n as u64).collect(), kind: 0, bytes, offset: None }
    }
}

/// What a file says.
#[derive(Clone)]
pub struct Gguf {
    pub magic: [u8; 4],
    pub version: u32,
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<Entry>,
    /// What the header says they are; their real numbers by default.
    pub counts: [Option<u64>; 2],
}

impl Gguf {
    pub fn new() -> Self {
        Gguf { magic: *b"GGUF", version: 3, metadata: Vec::new(), tensors: Vec::new(), counts: [None; 2] }
    }

    pub fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.into(), value));
    }

    pub fn remove(&mut self, key: &str) {
        let before = self.metadata.len();
        self.metadata.retain(|(k, _)| k != key);
        assert!(self.metadata.len() < before, "{key} was not there");
    }

    pub fn tensor(&mut self, name: &str) -> &mut Entry {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.counts[0].unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.counts[1].unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            value.write(&mut out);
        }
        let mut offset = 0u64;
        for t in &self.tensors {
            text(&mut out, &t.name);
            out.extend((t.shape.len() as u32).to_le_bytes());
            t.shape.iter().rev().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(t.kind.to_le_bytes());
            out.extend(t.offset.unwrap_or(offset).to_le_bytes());
            offset += (t.bytes.len() as u64).next_multiple_of(32);
        }
        for t in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&t.bytes);
        }
        out
    }

    /// Writes it as `model.gguf` into `dir`.
    pub fn write(&self, dir: &Path) -> PathBuf {
        let path = dir.join("model.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Value {
    fn write(&self, out: &mut Vec<u8>) {
        let array = |out: &mut Vec<u8>, kind: u32, len: usize| {
            out.extend(9u32.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        };
        match self {
            Value::U32(v) => {
                out.extend(4u32.to_le_bytes());
                out.extend(v.to_le_bytes());
            }
            Value::F32(v) => {
                out.extend(6u32.to_le_bytes());
                out.extend(v.to_le_bytes());
            }
            Value::Bool(v) => {
                out.extend(7u32.to_le_bytes());
                out.push((*v).into());
            }
            Value::Text(v) => {
                out.extend(8u32.to_le_bytes());
                text(out, v);
            }
            Value::Texts(v) => {
                array(out, 8, v.len());
                v.iter().for_each(|v| text(out, v));
            }
            Value::Floats(v) => {
                array(out, 6, v.len());
                v.iter().for_each(|v| out.extend(v.to_le_bytes()));
            }
            Value::Ints(v) => {
                array(out, 5, v.len());
                v.iter().for_each(|v| out.extend(v.to_le_bytes()));
            }
            Value::Bools(v) => {
                array(out, 7, v.len());
                v.iter().for_each(|v| out.push((*v).into()));
            }
        }
    }
}
