//! What handles and the engine thread share: figures, the stop flag, and what can be said about a request at once.
use super::Stats;
use super::request::Request;
use crate::adapter::{Digest, InputRow};
use crate::error::{Error, Result};
use crate::kv::{PAGE_TOKENS, pages_for};
use crate::model::ModelInfo;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::{Mutex, PoisonError};

/// What handles read without asking the thread.
pub struct Shared {
    stop: AtomicBool,
    stats: Mutex<Stats>,
    resident: Mutex<HashSet<Digest>>,
    /// Tokens in the longest sequence.
    pub max_model_len: usize,
    /// Tokens that the pool holds.
    pub kv_tokens: usize,
    vocab_size: usize,
    hidden_size: usize,
    /// The base is an encoder.
    pub encoder: bool,
}

impl Shared {
    /// Of an engine that runs `model` and whose pool holds `kv_tokens`.
    pub fn new(model: &ModelInfo, kv_tokens: usize) -> Self {
        Shared {
            stop: AtomicBool::new(false),
            stats: Mutex::default(),
            resident: Mutex::default(),
            max_model_len: model.max_model_len,
            kv_tokens,
            vocab_size: model.vocab_size,
            hidden_size: model.hidden_size,
            encoder: model.encoder,
        }
    }

    /// Whether the thread is to end.
    pub fn stopped(&self) -> bool {
        self.stop.load(Acquire)
    }

    /// Figures after a step, and the prefixes in the pool.
    pub fn publish(&self, stats: Stats, resident: HashSet<Digest>) {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = stats;
        let mut known = self.resident.lock().unwrap_or_else(PoisonError::into_inner);
        if *known != resident {
            *known = resident;
        }
    }

    /// Ends the thread after its step.
    pub fn stop(&self) {
        self.stop.store(true, Release);
    }

    /// Figures as of the last step.
    pub fn stats(&self) -> Stats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a prefix is in the pool.
    pub fn is_resident(&self, digest: Digest) -> bool {
        self.resident.lock().unwrap_or_else(PoisonError::into_inner).contains(&digest)
    }

    /// What can be said about a request without the thread's state.
    pub fn admit(&self, request: &Request) -> Result<()> {
        let (prompt, new) = (request.input.len(), request.stopping.max_new_tokens);
        let prefix = request.prefix.as_ref().map_or(0, |p| p.len());
        let too_long = |limit: usize, what: &str| {
            let text = format!("{} tokens (prefix {prefix}, prompt {prompt}, new {new})", prefix + prompt + new);
            Error::invalid("prompt", text, format!("{what} {limit}"))
        };
        if prompt == 0 {
            return Err(Error::invalid("prompt", "empty", "must have at least one token"));
        }
        let virtual_tokens = request.soft.as_ref().map_or(0, |s| s.rows.len() / self.hidden_size);
        for row in &request.input {
            match *row {
                InputRow::Token(id) if id as usize >= self.vocab_size => {
                    let rule = format!("must be below the vocabulary size {}", self.vocab_size);
                    return Err(Error::invalid("token_ids", id, rule));
                }
                InputRow::Soft(i) if i as usize >= virtual_tokens => {
                    return Err(Error::internal(format!("virtual token {i} of {virtual_tokens}")));
                }
                _ => {}
            }
        }
        if self.encoder && request.head.is_none() {
            return Err(Error::precondition("the base is an encoder: it classifies, and generates or scores nothing"));
        }
        if prefix + prompt + new > self.max_model_len {
            return Err(too_long(self.max_model_len, "the context holds"));
        }
        let pages = pages_for(prompt + new) + pages_for(prefix);
        if pages * PAGE_TOKENS > self.kv_tokens {
            let text = format!("the request needs {pages} KV pages, the pool has {}", self.kv_tokens / PAGE_TOKENS);
            return Err(Error::exhausted(text, None));
        }
        let tokens = |from: usize| request.input[from..].iter().all(|r| matches!(r, InputRow::Token(_)));
        let scores = request.score_from.is_some_and(|from| (1..prompt).contains(&from) && tokens(from));
        if request.head.is_some() && (scores || new > 0) {
            return Err(Error::internal("a classified request neither scores nor generates"));
        }
        if request.score_from.is_some() != scores || new == 0 && !scores && request.head.is_none() {
            return Err(Error::invalid("prompt", format!("{prompt} tokens"), "leaves nothing to score"));
        }
        request.sampling.validate()
    }
}
