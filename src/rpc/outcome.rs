//! A sequence run to its end, for the calls that answer once.
use super::record;
use crate::adapter::Adapter;
use crate::engine::EngineHandle;
use crate::engine::request::{Event, Finish, FinishReason, Request, TokenLogprob, Usage};
use crate::error::{Error, Kind, Result};
use std::sync::Arc;
use tokio::sync::mpsc::Receiver;

/// Everything that a sequence gave.
pub struct Outcome {
    /// Log-probabilities of given tokens, if asked for.
    pub scored: Vec<TokenLogprob>,
    /// Logits of the classes, if a head classified it.
    pub pooled: Vec<f32>,
    /// Generated tokens.
    pub tokens: Vec<u32>,
    /// Their log-probabilities, if asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Generated text.
    pub text: String,
    /// How it ended.
    pub finish: Finish,
}

/// Hands all sequences of a call in, or none: dropping the receivers takes back those already in.
pub fn submit(engine: &EngineHandle, requests: Vec<Request>) -> Result<Vec<Receiver<Event>>> {
    requests.into_iter().map(|request| engine.submit(request)).collect()
}

/// Runs all sequences of a call to their ends.
pub async fn run(
    engine: &EngineHandle,
    adapter: &Option<Arc<Adapter>>,
    requests: Vec<Request>,
) -> Result<Vec<Outcome>> {
    let receivers = submit(engine, requests)?;
    let mut outcomes = Vec::with_capacity(receivers.len());
    // One after the other loses nothing: each channel has room for all events of its sequence.
    for (choice, mut receiver) in receivers.into_iter().enumerate() {
        let outcome = collect(&mut receiver).await?;
        record::finished(adapter, choice, &outcome.finish);
        outcomes.push(outcome);
    }
    // A deadline ends them all, so it is told once all are written down.
    match outcomes.iter().find_map(|o| unfinished(o.finish.reason)) {
        Some(error) => Err(error),
        None => Ok(outcomes),
    }
}

/// The error of a sequence that was ended before its time.
pub fn unfinished(reason: FinishReason) -> Option<Error> {
    match reason {
        FinishReason::Deadline => Some(Error::new(Kind::DeadlineExceeded, "the deadline passed")),
        FinishReason::Cancelled => Some(Error::new(Kind::Cancelled, "the request was cancelled")),
        FinishReason::Stop | FinishReason::Length | FinishReason::StopSequence => None,
    }
}

/// The error of an engine that went away without a word.
pub fn stopped() -> Error {
    Error::unavailable("the engine has stopped")
}

async fn collect(receiver: &mut Receiver<Event>) -> Result<Outcome> {
    let (mut scored, mut pooled, mut text) = (Vec::new(), Vec::new(), String::new());
    let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
    loop {
        match receiver.recv().await.ok_or_else(stopped)? {
            Event::Scored(all) => scored = all,
            Event::Pooled(logits) => pooled = logits,
            Event::Token { id, logprob, text: piece } => {
                tokens.push(id);
                logprobs.extend(logprob);
                text.push_str(&piece);
            }
            Event::Finished(finish) => {
                text.push_str(&finish.text);
                return Ok(Outcome { scored, pooled, tokens, logprobs, text, finish });
            }
            Event::Failed(error) => return Err(error),
        }
    }
}

/// Usage of `n` choices of one prompt: the prompt counts once.
pub fn usage_of_choices(outcomes: &[Outcome]) -> Usage {
    let first = outcomes.first().map(|o| o.finish.usage).unwrap_or_default();
    Usage { generated: outcomes.iter().map(|o| o.finish.usage.generated).sum(), ..first }
}

/// Usage of several sequences: prompts and what the cache held of them add up; the prefix is one.
pub fn usage_of_all(outcomes: &[Outcome]) -> Usage {
    let mut sum = Usage::default();
    for Outcome { finish: Finish { usage, .. }, .. } in outcomes {
        sum.prompt += usage.prompt;
        sum.cached += usage.cached;
        sum.generated += usage.generated;
        sum.prefix = usage.prefix;
    }
    sum
}
