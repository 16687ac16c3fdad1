//! The header of a GGUF: metadata and tensors, found and checked, nothing copied.
//!
//! Every length is compared with what is left of the file before anything is made of it, so a broken header costs no more
//! memory than the entries that are really there. A tensor's bytes lie in the file, aligned, and in no other tensor.
use super::blocks::Encoding;
use super::reader::{Reader, bad};
use super::value::{Kind as ValueKind, Value};
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// The first four bytes of every GGUF.
pub const MAGIC: &[u8; 4] = b"GGUF";
/// Bytes of the smallest metadata entry: a key of no letters, a type, one byte.
const LEAST_ENTRY: u64 = 8 + 4 + 1;
/// Bytes of the smallest entry of a tensor: a name of no letters, one dimension, type, offset.
const LEAST_TENSOR: u64 = 8 + 4 + 8 + 4 + 8;
/// Longest key of the metadata and name of a tensor.
const MAX_NAME: u64 = 1 << 16;
const MAX_DIMENSIONS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;

/// One open file, or all parts of a model as one.
pub struct Gguf<'a> {
    metadata: BTreeMap<&'a str, Value<'a>>,
    tensors: BTreeMap<&'a str, Stored<'a>>,
}

/// A tensor as it lies in the file.
#[derive(Clone, Debug)]
pub struct Stored<'a> {
    /// Outermost first.
    pub shape: Vec<usize>,
    /// How its elements are written.
    pub encoding: Encoding,
    /// They themselves.
    pub bytes: &'a [u8],
}

impl<'a> Gguf<'a> {
    /// Whether a file of these bytes claims to be one.
    pub fn is(bytes: &[u8]) -> bool {
        bytes.starts_with(MAGIC)
    }

    /// Reads the headers of all parts of a model, in order: mostly there is one. The first part has the metadata.
    ///
    /// # Errors
    /// As of [`Self::parse`]; `FailedPrecondition` if these are not all parts, or not in their places.
    pub fn open(parts: impl ExactSizeIterator<Item = &'a [u8]>) -> Result<Self> {
        let given = parts.len();
        let mut whole = Gguf { metadata: BTreeMap::new(), tensors: BTreeMap::new() };
        for (i, bytes) in parts.enumerate() {
            let part = Self::parse(bytes)?;
            let number = |key, usual: usize| part.metadata.get(key).map_or(Some(usual as u64), Value::as_u64);
            let (no, count) = (number("split.no", 0), number("split.count", 1));
            // A model that was not split is one of 0 parts for some writers.
            if count.map(|count| count.max(1)) != Some(given as u64) || no != Some(i as u64) {
                let says = |key| part.metadata.get(key).map_or("absent".to_owned(), ToString::to_string);
                return Err(Error::precondition(format!(
                    "`split.no` is {} and `split.count` {}, where part {i} of {given} is wanted: parts lie beside each other as \
                     NAME-00001-of-0000N.gguf, and the first one is named",
                    says("split.no"),
                    says("split.count")
                )));
            }
            if let Some(name) = part.tensors.keys().find(|name| whole.tensors.contains_key(*name)) {
                return Err(bad(format!("part {i} has the tensor {name}, which another part has too")));
            }
            whole.tensors.extend(part.tensors);
            if i == 0 {
                whole.metadata = part.metadata;
            }
        }
        let (key, found) = ("split.tensors.count", whole.tensors.len());
        match whole.metadata.get(key) {
            Some(count) if given > 1 && count.as_u64() != Some(found as u64) => {
                Err(Error::precondition(format!("`{key}` is {count}, the {given} parts have {found}")))
            }
            _ => Ok(whole),
        }
    }

    /// Reads the header of one file.
    ///
    /// # Errors
    /// `InvalidArgument` naming the entry, what it says and the limit; `FailedPrecondition` for what is well-formed and not
    /// served: versions, byte orders, types of tensors.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self> {
        let mut r = Reader::new(bytes);
        let magic = r.take(4, "the magic")?;
        if magic != MAGIC {
            return Err(bad(format!("starts with {:?}, must start with \"GGUF\"", magic.escape_ascii().to_string())));
        }
        version(r.u32("the version")?)?;
        let tensors = r.u64("the number of tensors")?;
        let entries = r.u64("the number of metadata entries")?;
        let (most_entries, most_tensors) = (r.left() / LEAST_ENTRY, r.left() / LEAST_TENSOR);
        for (what, count, most) in [("metadata entries", entries, most_entries), ("tensors", tensors, most_tensors)] {
            if count > most {
                return Err(bad(format!("claims {count} {what}, its size leaves room for {most}")));
            }
        }
        let mut metadata = BTreeMap::new();
        for i in 0..entries {
            let key = r.name(MAX_NAME, format_args!("key {i} of {entries}"))?;
            let kind = ValueKind::of(r.u32(key)?).map_err(|e| e.context(format!("`{key}`")))?;
            if metadata.insert(key, Value::read(&mut r, kind, key)?).is_some() {
                return Err(bad(format!("has the key `{key}` twice")));
            }
        }
        let mut gguf = Gguf { metadata, tensors: BTreeMap::new() };
        let found: Vec<_> = (0..tensors).map(|i| entry(&mut r, i, tensors)).collect::<Result<_>>()?;
        let alignment = gguf.alignment()?;
        let start = (r.at() as u64).next_multiple_of(alignment);
        let data = bytes.get(usize::try_from(start).unwrap_or(usize::MAX)..).unwrap_or_default();
        gguf.tensors = place(found, data, alignment)?;
        Ok(gguf)
    }

    fn alignment(&self) -> Result<u64> {
        let key = "general.alignment";
        match self.metadata.get(key) {
            None => Ok(DEFAULT_ALIGNMENT),
            Some(v) => match v.as_u64().filter(|a| a.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(a)) {
                Some(a) => Ok(a),
                None => Err(Error::invalid(key, v, format!("must be a power of two from 8 to {MAX_ALIGNMENT}"))),
            },
        }
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value<'a>> {
        self.metadata.get(key)
    }

    /// The tensor `name`.
    pub fn tensor(&self, name: &str) -> Option<&Stored<'a>> {
        self.tensors.get(name)
    }

    /// All tensors by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&'a str, &Stored<'a>)> {
        self.tensors.iter().map(|(name, t)| (*name, t))
    }
}

fn version(version: u32) -> Result<()> {
    match version {
        2 | 3 => Ok(()),
        v if (1..=3).contains(&v.swap_bytes()) => {
            Err(Error::precondition("the file is big-endian; little-endian files are served"))
        }
        v => Err(Error::precondition(format!("GGUF version {v} is not served; served are 2 and 3"))),
    }
}

/// What the header says of one tensor.
struct Entry<'a> {
    name: &'a str,
    shape: Vec<usize>,
    encoding: Encoding,
    /// From the start of the data.
    offset: u64,
    size: u64,
}

fn entry<'a>(r: &mut Reader<'a>, i: u64, count: u64) -> Result<Entry<'a>> {
    let name = r.name(MAX_NAME, format_args!("the name of tensor {i} of {count}"))?;
    let dimensions = r.u32(name)?;
    if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
        return Err(bad(format!("tensor {name} has {dimensions} dimensions, must have 1 to {MAX_DIMENSIONS}")));
    }
    // The file has the innermost dimension first.
    let mut shape: Vec<u64> = (0..dimensions).map(|_| r.u64(name)).collect::<Result<_>>()?;
    let elements = shape.iter().try_fold(1u64, |all, n| all.checked_mul(*n)).filter(|n| *n > 0);
    let elements = elements
        .ok_or_else(|| bad(format!("tensor {name} has dimensions {shape:?}, which hold no number of elements")))?;
    let encoding = Encoding::of(r.u32(name)?).map_err(|e| e.context(format!("tensor {name}")))?;
    let (width, block) = (shape[0], encoding.block_elements() as u64);
    if !width.is_multiple_of(block) {
        let rule = format!("rows of {}, must be a multiple of {block}", encoding.name());
        return Err(bad(format!("tensor {name} has {width} elements in its {rule}")));
    }
    let size = (elements / block).checked_mul(encoding.block_bytes() as u64);
    let size = size.ok_or_else(|| bad(format!("tensor {name} has dimensions {shape:?}, too many to count")))?;
    shape.reverse();
    let shape = shape.into_iter().map(|n| usize::try_from(n).unwrap_or(usize::MAX)).collect();
    Ok(Entry { name, shape, encoding, offset: r.u64(name)?, size })
}

/// Where each lies in `data`; none may leave it or reach into another.
fn place<'a>(mut found: Vec<Entry<'a>>, data: &'a [u8], alignment: u64) -> Result<BTreeMap<&'a str, Stored<'a>>> {
    found.sort_by_key(|e| e.offset);
    let mut tensors = BTreeMap::new();
    let mut last: Option<(&str, u64)> = None;
    for e in found {
        let Entry { name, offset, size, .. } = e;
        if !offset.is_multiple_of(alignment) {
            return Err(bad(format!("tensor {name} is at offset {offset}, must be a multiple of {alignment}")));
        }
        let range = || {
            let end = offset.checked_add(size)?;
            data.get(usize::try_from(offset).ok()?..usize::try_from(end).ok()?)
        };
        let bytes = range().ok_or_else(|| {
            let have = data.len();
            bad(format!(
                "tensor {name} takes {size} bytes from offset {offset} on, the file has {have} bytes of tensors"
            ))
        })?;
        if let Some((before, end)) = last.filter(|(_, end)| *end > offset) {
            return Err(bad(format!("tensor {name} starts at offset {offset}, inside {before}, which ends at {end}")));
        }
        last = Some((name, offset + size));
        if tensors.insert(name, Stored { shape: e.shape, encoding: e.encoding, bytes }).is_some() {
            return Err(bad(format!("has the tensor {name} twice")));
        }
    }
    Ok(tensors)
}
