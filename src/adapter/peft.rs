//! A folder on disk to an adapter in memory: what Hugging Face PEFT's `save_pretrained` writes
//! (`adapter_config.json`, `adapter_model.safetensors`), a `task.toml`, or both.
//!
//! Two kinds of failure are kept apart: a file that is malformed by itself is `InvalidArgument`, one that
//! is sound but made for another base or another method is `FailedPrecondition`.
mod config;
mod heads;
mod place;
mod save;
mod weights;

use super::multitask::Tasks;
use super::placed::Placement;
use super::{Adapter, AdapterId, BaseShape, Generation, Head, KvRows, Method, Placed, Prefix, SoftPrompt, TaskCard};
use crate::error::{Context, Error, Kind, Result};
use crate::tokenizer::Tokenizer;
use candle_core::DType;
use config::PeftConfig;
use heads::HeadNames;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex};
use weights::Weights;

pub(super) use config::method_of as config_method;
pub(super) use heads::module as head_module;
pub use place::placement as place;
pub use save::{SavedAdapter, SavedBase, SavedTensor, save};
pub(super) use weights::{SERVED_DTYPES, fits, is_prompt_tensor, must_fit};

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
    /// Virtual tokens that stand among a request's own rows.
    pub soft: Option<Arc<SoftPrompt>>,
    /// The trained classifier.
    pub head: Option<Arc<Head>>,
    /// The tasks of a multitask prompt; `prefix` and `soft` are the card's.
    pub tasks: Option<Arc<Tasks>>,
}

impl Loaded {
    /// The adapter of that name and load.
    pub fn into_adapter(self, id: AdapterId, generation: Generation) -> Adapter {
        let Loaded { method, num_virtual_tokens, card, prefix, soft, head, tasks } = self;
        Adapter { id, generation, method, num_virtual_tokens, card, prefix, soft, head, tasks }
    }
}

/// Reads the adapter in `dir` for the base of `shape`.
///
/// Text of the card follows the virtual tokens and has no special tokens of its own; where it stands first (alone, or
/// as `prefix_before`) it starts with the tokenizer's (BOS). The prefix leaves at least one position of `shape.max_model_len` to requests.
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
    mut card: TaskCard,
    shape: &BaseShape,
    tokenizer: &Tokenizer,
) -> Result<Loaded> {
    let (method, n) = (config.method, config.num_virtual_tokens);
    let names = if config.classifies { HeadNames::find(&weights.names())? } else { HeadNames::default() };
    weights.check_names(config, &names)?;
    let width = config.width(shape);
    let held = match method {
        // What is held is what its tasks are composed to.
        Method::MultitaskPromptTuning => DType::F32,
        method if method.is_kv() => shape.kv_dtype,
        _ => shape.input_dtype,
    };
    let prompt = weights.floats("prompt_embeddings", &config.prompt_rule(shape), held, |dims| {
        config.check_prompt(dims, width, shape)
    })?;
    let placement = place::placement(&mut card, method, n, shape, tokenizer)?;
    let head = names.load(weights, &card, shape)?.map(Arc::new);
    let mut tasks = None;
    let Placed { prefix, soft } = if method == Method::MultitaskPromptTuning {
        let (all, placed) = read_tasks(prompt, placement, weights, &card, n, width, shape.input_dtype)?;
        tasks = Some(Arc::new(all));
        placed
    } else if method.is_kv() {
        placement.kv(KvRows { len: n, data: prompt.into() })
    } else {
        placement.soft(prompt, n)
    };
    Ok(Loaded { method, num_virtual_tokens: n, card, prefix, soft, head, tasks })
}

fn text_only(mut card: TaskCard, shape: &BaseShape, tokenizer: &Tokenizer) -> Result<Loaded> {
    let placement = place::placement(&mut card, Method::Text, 0, shape, tokenizer)?;
    let Placed { prefix, soft } = placement.text();
    Ok(Loaded { method: Method::Text, num_virtual_tokens: 0, card, prefix, soft, head: None, tasks: None })
}

/// The tasks around the shared `prompt` `[n, d]`, and what the card's became.
fn read_tasks(
    prompt: Vec<f32>,
    placement: Placement,
    weights: &Weights,
    card: &TaskCard,
    n: usize,
    d: usize,
    held: DType,
) -> Result<(Tasks, Placed)> {
    let (mut count, mut rank) = (0, 0);
    let cols = weights.floats("prefix_task_cols", "[tasks, num_virtual_tokens, rank]", DType::F32, |dims| {
        (count, rank) = (dims[0], dims[2]);
        Weights::same("prefix_task_cols", dims, &[count, n, rank])
    })?;
    let rows = weights.floats("prefix_task_rows", "[tasks, rank, hidden_size]", DType::F32, |dims| {
        Weights::same("prefix_task_rows", dims, &[count, rank, d])
    })?;
    let task = card.task_id;
    if task >= count {
        return Err(Error::precondition(format!(
            "task.toml: `task_id` is {task}, the adapter has {count} tasks, counted from 0"
        )));
    }
    let tasks = Tasks { count, len: n, rank, shared: prompt, cols, rows, held, placement, composed: Mutex::default() };
    let placed = tasks.compose(task).map_err(|(row, col, value)| {
        let text = format!("{WEIGHTS_FILE}: prompt of task {task} at [{row}, {col}] is {value}, {}", must_fit(held));
        Error::new(Kind::InvalidArgument, text)
    })?;
    Ok((tasks, placed))
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
            "{name} is a pickle, which can run code when it is opened, so it is not read; make a folder of it with \
             `prefixd adapters convert`, or convert it where you trust it: `safetensors.torch.save_file(torch.load(\"{name}\", weights_only=True), \
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
