//! One request's life in the engine, beside its tokens and pages (which the scheduler has): its sampler, its
//! text, its receiver.
use super::request::{Event, Finish, FinishReason, Request, Stopping, Timings, TokenLogprob, Usage};
use super::sampler::{Sampled, Sampler};
use super::stop::StopMatcher;
use crate::adapter::{Head, InputRow};
use crate::error::{Error, Result};
use crate::tokenizer::{Detokenizer, Tokenizer};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

/// A request that was taken in.
pub struct Sequence {
    /// For logs.
    pub request_id: Arc<str>,
    /// Chooses its tokens.
    pub sampler: Sampler,
    /// Most likely tokens to return beside each.
    /// The most likely tokens to name beside a log-probability, if any is wanted.
    pub top_logprobs: Option<usize>,
    /// When to end with `Deadline`.
    pub deadline: Option<Instant>,
    stopping: Stopping,
    score_from: Option<usize>,
    prompt_len: usize,
    scored: Vec<TokenLogprob>,
    head: Option<Arc<Head>>,
    pooled: Option<Vec<f32>>,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    usage: Usage,
    timings: Timings,
    arrival: Instant,
    events: mpsc::Sender<Event>,
}

impl Sequence {
    /// From a request; events go to `events`.
    pub fn new(request: Request, events: mpsc::Sender<Event>) -> Self {
        let Request { sampling, stopping, input, prefix, top_logprobs, score_from, head, .. } = request;
        let token = |row: &InputRow| if let InputRow::Token(id) = row { Some(*id) } else { None };
        let tokens: Vec<u32> = input.iter().filter_map(token).collect();
        Sequence {
            request_id: request.id,
            sampler: Sampler::new(sampling, &tokens, top_logprobs),
            top_logprobs,
            deadline: request.deadline,
            stop: StopMatcher::new(stopping.stop_sequences.clone(), stopping.include_stop_sequence),
            stopping,
            score_from,
            prompt_len: input.len(),
            scored: Vec::new(),
            head,
            pooled: None,
            detokenizer: Detokenizer::default(),
            usage: Usage { prompt: input.len(), prefix: prefix.map_or(0, |p| p.len()), ..Usage::default() },
            timings: Timings::default(),
            arrival: request.arrival,
            events,
        }
    }

    /// Whether nobody listens any more.
    pub fn abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// It runs for the first time, with `cached` prompt tokens found.
    pub fn admitted(&mut self, cached: usize) {
        if self.timings.queue.is_zero() {
            self.timings.queue = self.arrival.elapsed();
            self.usage.cached = cached;
        }
    }

    /// It was part of a step with so many sequences and adapters.
    pub fn shared(&mut self, sequences: usize, adapters: usize) {
        self.timings.batch_max_sequences = self.timings.batch_max_sequences.max(sequences);
        self.timings.batch_max_adapters = self.timings.batch_max_adapters.max(adapters);
    }

    /// It lost its pages.
    pub fn preempted(&mut self) {
        self.timings.preemptions += 1;
    }

    /// Tokens that must not be chosen now, with `unread` ones generated besides those that it took: the end, before `min_new_tokens`.
    pub fn banned<'a>(&self, eos: &'a [u32], unread: usize) -> &'a [u32] {
        if self.usage.generated + unread < self.stopping.min_new_tokens { eos } else { &[] }
    }

    /// The log-probability of own token `index`. What preemption makes it compute again is known already.
    pub fn scored(&mut self, index: usize, token: TokenLogprob) {
        if self.score_from.is_some_and(|from| index == from + self.scored.len()) {
            self.scored.push(token);
        }
    }

    /// What classifies it.
    pub fn head(&self) -> Option<&Arc<Head>> {
        self.head.as_ref()
    }

    /// The logits of the classes.
    pub fn pooled(&mut self, logits: Vec<f32>) {
        self.pooled = Some(logits);
    }

    /// Sends the scores or the class once they are complete; ends a sequence that wants nothing else.
    pub fn after_step(&mut self) -> Option<FinishReason> {
        if let Some(logits) = self.pooled.take() {
            self.timings.ttft = self.arrival.elapsed();
            self.send(Event::Pooled(logits));
            return Some(FinishReason::Stop);
        }
        let from = self.score_from?;
        if self.scored.len() + from == self.prompt_len {
            self.score_from = None;
            self.timings.ttft = self.arrival.elapsed();
            let scored = std::mem::take(&mut self.scored);
            self.send(Event::Scored(scored));
            return (self.stopping.max_new_tokens == 0).then_some(FinishReason::Length);
        }
        None
    }

    /// Takes a generated token; says whether the sequence ends with it, and by which stop sequence.
    pub fn generated(
        &mut self,
        token: Sampled,
        tokenizer: &Tokenizer,
        eos: &[u32],
    ) -> Result<Option<(FinishReason, Option<String>)>> {
        let (Sampled { id, logprob }, stopping) = (token, &self.stopping);
        self.usage.generated += 1;
        if self.usage.generated == 1 {
            self.timings.ttft = self.arrival.elapsed();
        }
        let ends = eos.contains(&id) && !stopping.ignore_eos;
        // The end token has no text of its own.
        let piece = if ends { String::new() } else { self.detokenizer.push(tokenizer, id)? };
        let matched = self.stop.push(&piece, self.usage.generated >= stopping.min_new_tokens);
        self.send(Event::Token { id, logprob, text: matched.text });
        Ok(match matched.stop {
            Some(stop) => Some((FinishReason::StopSequence, Some(stop))),
            None if ends => Some((FinishReason::Stop, None)),
            None if self.usage.generated >= self.stopping.max_new_tokens => Some((FinishReason::Length, None)),
            None => None,
        })
    }

    /// Ends it.
    pub fn finish(mut self, reason: FinishReason, stop_sequence: Option<String>, tokenizer: &Tokenizer) {
        let mut text = String::new();
        if stop_sequence.is_none() {
            // Held text and an unfinished character; a tokenizer that fails here has nothing to add.
            let rest = self.detokenizer.finish(tokenizer).unwrap_or_default();
            text = self.stop.push(&rest, false).text;
        }
        self.timings.e2el = self.arrival.elapsed();
        let (usage, timings) = (self.usage, self.timings);
        tracing::debug!(request_id = %self.request_id, reason = reason.as_str(), ?usage, "sequence ended");
        self.send(Event::Finished(Finish { reason, stop_sequence, text, usage, timings }));
    }

    /// Ends it with an error.
    pub fn fail(self, error: Error) {
        self.send(Event::Failed(error));
    }

    fn send(&self, event: Event) {
        match self.events.try_send(event) {
            // The client went away: the next step's reaping ends the sequence.
            Ok(()) | Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(_)) => tracing::error!(request_id = %self.request_id, "event channel is full"),
        }
    }
}
