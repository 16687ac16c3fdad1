//! A folder on disk to an adapter in memory: what Hugging Face PEFT's `save_pretrained` writes
//! (`adapter_config.json`, `adapter_model.safetensors`), a `task.toml`, or both.
//!
//! Two kinds of failure are kept apart: a file that is malformed by itself is `InvalidArgument`, one that
//! is sound but made for another base or another method is `FailedPrecondition`.
mod config;
mod weights;

use super::{BaseShape, InputRow, KvRows, Method, Prefix, TaskCard};
use crate::error::{Context, Error, Kind, Result};
use crate::tokenizer::Tokenizer;
use config::PeftConfig;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use weights::Weights;

/// PEFT's settings.
pub(super) const CONFIG_FILE: &str = "adapter_config.json";
/// PEFT's tensors.
pub(super) const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Our task card.
pub(super) const CARD_FILE: &str = "task.toml";
/// Longest `adapter_config.json` in bytes.
const MAX_CONFIG_BYTES: usize = 1 << 20;

/// A folder that passed every check, without id and generation.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// How the weights are meant; [`Method::Text`] without weights.
    pub method: Method,
    /// PEFT's `num_virtual_tokens`; 0 for [`Method::Text`].
    pub num_virtual_tokens: usize,
    /// The folder's `task.toml`, or the default card.
    pub card: TaskCard,
    /// `None` where a card has neither prefix text nor weights.
    pub prefix: Option<Arc<Prefix>>,
}

/// Reads the adapter in `dir` for the base of `shape`.
///
/// Text of the card follows the virtual tokens and has no special tokens of its own; alone it starts with
/// the tokenizer's (BOS). The prefix leaves at least one position of `shape.max_model_len` to requests.
///
/// # Errors
/// `NotFound` for a folder without adapter files; `InvalidArgument` for a malformed file, pickled weights
/// and values that are not finite; `FailedPrecondition` for an adapter of another base or method. Each
/// names the file, the rule and the numbers.
pub fn load(dir: &Path, shape: &BaseShape, tokenizer: &Tokenizer) -> Result<Loaded> {
    let card = match read_bounded(dir, CARD_FILE, TaskCard::MAX_BYTES)? {
        Some(bytes) => Some(TaskCard::parse(&text(CARD_FILE, bytes)?)?),
        None => None,
    };
    let config = read_bounded(dir, CONFIG_FILE, MAX_CONFIG_BYTES)?;
    let weights = dir.join(WEIGHTS_FILE);
    match (config, weights.is_file()) {
        (Some(config), true) => {
            let config = PeftConfig::parse(&text(CONFIG_FILE, config)?)?;
            config.check_base(shape)?;
            let weights = Weights::open(&weights, config.max_weight_bytes(shape))?;
            with_weights(&config, &weights, card.unwrap_or_default(), shape, tokenizer)
        }
        (config, has_weights) => {
            if let Some(pickle) = pickled_weights(dir)? {
                return Err(refuse_pickle(&pickle));
            }
            match (config, has_weights, card) {
                (Some(_), false, _) => Err(missing(WEIGHTS_FILE, CONFIG_FILE)),
                (None, true, _) => Err(missing(CONFIG_FILE, WEIGHTS_FILE)),
                (_, _, Some(card)) => text_only(card, shape, tokenizer),
                (_, _, None) => Err(Error::not_found(format!(
                    "no adapter here: neither {CONFIG_FILE} (with {WEIGHTS_FILE}) nor {CARD_FILE}"
                ))),
            }
        }
    }
}

fn with_weights(
    config: &PeftConfig,
    weights: &Weights,
    card: TaskCard,
    shape: &BaseShape,
    tokenizer: &Tokenizer,
) -> Result<Loaded> {
    let (method, n) = (config.method, config.num_virtual_tokens);
    weights.check_names(method == Method::MultitaskPromptTuning)?;
    let width = config.width(shape);
    let mut prompt = weights
        .floats("prompt_embeddings", &config.prompt_rule(shape), |dims| config.check_prompt(dims, width, shape))?;
    if method == Method::MultitaskPromptTuning {
        scale_to_task(&mut prompt, weights, card.task_id, n, width)?;
    }
    let mut text_rows = Vec::new();
    if card.has_prefix_text() {
        let prefix = card.prefix.as_deref().unwrap_or("");
        text_rows.extend(tokenizer.encode(prefix, false)?.into_iter().map(InputRow::Token));
        control_rows(&card, tokenizer, &mut text_rows)?;
    }
    check_length(n, text_rows.len(), shape)?;
    let prefix = if method == Method::PrefixTuning {
        Prefix::new(Some(KvRows { len: n, data: prompt.into() }), text_rows, Arc::new([]))
    } else {
        let soft = (0..n as u32).map(InputRow::Soft);
        Prefix::new(None, soft.chain(text_rows).collect(), prompt.into())
    };
    Ok(Loaded { method, num_virtual_tokens: n, card, prefix: prefix.map(Arc::new) })
}

fn text_only(card: TaskCard, shape: &BaseShape, tokenizer: &Tokenizer) -> Result<Loaded> {
    let mut rows = Vec::new();
    if card.has_prefix_text() {
        let prefix = card.prefix.as_deref().unwrap_or("");
        rows.extend(tokenizer.encode(prefix, true)?.into_iter().map(InputRow::Token));
        control_rows(&card, tokenizer, &mut rows)?;
    }
    check_length(0, rows.len(), shape)?;
    let prefix = Prefix::new(None, rows, Arc::new([])).map(Arc::new);
    Ok(Loaded { method: Method::Text, num_virtual_tokens: 0, card, prefix })
}

fn control_rows(card: &TaskCard, tokenizer: &Tokenizer, rows: &mut Vec<InputRow>) -> Result<()> {
    for (i, token) in card.control_tokens.iter().enumerate() {
        let id = tokenizer.token_to_id(token).ok_or_else(|| {
            let n = tokenizer.encode(token, false).map_or(0, |ids| ids.len());
            Error::precondition(format!(
                "task.toml: `control_tokens[{i}]` is {token:?}, which is no token of the base's vocabulary \
                 (as text it takes {n})"
            ))
        })?;
        rows.push(InputRow::Token(id));
    }
    Ok(())
}

/// prompt of task t = E * (cols[t] @ rows[t]), elementwise: `[n, d]` scaled by a matrix of low rank.
fn scale_to_task(prompt: &mut [f32], weights: &Weights, task: usize, n: usize, d: usize) -> Result<()> {
    let (mut tasks, mut rank) = (0, 0);
    let cols = weights.floats("prefix_task_cols", "[tasks, num_virtual_tokens, rank]", |dims| {
        (tasks, rank) = (dims[0], dims[2]);
        Weights::same("prefix_task_cols", dims, &[tasks, n, rank])
    })?;
    let rows = weights.floats("prefix_task_rows", "[tasks, rank, hidden_size]", |dims| {
        Weights::same("prefix_task_rows", dims, &[tasks, rank, d])
    })?;
    if task >= tasks {
        return Err(Error::precondition(format!(
            "task.toml: `task_id` is {task}, the adapter has {tasks} tasks, counted from 0"
        )));
    }
    // cols[t]: [n, rank], rows[t]: [rank, d].
    let (cols, rows) = (&cols[task * n * rank..][..n * rank], &rows[task * rank * d..][..rank * d]);
    for (row, prompt) in prompt.chunks_exact_mut(d).enumerate() {
        for (col, value) in prompt.iter_mut().enumerate() {
            let scale: f32 = (0..rank).map(|r| cols[row * rank + r] * rows[r * d + col]).sum();
            *value *= scale;
            if !value.is_finite() {
                return Err(Error::new(
                    Kind::InvalidArgument,
                    format!("{WEIGHTS_FILE}: prompt of task {task} at [{row}, {col}] is {value}, must be finite"),
                ));
            }
        }
    }
    Ok(())
}

fn check_length(virtual_tokens: usize, text: usize, shape: &BaseShape) -> Result<()> {
    let (len, max) = (virtual_tokens + text, shape.max_model_len);
    if len < max {
        return Ok(());
    }
    Err(Error::precondition(format!(
        "the prefix has {len} positions ({virtual_tokens} virtual tokens, {text} of text), base `{}` has \
         {max} in all and a request needs at least one",
        shape.name
    )))
}

fn missing(file: &str, beside: &str) -> Error {
    Error::new(Kind::InvalidArgument, format!("{beside} is there, {file} beside it is missing"))
}

/// Name of a pickled weights file in `dir`.
fn pickled_weights(dir: &Path) -> Result<Option<String>> {
    let pickles = ["bin", "pt", "pth", "ckpt", "pkl"];
    let mut found: Option<String> = None;
    for entry in dir.read_dir().map_err(|e| io_error(dir, &e))? {
        let path = entry.map_err(|e| io_error(dir, &e))?.path();
        let extension = path.extension().and_then(|x| x.to_str()).unwrap_or("");
        let name = path.file_name().and_then(|x| x.to_str());
        if let Some(name) = name.filter(|_| pickles.contains(&extension.to_ascii_lowercase().as_str())) {
            found = found.into_iter().chain([name.to_owned()]).min(); // the same answer on every disk
        }
    }
    Ok(found)
}

fn refuse_pickle(name: &str) -> Error {
    Error::new(
        Kind::InvalidArgument,
        format!(
            "{name} is a pickle, which can run code when it is opened, so it is not read; convert it where \
             you trust it: `safetensors.torch.save_file(torch.load(\"{name}\", weights_only=True), \
             \"{WEIGHTS_FILE}\")`, or save again with PEFT's `save_pretrained(..., safe_serialization=True)`"
        ),
    )
}

/// The file's bytes, `None` if there is no such file; at most `max` are ever held.
fn read_bounded(dir: &Path, name: &str, max: usize) -> Result<Option<Vec<u8>>> {
    let path = dir.join(name);
    match path.metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error(&path, &e)),
        // Opening a pipe or a device might never return.
        Ok(m) if !m.is_file() => {
            return Err(Error::new(Kind::InvalidArgument, format!("{name}: not a regular file")));
        }
        Ok(_) => {}
    }
    let mut bytes = Vec::new();
    let file = File::open(&path).map_err(|e| io_error(&path, &e))?;
    file.take(max as u64 + 1).read_to_end(&mut bytes).map_err(|e| io_error(&path, &e))?;
    if bytes.len() > max {
        return Err(Error::new(Kind::InvalidArgument, format!("{name}: more than {max} bytes")));
    }
    Ok(Some(bytes))
}

fn text(name: &str, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).or_kind(Kind::InvalidArgument, name)
}

/// A disk fault; a client that named the file wrongly has been told before.
fn io_error(path: &Path, e: &std::io::Error) -> Error {
    Error::internal(format!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests;
