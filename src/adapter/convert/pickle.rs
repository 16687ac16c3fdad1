//! What `torch.save` writes: a zip archive with a pickle that describes tensors, and their bytes beside it.
//!
//! candle's machine for pickles builds plain objects and calls nothing: at worst a hostile file ends this command.
//! Tensors are taken out of these objects here, since candle reads no bare tensor and trusts what it is told.
use super::{SavedTensor, Tensors};
use crate::error::{Context, Error, Kind, Result};
use candle_core::pickle::{Object, Stack};
use safetensors::Dtype;
use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use zip::ZipArchive;

/// Longest pickle; it has names and shapes only.
const MAX_PICKLE_BYTES: u64 = 16 << 20;

type Archive = ZipArchive<BufReader<File>>;

/// All tensors of the file at `path`: those of a state dict by name, or a bare one without.
pub(super) fn tensors(path: &Path) -> Result<Tensors> {
    let file = File::open(path).or_kind(Kind::InvalidArgument, "open")?;
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| {
        malformed(format!(
            "{e}: no zip archive, as torch.save writes since PyTorch 1.6; save it again with a newer one"
        ))
    })?;
    let name = |i| archive.name_for_index(i)?.ok().map(Cow::into_owned);
    let names: Vec<String> = (0..archive.len()).filter_map(name).collect();
    let pickles: Vec<&String> = names.iter().filter(|name| name.ends_with("data.pkl")).collect();
    let [pickle] = pickles.as_slice() else {
        return Err(malformed(format!("{} entries data.pkl, torch.save writes one", pickles.len())));
    };
    let root = pickle.trim_end_matches("data.pkl");
    let order = format!("{root}byteorder");
    if names.contains(&order) && entry(&mut archive, &order, 64)? != b"little" {
        return Err(malformed("its byte order is not little-endian".into()));
    }
    let bytes = entry(&mut archive, pickle, MAX_PICKLE_BYTES)?;
    let mut stack = Stack::empty();
    stack.read_loop(&mut bytes.as_slice()).or_kind(Kind::InvalidArgument, "data.pkl")?;
    let object = stack.finalize().or_kind(Kind::InvalidArgument, "data.pkl")?;
    let described = match state_dict(object) {
        Object::Dict(entries) => entries.into_iter().filter_map(named).collect::<Result<Vec<_>>>()?,
        bare => vec![(String::new(), bare)],
    };
    let mut seen = HashSet::new();
    let mut tensors = Tensors::new();
    for (name, object) in described {
        if !seen.insert(name.clone()) {
            return Err(malformed(format!("`{name}` is there twice")));
        }
        let info = Info::of(object).ok_or_else(|| malformed(format!("{} is no tensor", shown(&name))))?;
        tensors.insert(name.clone(), info.read(&mut archive, root).map_err(|e| e.context(shown(&name)))?);
    }
    Ok(tensors)
}

/// A checkpoint's `state_dict`, or the object as it is.
fn state_dict(object: Object) -> Object {
    let Object::Dict(mut entries) = object else { return object };
    let at = entries
        .iter()
        .position(|(key, value)| *key == Object::Unicode("state_dict".into()) && matches!(value, Object::Dict(_)));
    match at {
        Some(at) => entries.swap_remove(at).1,
        None => Object::Dict(entries),
    }
}

/// An entry of a state dict; torch's own `_metadata` is none.
fn named((key, value): (Object, Object)) -> Option<Result<(String, Object)>> {
    match key {
        Object::Unicode(name) if name == "_metadata" => None,
        Object::Unicode(name) => Some(Ok((name, value))),
        _ => Some(Err(malformed("a key of the dict is no name".into()))),
    }
}

/// Where a tensor's values are: `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)`.
struct Info {
    /// Entry of the archive, below `data/`.
    key: String,
    /// torch's class, `FloatStorage`.
    storage: String,
    /// In elements.
    offset: usize,
    size: Vec<usize>,
    stride: Vec<usize>,
}

impl Info {
    fn of(object: Object) -> Option<Self> {
        let (callable, args) = object.reduce().ok()?;
        let (module, class) = callable.class().ok()?;
        let mut args = args.tuple().ok()?.into_iter();
        match (module.as_str(), class.as_str()) {
            ("torch._utils", "_rebuild_parameter") => Info::of(args.next()?),
            ("torch._utils", "_rebuild_tensor_v2") => {
                let storage = args.next()?.persistent_load().ok()?.tuple().ok()?;
                let [_, class, key, ..] = storage.as_slice() else { return None };
                let (_, storage) = class.clone().class().ok()?;
                let key = key.clone().unicode().ok()?;
                let offset = number(args.next()?)?;
                let mut list = || args.next()?.tuple().ok()?.into_iter().map(number).collect::<Option<Vec<_>>>();
                Some(Info { key, storage, offset, size: list()?, stride: list()? })
            }
            _ => None,
        }
    }

    fn read(&self, archive: &mut Archive, root: &str) -> Result<SavedTensor> {
        let (dtype, width) = match self.storage.as_str() {
            "FloatStorage" => (Dtype::F32, 4),
            "HalfStorage" => (Dtype::F16, 2),
            "BFloat16Storage" => (Dtype::BF16, 2),
            other => {
                return Err(malformed(format!("is a {other}, must be a FloatStorage, HalfStorage or BFloat16Storage")));
            }
        };
        let Info { size, stride, offset, .. } = self;
        // Row-major strides; those of dimensions of one are free.
        let mut step = 1usize;
        for (&n, &found) in size.iter().zip(stride).rev() {
            if n != 1 && found != step {
                return Err(malformed(format!("is not contiguous: size {size:?}, stride {stride:?}")));
            }
            step = step.saturating_mul(n);
        }
        let end = offset.checked_add(step).and_then(|end| end.checked_mul(width));
        let data = entry(archive, &format!("{root}data/{}", self.key), super::MAX_FILE_BYTES)?;
        let bytes = end.and_then(|end| data.get(offset * width..end)).ok_or_else(|| {
            let have = data.len();
            malformed(format!("size {size:?} at offset {offset} needs more than the {have} bytes of its storage"))
        })?;
        Ok(SavedTensor { dtype, shape: size.clone(), bytes: bytes.to_vec() })
    }
}

fn number(object: Object) -> Option<usize> {
    object.int_or_long().ok()?.try_into().ok()
}

/// Bytes of an entry of the archive, at most `max`.
fn entry(archive: &mut Archive, name: &str, max: u64) -> Result<Vec<u8>> {
    let entry = archive.by_name(name).or_kind(Kind::InvalidArgument, name)?;
    if entry.size() > max {
        return Err(malformed(format!("{name}: {} bytes, at most {max} are read", entry.size())));
    }
    let mut bytes = Vec::new();
    entry.take(max).read_to_end(&mut bytes).or_kind(Kind::InvalidArgument, name)?;
    Ok(bytes)
}

fn shown(name: &str) -> String {
    if name.is_empty() { "its one object".into() } else { format!("`{name}`") }
}

fn malformed(message: String) -> Error {
    Error::new(Kind::InvalidArgument, message)
}
