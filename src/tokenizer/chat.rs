//! A model's chat template: from messages to the text that the model was trained on.
//!
//! The template comes with the model, so it is as trusted as the weights; the messages are a client's. Fuel and the
//! size of the output bound what messages can make of a template.
pub(crate) mod date;
mod jinja;

use crate::error::{Context as _, Error, Kind, Result};
use jinja::Raised;
use minijinja::{ErrorKind, Value, context};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::error::Error as _;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Longest rendered text, bytes.
const MAX_OUTPUT: usize = 16 << 20;
/// Longest text of `raise_exception` or of a failure that is passed on, characters: it may quote a message.
const MAX_QUOTED: usize = 300;
/// The special tokens that templates know by these names.
const TOKEN_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"];

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// Special tokens by name, `bos_token` and the like; those that the model lacks are undefined in the template.
pub type SpecialTokens = BTreeMap<String, String>;

/// A template that parses. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: Arc<str>,
    tokens: Arc<SpecialTokens>,
}

impl ChatTemplate {
    /// Checks the template's syntax.
    ///
    /// # Errors
    /// `FailedPrecondition` with the line that is at fault.
    pub fn new(source: &str, tokens: SpecialTokens) -> Result<Self> {
        let source = jinja::prepare(source);
        // minijinja's counters of columns are 16 bits wide, and debug builds panic where they overflow.
        let parsed = catch_unwind(|| jinja::parse(&source).map(drop).map_err(|e| quoted(&e.to_string()).to_owned()));
        let parsed = parsed.unwrap_or_else(|_| Err("minijinja panicked".to_owned()));
        parsed.map_err(|e| Error::precondition(format!("chat template: {e}")))?;
        Ok(ChatTemplate { source: source.into(), tokens: Arc::new(tokens) })
    }

    /// The template of a model's files: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`,
    /// which also has the special tokens.
    ///
    /// # Errors
    /// `FailedPrecondition` where there is none, or where it cannot be read.
    pub fn from_files(chat_template: Option<&[u8]>, tokenizer_config: Option<&[u8]>) -> Result<Self> {
        let config = match tokenizer_config {
            None => serde_json::Value::Null,
            Some(json) => serde_json::from_slice(json).or_kind(Kind::FailedPrecondition, "tokenizer_config.json")?,
        };
        let source = match chat_template {
            Some(text) => std::str::from_utf8(text).or_kind(Kind::FailedPrecondition, "chat_template.jinja")?,
            None => configured(&config["chat_template"])?,
        };
        Self::new(source, special_tokens(&config))
    }

    /// The text for a conversation; with `add_generation_prompt` it ends where the assistant's answer starts. Special
    /// tokens are in the text already.
    ///
    /// # Errors
    /// `InvalidArgument` where the template refuses the messages or they take too much work; `FailedPrecondition`
    /// where the template itself fails.
    pub fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String> {
        let parsed = jinja::parse(&self.source).or_kind(Kind::FailedPrecondition, "chat template")?;
        let variables = context! {
            messages => Value::from_serialize(messages),
            add_generation_prompt,
            tools => (),
            documents => (),
            ..Value::from_serialize(&*self.tokens)
        };
        let mut out = Capped { bytes: Vec::new(), full: false };
        // minijinja panics at some slices (`''[::-1]`), and the messages may lead it there.
        let run = AssertUnwindSafe(|| parsed.render_captured_to(variables, &mut out).map(drop));
        let Ok(done) = catch_unwind(run) else {
            return Err(Error::precondition("the model's chat template fails: minijinja panicked"));
        };
        if out.full {
            return Err(refused(messages, format!("but its rendered chat template passes {MAX_OUTPUT} bytes")));
        }
        done.map_err(|e| failure(&e, messages))?;
        String::from_utf8(out.bytes).or_kind(Kind::Internal, "chat template output")
    }
}

/// `chat_template` of `tokenizer_config.json`: a text, or named texts of which `default` is the one.
fn configured(value: &serde_json::Value) -> Result<&str> {
    let named = |all: &'_ [serde_json::Value]| all.iter().position(|t| t["name"] == "default");
    let text = match value {
        serde_json::Value::String(text) => Some(text.as_str()),
        serde_json::Value::Array(all) => named(all).and_then(|i| all[i]["template"].as_str()),
        _ => None,
    };
    text.ok_or_else(|| {
        Error::precondition(match value {
            serde_json::Value::Array(_) => "tokenizer_config.json: no `chat_template` is named `default`",
            _ => "no chat template, neither chat_template.jinja nor `chat_template` in tokenizer_config.json",
        })
    })
}

/// Each token is a text, or an object that has it as `content`.
fn special_tokens(config: &serde_json::Value) -> SpecialTokens {
    let token = |name: &&str| {
        let value = &config[*name];
        let text = value.as_str().or_else(|| value["content"].as_str())?;
        Some(((*name).to_owned(), text.to_owned()))
    };
    TOKEN_NAMES.iter().filter_map(token).collect()
}

fn failure(e: &minijinja::Error, messages: &[ChatMessage]) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = e.source();
    while let Some(inner) = cause {
        if let Some(Raised(text)) = inner.downcast_ref() {
            return refused(messages, format!("but the model's chat template says: {}", quoted(text)));
        }
        cause = inner.source();
    }
    if e.kind() == ErrorKind::OutOfFuel {
        return refused(messages, format!("but its chat template takes more than {} instructions", jinja::FUEL));
    }
    Error::precondition(format!("the model's chat template fails: {}", quoted(&e.to_string())))
}

fn refused(messages: &[ChatMessage], rule: String) -> Error {
    Error::invalid("messages", format!("a list of {}", messages.len()), rule)
}

fn quoted(text: &str) -> &str {
    text.char_indices().nth(MAX_QUOTED).map_or(text, |(cut, _)| &text[..cut])
}

/// Takes at most [`MAX_OUTPUT`] bytes, then ends the rendering.
struct Capped {
    bytes: Vec<u8>,
    full: bool,
}

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT {
            self.full = true;
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
