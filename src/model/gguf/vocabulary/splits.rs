//! How a byte-level BPE cuts a text into words, which the file says by a name alone.
use super::super::{Gguf, bad};
use crate::error::{Error, Result};
use serde_json::{Value as Json, json};

const PRE: &str = "tokenizer.ggml.pre";

/// GPT-2's words.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's: numbers in threes, a line's end with the punctuation before it.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2's: the same with single digits.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral's Tekken: words begin at capitals.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o's: words begin at capitals and keep their 's.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// One way to cut a text into words.
#[derive(Clone, Copy, Debug)]
pub struct Splits {
    /// Names of it.
    names: &'static [&'static str],
    /// Each cuts the words of the one before.
    patterns: &'static [&'static str],
    /// Characters and the accents after them become one character first.
    composes: bool,
    /// A word that is a token is that token, whatever merges would make of it.
    pub ignores_merges: bool,
    /// A text begins with BOS unless the file says otherwise.
    pub adds_bos: bool,
}

const PLAIN: Splits = Splits { names: &[], patterns: &[GPT2], composes: false, ignores_merges: false, adds_bos: false };

const ALL: &[Splits] = &[
    Splits { names: &["gpt-2", "phi-2", "olmo", "jais", "mpt"], ..PLAIN },
    Splits {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        patterns: &[LLAMA3],
        ignores_merges: true,
        adds_bos: true,
        ..PLAIN
    },
    Splits { names: &["smaug-bpe", "dbrx"], patterns: &[LLAMA3], ..PLAIN },
    Splits { names: &["qwen2"], patterns: &[QWEN2], composes: true, ..PLAIN },
    Splits { names: &["deepseek-r1-qwen", "megrez"], patterns: &[QWEN2], ..PLAIN },
    Splits { names: &["tekken"], patterns: &[TEKKEN], ignores_merges: true, adds_bos: true, ..PLAIN },
    Splits { names: &["gpt-4o", "llama4"], patterns: &[GPT4O], ..PLAIN },
    // Single digits first.
    Splits { names: &["smollm", "starcoder", "refact", "command-r"], patterns: &[r"\p{N}", GPT2], ..PLAIN },
    Splits { names: &["default"], patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], ..PLAIN },
];

impl Splits {
    /// That of a file.
    ///
    /// # Errors
    /// `FailedPrecondition` naming what it says and what is served: other words would be other tokens, in silence.
    pub fn of(gguf: &Gguf<'_>) -> Result<Self> {
        let remedy = "a tokenizer.json beside the file is read instead";
        let value = gguf.get(PRE).ok_or_else(|| bad(format!("has no key `{PRE}`; {remedy}")))?;
        let name = value.as_str();
        let found = ALL.iter().find(|s| name.is_some_and(|name| s.names.contains(&name)));
        found.copied().ok_or_else(|| {
            let served: Vec<_> = ALL.iter().flat_map(|s| s.names).copied().collect();
            let served = served.join(", ");
            Error::precondition(format!("`{PRE}` is {value}, which is not served; served are {served}; {remedy}"))
        })
    }

    /// `normalizer` of a `tokenizer.json`.
    pub fn normalizer(&self) -> Json {
        if self.composes { json!({ "type": "NFC" }) } else { Json::Null }
    }

    /// `pre_tokenizer` of a `tokenizer.json`.
    pub fn pre_tokenizer(&self) -> Json {
        let split = |pattern: &&str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
        let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
        json!({ "type": "Sequence", "pretokenizers": self.patterns.iter().map(split).chain([bytes]).collect::<Vec<_>>() })
    }
}
