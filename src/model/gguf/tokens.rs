//! The vocabulary's entries, and those that mean more than their text.
use super::value::Value;
use super::{Gguf, bad, broken};
use crate::error::{Error, Result};
use serde_json::{Value as Json, json};
use std::borrow::Cow;

const TOKENS: &str = "tokenizer.ggml.tokens";
const KINDS: &str = "tokenizer.ggml.token_type";

/// Texts of tokens that end an answer. Converters name one or two of them in the metadata; llama.cpp stops at all.
const ENDINGS: [&str; 9] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<EOT>",
    "<end_of_utterance>",
];

/// What an entry of the vocabulary is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// Text.
    Normal,
    /// What stands for text that no token covers.
    Unknown,
    /// No text: begins or ends something.
    Control,
    /// Text that is one token wherever it stands.
    UserDefined,
    /// One byte, written `<0x0A>`.
    Byte,
}

/// All entries in the order of their ids.
pub struct Tokens<'a> {
    pub texts: Vec<Cow<'a, str>>,
    pub kinds: Vec<TokenKind>,
}

impl<'a> Tokens<'a> {
    /// Those of a file.
    ///
    /// # Errors
    /// `InvalidArgument` naming the key.
    pub fn of(gguf: &Gguf<'a>) -> Result<Self> {
        let value = gguf.get(TOKENS).ok_or_else(|| bad(format!("has no key `{TOKENS}`")))?;
        let array = value.as_array().ok_or_else(|| broken(TOKENS, value, "must be an array of texts"))?;
        let text = |(i, v): (usize, Value<'a>)| match v {
            // llama.cpp's name for an entry without a text.
            Value::Text([]) => Ok(Cow::Owned(format!("[EMPTY_{i}]"))),
            Value::Text(bytes) => Ok(String::from_utf8_lossy(bytes)),
            _ => Err(broken(TOKENS, value, "must be an array of texts")),
        };
        let texts: Vec<_> = array.values().enumerate().map(text).collect::<Result<_>>()?;
        let kinds = match gguf.get(KINDS) {
            None => vec![TokenKind::Normal; texts.len()],
            Some(v) => {
                let rule = || format!("must be an array of {} numbers, one for each token", texts.len());
                let array = v.as_array().filter(|a| a.len() == texts.len()).ok_or_else(|| broken(KINDS, v, rule()))?;
                let kinds = array.values().map(|v| v.as_u64().map(kind)).collect::<Option<_>>();
                kinds.ok_or_else(|| broken(KINDS, v, rule()))?
            }
        };
        Ok(Tokens { texts, kinds })
    }
}

fn kind(number: u64) -> TokenKind {
    match number {
        2 => TokenKind::Unknown,
        3 => TokenKind::Control,
        4 => TokenKind::UserDefined,
        6 => TokenKind::Byte,
        // Normal, unused, undefined: text all the same.
        _ => TokenKind::Normal,
    }
}

/// The tokens that the metadata names by their meaning.
pub struct Special {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unknown: Option<u32>,
    pub padding: Option<u32>,
    /// End of a turn, of a message: they end a text as `eos` does.
    turn: [Option<u32>; 2],
}

impl Special {
    /// Those of a file.
    ///
    /// # Errors
    /// `InvalidArgument` naming the key whose token does not exist.
    pub fn of(gguf: &Gguf<'_>) -> Result<Self> {
        let count = gguf.get(TOKENS).and_then(Value::as_array).map(|a| a.len());
        let sentencepiece = gguf.get("tokenizer.ggml.model").and_then(Value::as_str) == Some("llama");
        let id = |name: &str, usual: Option<u32>| {
            let key = format!("tokenizer.ggml.{name}_token_id");
            let usual = usual.filter(|id| sentencepiece && count.is_some_and(|n| (*id as usize) < n));
            let Some(v) = gguf.get(&key) else { return Ok(usual) };
            let id = v.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.filter(|id| count.is_none_or(|n| (*id as usize) < n));
            let rule = || format!("must be a token below {}, the length of `{TOKENS}`", count.unwrap_or(0));
            id.map(Some).ok_or_else(|| broken(&key, v, rule()))
        };
        Ok(Special {
            bos: id("bos", Some(1))?,
            eos: id("eos", Some(2))?,
            unknown: id("unknown", Some(0))?,
            padding: id("padding", None)?,
            turn: [id("eot", None)?, id("eom", None)?],
        })
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = u32> {
        [self.bos, self.eos, self.unknown, self.padding].into_iter().chain(self.turn).flatten()
    }

    /// `generation_config.json`: every token that ends a text.
    pub fn generation_config(&self, gguf: &Gguf<'_>) -> Result<Json> {
        let mut ends: Vec<u32> = self.eos.into_iter().chain(self.turn.into_iter().flatten()).collect();
        if gguf.get(TOKENS).is_some() {
            let tokens = Tokens::of(gguf)?;
            let ending = |(text, kind): (&Cow<'_, str>, &TokenKind)| {
                matches!(kind, TokenKind::Control | TokenKind::UserDefined) && ENDINGS.contains(&text.as_ref())
            };
            let found = tokens.texts.iter().zip(&tokens.kinds).map(ending).enumerate();
            ends.extend(found.filter(|(_, ends)| *ends).map(|(id, _)| id as u32));
        }
        ends.sort_unstable();
        ends.dedup();
        Ok(json!({ "eos_token_id": ends }))
    }

    /// `tokenizer_config.json`: what chat templates know tokens by, and the template.
    pub fn tokenizer_config(&self, gguf: &Gguf<'_>) -> Result<Json> {
        let mut config = serde_json::Map::new();
        if let Some(array) = gguf.get(TOKENS).and_then(Value::as_array) {
            let named = [("bos", self.bos), ("eos", self.eos), ("unk", self.unknown), ("pad", self.padding)];
            for (name, id) in named.into_iter().filter_map(|(name, id)| Some((name, id?))) {
                if let Some(Value::Text(text)) = array.values().nth(id as usize) {
                    config.insert(format!("{name}_token"), String::from_utf8_lossy(text).into());
                }
            }
        }
        let key = "tokenizer.chat_template";
        if let Some(v) = gguf.get(key) {
            let text = v.as_str().ok_or_else(|| broken(key, v, "must be a text in UTF-8"))?;
            config.insert("chat_template".into(), text.into());
        }
        Ok(Json::Object(config))
    }

    /// Whether BOS goes in front of a text and EOS behind it.
    pub fn added(&self, gguf: &Gguf<'_>, usual: [bool; 2]) -> Result<[Option<u32>; 2]> {
        let added = |name: &str, usual: bool, id: Option<u32>| {
            let key = format!("tokenizer.ggml.add_{name}_token");
            let add = match gguf.get(&key) {
                None => usual,
                Some(v) => v.as_bool().ok_or_else(|| broken(&key, v, "must be true or false"))?,
            };
            match (add, id) {
                (true, None) => Err(Error::precondition(format!(
                    "a {name} token is added, and no `tokenizer.ggml.{name}_token_id` says which"
                ))),
                (add, id) => Ok(id.filter(|_| add)),
            }
        };
        Ok([added("bos", usual[0], self.bos)?, added("eos", usual[1], self.eos)?])
    }
}
