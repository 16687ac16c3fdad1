//! An answer as it comes: the events of `n` sequences merged into one stream of messages.
//!
//! Dropping the stream (the client went away) drops the receivers, and that cancels the sequences in the engine.
//! A client that reads slowly holds up nobody: each receiver has room for all events of its sequence.
use super::admission::{Wanted, Who};
use super::call::Call;
use super::convert::{self, Vocabulary};
use super::outcome::{stopped, unfinished};
use super::{proto, record};
use crate::engine::request::{Event, Finish, TokenLogprob};
use crate::error::Error;
use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc::Receiver;
use tokio_stream::Stream;
use tonic::Status;

/// A `GenerateStream`'s messages.
pub struct Answer {
    call: Call,
    who: Who,
    vocabulary: Vocabulary,
    wanted: Wanted,
    /// By choice; `None` once it has ended.
    choices: Vec<Option<Receiver<Event>>>,
    /// The choice to ask first: each in turn, so that none waits behind a chatty one.
    next: usize,
    /// Messages that are ready.
    ready: VecDeque<proto::GenerateStreamResponse>,
    /// The status to end with, once all choices have ended.
    error: Option<Error>,
    over: bool,
}

impl Answer {
    /// A stream over the choices' `receivers`. Its first message says who answers.
    pub fn new(call: Call, who: Who, vocabulary: Vocabulary, wanted: Wanted, receivers: Vec<Receiver<Event>>) -> Self {
        let first = proto::GenerateStreamResponse {
            request_id: call.id.to_string(),
            adapter: Some(convert::adapter_ref(&who.adapter)),
            prefix_adapters: convert::adapter_refs(&who.stacked),
            ..Default::default()
        };
        let choices = receivers.into_iter().map(Some).collect();
        Answer {
            call,
            who,
            vocabulary,
            wanted,
            choices,
            next: 0,
            ready: VecDeque::from([first]),
            error: None,
            over: false,
        }
    }

    fn message(&self) -> proto::GenerateStreamResponse {
        proto::GenerateStreamResponse { request_id: self.call.id.to_string(), ..Default::default() }
    }

    /// Takes one event of a choice in.
    fn take(&mut self, index: usize, event: Event) {
        match event {
            Event::Scored(tokens) => {
                let input_logprobs = self.vocabulary.logprobs(&tokens);
                let message = proto::GenerateStreamResponse { input_logprobs, ..self.message() };
                self.ready.push_back(message);
            }
            // A stream never asks for a class.
            Event::Pooled(_) => {}
            Event::Token { id, logprob, text } => self.token(index, id, logprob, text),
            Event::Finished(finish) => self.finished(index, finish),
            Event::Failed(error) => self.fail(error),
        }
    }

    fn token(&mut self, index: usize, id: u32, logprob: Option<TokenLogprob>, text: String) {
        let logprob = logprob.filter(|_| self.wanted.logprobs);
        let token_ids = self.wanted.token_ids;
        if text.is_empty() && logprob.is_none() && !token_ids {
            return;
        }
        let choice = proto::Choice {
            index: index as u32,
            text,
            token_ids: if token_ids { vec![id] } else { Vec::new() },
            logprobs: logprob.iter().map(|l| self.vocabulary.logprob(l)).collect(),
            ..Default::default()
        };
        let message = proto::GenerateStreamResponse { choice: Some(choice), ..self.message() };
        self.ready.push_back(message);
    }

    fn finished(&mut self, index: usize, finish: Finish) {
        self.call.span.in_scope(|| record::finished(&self.who.adapter, index, &finish));
        self.choices[index] = None;
        self.error = self.error.take().or_else(|| unfinished(finish.reason));
        let choice = proto::Choice {
            index: index as u32,
            text: finish.text,
            finish_reason: convert::finish_reason(finish.reason).into(),
            stop_sequence: finish.stop_sequence.unwrap_or_default(),
            ..Default::default()
        };
        let message = proto::GenerateStreamResponse {
            choice: Some(choice),
            usage: Some(convert::usage(finish.usage)),
            timings: Some(convert::timings(&finish.timings)),
            ..self.message()
        };
        self.ready.push_back(message);
    }

    /// One choice's failure is the call's: the others are cancelled.
    fn fail(&mut self, error: Error) {
        self.choices.fill_with(|| None);
        self.error = Some(error);
    }

    /// Asks each choice once. False: none has anything now.
    fn poll_choices(&mut self, cx: &mut Context<'_>) -> bool {
        for turn in 0..self.choices.len() {
            let index = (self.next + turn) % self.choices.len();
            let Some(receiver) = &mut self.choices[index] else { continue };
            match receiver.poll_recv(cx) {
                Poll::Pending => continue,
                Poll::Ready(Some(event)) => self.take(index, event),
                Poll::Ready(None) => self.fail(stopped()),
            }
            self.next = index + 1;
            return true;
        }
        false
    }
}

impl Stream for Answer {
    type Item = Result<proto::GenerateStreamResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(message)));
            }
            if self.over {
                return Poll::Ready(None);
            }
            if self.choices.iter().all(Option::is_none) {
                self.over = true;
                return match self.error.take() {
                    Some(error) => Poll::Ready(Some(Err(self.call.fail(error)))),
                    None => {
                        self.call.done();
                        Poll::Ready(None)
                    }
                };
            }
            if !self.poll_choices(cx) {
                return Poll::Pending;
            }
        }
    }
}
