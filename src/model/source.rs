//! Where a base model's files come from: the executable, a folder, or the hub.
use crate::error::{Context, Error, Kind, Result};
use crate::ops::mapped::Mapped;
use std::ops::Deref;
use std::path::{Path, PathBuf};

/// A small file of a model may have so many bytes; `tokenizer.json` of large vocabularies has about 20 MB.
const MAX_SMALL_FILE: u64 = 256 << 20;

/// The files of one model.
pub struct ModelFiles {
    /// Folder, hub id or `embedded`.
    pub name: String,
    /// `config.json`.
    pub config: Bytes,
    /// `generation_config.json`.
    pub generation_config: Option<Bytes>,
    /// `tokenizer.json`.
    pub tokenizer: Bytes,
    /// `tokenizer_config.json`: special tokens and, mostly, the chat template.
    pub tokenizer_config: Option<Bytes>,
    /// `chat_template.jinja`: where newer transformers saves the chat template.
    pub chat_template: Option<Bytes>,
    /// One or more safetensors.
    pub weights: Vec<WeightFile>,
}

/// One safetensors file.
pub struct WeightFile {
    /// For messages.
    pub name: String,
    /// Its content.
    pub bytes: Bytes,
}

/// Content of a file.
pub enum Bytes {
    /// Part of the executable.
    Static(&'static [u8]),
    /// Read into memory.
    Owned(Vec<u8>),
    /// Mapped.
    Mapped(Mapped),
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Static(b) => b,
            Bytes::Owned(b) => b,
            Bytes::Mapped(b) => b,
        }
    }
}

/// Finds the files of `name`: `embedded`, a folder, or else a hub id (`owner/name`), which is downloaded into
/// the hub's cache. Blocks.
///
/// # Errors
/// `InvalidArgument` naming the missing file or what the hub says.
pub fn resolve(name: &str) -> Result<ModelFiles> {
    if name == "embedded" {
        return Ok(embedded());
    }
    let path = Path::new(name);
    if path.is_dir() {
        return folder(name, path);
    }
    let parts: Vec<&str> = name.split('/').collect();
    let hub_name = parts.len() <= 2 && parts.iter().all(|p| !p.is_empty() && !p.starts_with('.'));
    if !hub_name {
        return Err(Error::invalid("model", format!("{name:?}"), "must be `embedded`, a folder, or a hub id"));
    }
    hub(name)
}

fn embedded() -> ModelFiles {
    macro_rules! file {
        ($name:literal) => {
            Bytes::Static(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo/", $name)))
        };
    }
    ModelFiles {
        name: "embedded".into(),
        config: file!("config.json"),
        generation_config: Some(file!("generation_config.json")),
        tokenizer: file!("tokenizer.json"),
        tokenizer_config: Some(file!("tokenizer_config.json")),
        chat_template: None,
        weights: vec![WeightFile { name: "model.safetensors".into(), bytes: file!("model.safetensors") }],
    }
}

fn folder(name: &str, dir: &Path) -> Result<ModelFiles> {
    let optional = |file: &str| {
        let path = dir.join(file);
        path.is_file().then(|| read(&path).map(Bytes::Owned)).transpose()
    };
    let index = dir.join("model.safetensors.index.json");
    let shards = if index.is_file() { shard_names(&read(&index)?)? } else { vec!["model.safetensors".to_owned()] };
    let weight = |shard: String| {
        let path = dir.join(&shard);
        let bytes = Mapped::open(&path).or_kind(Kind::InvalidArgument, path.display())?;
        Ok(WeightFile { name: shard, bytes: Bytes::Mapped(bytes) })
    };
    Ok(ModelFiles {
        name: name.into(),
        config: Bytes::Owned(read(&dir.join("config.json"))?),
        generation_config: optional("generation_config.json")?,
        tokenizer: Bytes::Owned(read(&dir.join("tokenizer.json"))?),
        tokenizer_config: optional("tokenizer_config.json")?,
        chat_template: optional("chat_template.jinja")?,
        weights: shards.into_iter().map(weight).collect::<Result<_>>()?,
    })
}

/// Downloads what is not cached, then serves the cache's folder.
fn hub(id: &str) -> Result<ModelFiles> {
    let place = format!("model `{id}` is no folder here, and the hub");
    let api = hf_hub::api::sync::ApiBuilder::from_env().build().or_kind(Kind::InvalidArgument, &place)?;
    let repo = api.model(id.to_owned());
    let get = |file: &str| repo.get(file).or_kind(Kind::InvalidArgument, format!("{place}: {file}"));
    let config: PathBuf = get("config.json")?;
    get("tokenizer.json")?;
    for file in ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"] {
        if let Err(e) = get(file) {
            tracing::debug!(%e, "no {file}");
        }
    }
    match repo.get("model.safetensors.index.json") {
        Ok(index) => {
            for shard in shard_names(&read(&index)?)? {
                get(&shard)?;
            }
        }
        Err(_) => drop(get("model.safetensors")?),
    }
    let dir = config.parent().ok_or_else(|| Error::internal("the hub's cache gave a path without a folder"))?;
    folder(id, dir)
}

/// File names in an index, each once. They are names, never paths.
fn shard_names(index: &[u8]) -> Result<Vec<String>> {
    let place = "model.safetensors.index.json";
    let v: serde_json::Value = serde_json::from_slice(index).or_kind(Kind::InvalidArgument, place)?;
    let map = v["weight_map"].as_object();
    let map = map.ok_or_else(|| Error::new(Kind::InvalidArgument, format!("{place}: `weight_map` is missing")))?;
    let mut names: Vec<String> = map.values().filter_map(|f| f.as_str().map(str::to_owned)).collect();
    names.sort_unstable();
    names.dedup();
    if let Some(bad) = names.iter().find(|n| n.contains(['/', '\\']) || n.starts_with('.')) {
        return Err(Error::invalid("weight_map", bad, "must hold file names, not paths").context(place));
    }
    Ok(names)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let size = std::fs::metadata(path).or_kind(Kind::InvalidArgument, path.display())?.len();
    if size > MAX_SMALL_FILE {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!("{}: {size} bytes, at most {MAX_SMALL_FILE} are read", path.display()),
        ));
    }
    std::fs::read(path).or_kind(Kind::InvalidArgument, path.display())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn shards_are_names() {
        let names = shard_names(br#"{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}"#).unwrap();
        assert_eq!(names, ["x.safetensors"]);
        assert!(shard_names(br#"{"weight_map": {"a": "../x"}}"#).is_err());
        assert!(shard_names(b"{}").is_err());
    }

    #[test]
    fn a_missing_folder_is_told_from_a_hub_id() {
        let e = resolve("/no/such/folder").err().unwrap().to_string();
        assert!(e.contains("/no/such/folder"), "{e}");
    }
}
