//! GGUF: one file with the weights, the numbers and the vocabulary of a model, as llama.cpp's converter writes it.
//!
//! Its metadata becomes the `config.json`, `tokenizer.json` and so on that the same model has as a Hugging Face folder, and
//! its tensors get their names there: everything behind that knows one kind of model.
mod blocks;
mod config;
mod header;
mod names;
mod reader;
#[cfg(test)]
mod tests;
mod tokens;
mod value;
mod vocabulary;

pub use blocks::decode;
pub use header::{Gguf, Stored};
pub use names::TensorNames;

use super::config::{FAMILIES, Family};
use super::source::Bytes;
use crate::error::{Error, Kind, Result};
use reader::bad;
use serde_json::Value as Json;
use value::Value;

/// `general.architecture` and what it means.
#[derive(Debug)]
pub struct Architecture {
    /// As the file says it; also what its keys start with.
    pub name: &'static str,
    family: &'static str,
    /// The family of a file that has a sliding window, if another.
    windowed: Option<&'static str>,
    /// Rows of q and k are in pairs that turn together; Hugging Face has the halves of a head apart.
    pub paired: bool,
}

const fn architecture(name: &'static str, family: &'static str) -> Architecture {
    Architecture { name, family, windowed: None, paired: false }
}

/// The architectures that are served.
pub const ARCHITECTURES: &[Architecture] = &[
    // Mistral's models are llama there.
    Architecture { windowed: Some("mistral"), paired: true, ..architecture("llama", "llama") },
    architecture("qwen2", "qwen2"),
    architecture("qwen3", "qwen3"),
    architecture("gemma", "gemma"),
    architecture("gemma2", "gemma2"),
    architecture("gemma3", "gemma3_text"),
    architecture("phi3", "phi3"),
    architecture("gpt2", "gpt2"),
];

impl Architecture {
    /// That of a file.
    ///
    /// # Errors
    /// `FailedPrecondition` naming it and those that are served.
    pub fn of(gguf: &Gguf<'_>) -> Result<&'static Architecture> {
        let key = "general.architecture";
        let name = gguf.get(key).ok_or_else(|| bad(format!("has no key `{key}`")))?;
        let found = ARCHITECTURES.iter().find(|a| name.as_str() == Some(a.name));
        found.ok_or_else(|| {
            let served: Vec<_> = ARCHITECTURES.iter().map(|a| a.name).collect();
            Error::precondition(format!("`{key}` is {name}, which is not served; served are {}", served.join(", ")))
        })
    }

    fn family(&self, windowed: bool) -> Result<&'static Family> {
        let name = self.windowed.filter(|_| windowed).unwrap_or(self.family);
        let found = FAMILIES.iter().find(|f| f.name == name);
        found.ok_or_else(|| Error::internal(format!("the architecture {} has no family {name}", self.name)))
    }
}

/// The small files that a Hugging Face folder of the same model has.
pub struct SmallFiles {
    /// `config.json`.
    pub config: Bytes,
    /// `generation_config.json`: the tokens that end a text.
    pub generation_config: Bytes,
    /// `tokenizer.json`; none where the file has no vocabulary that is served, and why.
    pub tokenizer: Result<Bytes>,
    /// `tokenizer_config.json`: special tokens and the chat template.
    pub tokenizer_config: Bytes,
}

impl SmallFiles {
    /// What the metadata says.
    ///
    /// # Errors
    /// `InvalidArgument` for a broken file, `FailedPrecondition` for a model that is not served; both name the key.
    pub fn of(gguf: &Gguf<'_>) -> Result<Self> {
        let config = config::config(gguf)?;
        // Whatever rule of a config.json it breaks is told now, while it is known what stands for that.
        super::config::ModelConfig::parse(config.to_string().as_bytes()).map_err(|e| e.context("from the metadata"))?;
        let json = |v: &Json| Bytes::Owned(v.to_string().into_bytes());
        let special = tokens::Special::of(gguf)?;
        Ok(SmallFiles {
            config: json(&config),
            generation_config: json(&special.generation_config(gguf)?),
            tokenizer: vocabulary::tokenizer(gguf, &special).map(|v| json(&v)),
            tokenizer_config: json(&special.tokenizer_config(gguf)?),
        })
    }
}

/// `key` holds `value`, which breaks `rule`.
fn broken(key: &str, value: &Value<'_>, rule: impl std::fmt::Display) -> Error {
    Error::new(Kind::InvalidArgument, format!("`{key}` is {value}, {rule}"))
}
