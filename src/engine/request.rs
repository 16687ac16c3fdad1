//! What goes into the engine and what comes out of it.
use crate::adapter::{Head, InputRow, Prefix, SoftPrompt};
use crate::error::{Error, Result};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One sequence to run: tokens in, tokens or log-probabilities out. `n` choices are `n` requests.
#[derive(Clone, Debug)]
pub struct Request {
    /// The client's request id, for logs.
    pub id: Arc<str>,
    /// Whom the work is charged to: the adapter's id, empty for the bare base.
    pub tenant: Arc<str>,
    /// What the sequence attends to before its own tokens. Holding it pins the generation.
    pub prefix: Option<Arc<Prefix>>,
    /// The input after template and tokenizer. Not empty.
    pub input: Vec<InputRow>,
    /// The embeddings of the virtual tokens in `input`.
    pub soft: Option<Arc<SoftPrompt>>,
    /// Classify by this head instead of generating: the answer is [`Event::Pooled`].
    pub head: Option<Arc<Head>>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// When to stop. `max_new_tokens` 0 only scores or classifies.
    pub stopping: Stopping,
    /// Return the log-probabilities of `input[from..]`, tokens all; `from` is at least 1.
    pub score_from: Option<usize>,
    /// Return so many most likely tokens beside each token's log-probability.
    pub top_logprobs: Option<usize>,
    /// End with [`FinishReason::Deadline`] when this passes.
    pub deadline: Option<Instant>,
    /// When the request came.
    pub arrival: Instant,
}

/// How the next token is chosen (proto `Sampling`, without `n`).
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// 1 changes nothing.
    pub repetition_penalty: f32,
    /// 0 changes nothing.
    pub presence_penalty: f32,
    /// 0 changes nothing.
    pub frequency_penalty: f32,
    /// Seed of the sequence's own generator.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Checks every field against the ranges that the API states. NaN is out of every range.
    pub fn validate(&self) -> Result<()> {
        let within = |field, value: f32, low: f32, high: f32, open: bool| {
            let ok = if open { value > low && value <= high } else { (low..=high).contains(&value) };
            let from = if open { "above" } else { "from" };
            if ok { Ok(()) } else { Err(Error::invalid(field, value, format!("must be {from} {low} to {high}"))) }
        };
        within("sampling.temperature", self.temperature, 0.0, 100.0, false)?;
        within("sampling.top_p", self.top_p, 0.0, 1.0, true)?;
        within("sampling.min_p", self.min_p, 0.0, 1.0, false)?;
        within("sampling.repetition_penalty", self.repetition_penalty, 0.0, 10.0, true)?;
        within("sampling.presence_penalty", self.presence_penalty, -2.0, 2.0, false)?;
        within("sampling.frequency_penalty", self.frequency_penalty, -2.0, 2.0, false)
    }
}

/// When to stop (proto `Stopping`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stopping {
    /// At most so many new tokens. 0: none, the request only scores.
    pub max_new_tokens: usize,
    /// No end before so many.
    pub min_new_tokens: usize,
    /// Texts that end the output.
    pub stop_sequences: Vec<String>,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Keep the stop sequence in the text.
    pub include_stop_sequence: bool,
}

/// What a request's receiver gets, in order: `Scored` or `Pooled` at most once, `Token`s, then one `Finished` or `Failed`.
#[derive(Clone, Debug)]
pub enum Event {
    /// Log-probabilities of `input[score_from..]`.
    Scored(Vec<TokenLogprob>),
    /// Logits of the classes `[labels]`.
    Pooled(Vec<f32>),
    /// A generated token.
    Token {
        /// The token.
        id: u32,
        /// Its log-probability, if asked for.
        logprob: Option<TokenLogprob>,
        /// The text that is certain now: whole characters, no part of a stop sequence. May be empty.
        text: String,
    },
    /// The end.
    Finished(Finish),
    /// The request could not be run to its end.
    Failed(Error),
}

/// A token, its log-probability and the most likely ones at its place.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token's id.
    pub id: u32,
    /// Natural logarithm of its probability, of the model's own distribution.
    pub logprob: f32,
    /// `(id, log-probability)`, best first.
    pub top: Vec<(u32, f32)>,
}

/// How a sequence ended.
#[derive(Clone, Debug)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// The stop sequence that ended it.
    pub stop_sequence: Option<String>,
    /// Text that was held back until now.
    pub text: String,
    /// Tokens used.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// An end-of-sequence token.
    Stop,
    /// The limit of new tokens, or of the context.
    Length,
    /// A stop sequence.
    StopSequence,
    /// The client went away.
    Cancelled,
    /// The deadline passed.
    Deadline,
}

impl FinishReason {
    /// Lower-case name, as in metrics and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::StopSequence => "stop_sequence",
            FinishReason::Cancelled => "cancelled",
            FinishReason::Deadline => "deadline",
        }
    }
}

/// Tokens that a sequence used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the input.
    pub prompt: usize,
    /// Positions of the prefix.
    pub prefix: usize,
    /// Of `prompt`, those found in the cache.
    pub cached: usize,
    /// Tokens generated.
    pub generated: usize,
}

/// Where a sequence's time went, and what it shared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// From arrival to the first scheduling.
    pub queue: Duration,
    /// From arrival to the first token (to the scores, if only scored).
    pub ttft: Duration,
    /// From arrival to the end.
    pub e2el: Duration,
    /// Most sequences in one batch with this one, itself included.
    pub batch_max_sequences: usize,
    /// Most different adapters in one batch with this one.
    pub batch_max_adapters: usize,
    /// How often it was preempted.
    pub preemptions: usize,
}
