//! Where a base model's files come from: the executable, a folder, a GGUF, or the hub.
use super::gguf::{Gguf, SmallFiles};
use crate::error::{Context, Error, Kind, Result};
use crate::ops::mapped::Mapped;
use std::ops::Deref;
use std::path::{Path, PathBuf};

/// A small file of a model may have so many bytes; `tokenizer.json` of large vocabularies has about 20 MB.
const MAX_SMALL_FILE: u64 = 256 << 20;

/// The files of one model.
pub struct ModelFiles {
    /// Folder, file, hub id or `embedded`.
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
    /// One or more safetensors, or a GGUF in one or more parts.
    pub weights: Vec<WeightFile>,
}

/// One safetensors file or GGUF.
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

/// Finds the files of `name`: `embedded`, a folder, a GGUF, or else a hub id (`owner/name`, or `owner/name/file.gguf`), which
/// is downloaded into the hub's cache. Blocks.
///
/// # Errors
/// `InvalidArgument` naming the missing file or what the hub says.
pub fn resolve(name: &str) -> Result<ModelFiles> {
    if name == "embedded" {
        return Ok(embedded());
    }
    let path = Path::new(name);
    if path.is_dir() {
        return match only_gguf(path)? {
            Some(file) => gguf(name, &file),
            None => folder(name, path),
        };
    }
    if path.is_file() {
        return gguf(name, path);
    }
    let parts: Vec<&str> = name.split('/').collect();
    let named = parts.iter().all(|p| !p.is_empty() && !p.starts_with('.'));
    match (parts.as_slice(), is_gguf_name(name)) {
        ([_] | [_, _], false) if named => hub(name),
        ([owner, repo, file @ ..], true) if named && !file.is_empty() => {
            hub_gguf(name, &format!("{owner}/{repo}"), &file.join("/"))
        }
        (_, true) => Err(Error::invalid("model", format!("{name:?}"), "which is no file here")),
        _ => {
            let rule = "must be `embedded`, a folder, a GGUF, or a hub id";
            Err(Error::invalid("model", format!("{name:?}"), rule))
        }
    }
}

fn is_gguf_name(name: &str) -> bool {
    name.ends_with(".gguf")
}

/// The GGUF of a folder that has no `config.json`; `None` where it has none of both.
fn only_gguf(dir: &Path) -> Result<Option<PathBuf>> {
    if dir.join("config.json").is_file() {
        return Ok(None);
    }
    let entries = std::fs::read_dir(dir).or_kind(Kind::InvalidArgument, dir.display())?;
    let mut names: Vec<String> = entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    names.retain(|name| is_gguf_name(name));
    names.sort();
    match names.as_slice() {
        [] => Ok(None),
        [first, ..] if parts(first) == names => Ok(Some(dir.join(first))),
        several => {
            let rule = format!("a folder with {} of them; name one: {}", several.len(), several.join(", "));
            Err(Error::invalid("model", dir.display(), rule))
        }
    }
}

/// The names of all parts of a split model, by that of the first, NAME-00001-of-0000N.gguf; of any other file its own.
fn parts(first: &str) -> Vec<String> {
    let count = |stem: &str| -> Option<(String, u32)> {
        let (stem, count) = stem.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let name = stem.strip_suffix("-00001")?;
        (count.len() == 5).then(|| Some((name.to_owned(), count.parse().ok()?))).flatten()
    };
    match count(first) {
        Some((name, count)) if count > 1 => (1..=count).map(|i| format!("{name}-{i:05}-of-{count:05}.gguf")).collect(),
        _ => vec![first.to_owned()],
    }
}

/// A GGUF, and the tokenizer that lies beside it in Hugging Face's files, if one does.
fn gguf(name: &str, path: &Path) -> Result<ModelFiles> {
    let dir = path.parent().unwrap_or(Path::new(""));
    let file = path.file_name().map_or_else(|| name.to_owned(), |n| n.to_string_lossy().into_owned());
    let weights = parts(&file).into_iter().map(|part| mapped(dir, part)).collect::<Result<Vec<_>>>()?;
    let read_header = || SmallFiles::of(&Gguf::open(weights.iter().map(|file| &*file.bytes))?);
    let small = read_header().map_err(|e| e.context(path.display()))?;
    let beside = |file: &str| optional(dir, file);
    Ok(ModelFiles {
        name: name.into(),
        config: small.config,
        generation_config: Some(small.generation_config),
        tokenizer: match beside("tokenizer.json")? {
            Some(tokenizer) => tokenizer,
            None => small.tokenizer.map_err(|e| e.context(path.display()))?,
        },
        tokenizer_config: Some(beside("tokenizer_config.json")?.unwrap_or(small.tokenizer_config)),
        chat_template: beside("chat_template.jinja")?,
        weights,
    })
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
    let optional = |file: &str| optional(dir, file);
    let index = dir.join("model.safetensors.index.json");
    let shards = if index.is_file() { shard_names(&read(&index)?)? } else { vec!["model.safetensors".to_owned()] };
    Ok(ModelFiles {
        name: name.into(),
        config: Bytes::Owned(read(&dir.join("config.json"))?),
        generation_config: optional("generation_config.json")?,
        tokenizer: Bytes::Owned(read(&dir.join("tokenizer.json"))?),
        tokenizer_config: optional("tokenizer_config.json")?,
        chat_template: optional("chat_template.jinja")?,
        weights: shards.into_iter().map(|shard| mapped(dir, shard)).collect::<Result<_>>()?,
    })
}

fn mapped(dir: &Path, file: String) -> Result<WeightFile> {
    let path = dir.join(&file);
    let bytes = Mapped::open(&path).or_kind(Kind::InvalidArgument, path.display())?;
    Ok(WeightFile { name: file, bytes: Bytes::Mapped(bytes) })
}

fn optional(dir: &Path, file: &str) -> Result<Option<Bytes>> {
    let path = dir.join(file);
    path.is_file().then(|| read(&path).map(Bytes::Owned)).transpose()
}

/// Downloads the GGUF of a hub id, all parts of it, if it is not cached.
fn hub_gguf(name: &str, id: &str, file: &str) -> Result<ModelFiles> {
    let place = format!("model `{name}` is no file here, and the hub");
    let api = hf_hub::api::sync::ApiBuilder::from_env().build().or_kind(Kind::InvalidArgument, &place)?;
    let repo = api.model(id.to_owned());
    let get = |file: &String| repo.get(file).or_kind(Kind::InvalidArgument, format!("{place}: {file}"));
    let found = parts(file).iter().map(get).collect::<Result<Vec<_>>>()?;
    let first = found.first().ok_or_else(|| Error::internal("a GGUF without a part"))?;
    gguf(name, first)
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
        let e = resolve("models/none.gguf").err().unwrap().to_string();
        assert!(e.contains("models/none.gguf") && e.contains("no file here"), "{e}");
    }

    #[test]
    fn parts_are_named_by_the_first() {
        assert_eq!(
            parts("q/m-00001-of-00003.gguf"),
            ["q/m-00001-of-00003.gguf", "q/m-00002-of-00003.gguf", "q/m-00003-of-00003.gguf"]
        );
        for alone in
            ["m.gguf", "m-00002-of-00003.gguf", "m-00001-of-3.gguf", "m-00001-of-00001.gguf", "m-00001-of-0000x.gguf"]
        {
            assert_eq!(parts(alone), [alone]);
        }
    }

    #[test]
    fn a_folder_of_ggufs_needs_one_of_them_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str| std::fs::write(dir.path().join(name), b"GGML").unwrap();
        let message = || resolve(dir.path().to_str().unwrap()).err().unwrap().to_string();
        write("a.gguf");
        assert!(message().contains("a.gguf: ") && message().contains("\"GGML\""), "{}", message());
        write("b.gguf");
        assert!(message().contains("a.gguf, b.gguf"), "{}", message());
        write("config.json");
        assert!(message().contains("tokenizer.json"), "{}", message());
    }
}
