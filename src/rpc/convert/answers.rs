//! Answers of the engine to protobuf.
use crate::engine::request::{FinishReason, Timings, TokenLogprob, Usage};
use crate::rpc::proto;
use crate::tokenizer::Tokenizer;
use std::time::Duration;

/// Puts the tokens' texts beside their ids.
#[derive(Clone)]
pub struct Vocabulary(pub Tokenizer);

impl Vocabulary {
    /// Log-probabilities with texts. `top`: with the most likely tokens.
    pub fn logprob(&self, token: &TokenLogprob) -> proto::TokenLogprob {
        let top = |&(token_id, logprob): &(u32, f32)| proto::TopLogprob {
            token_id,
            text: self.0.token_text(token_id),
            logprob,
        };
        proto::TokenLogprob {
            token_id: token.id,
            text: self.0.token_text(token.id),
            logprob: token.logprob,
            top: token.top.iter().map(top).collect(),
        }
    }

    /// The same for a row of tokens.
    pub fn logprobs(&self, tokens: &[TokenLogprob]) -> Vec<proto::TokenLogprob> {
        tokens.iter().map(|t| self.logprob(t)).collect()
    }
}

/// Why a sequence ended.
pub fn finish_reason(reason: FinishReason) -> proto::FinishReason {
    match reason {
        FinishReason::Stop => proto::FinishReason::Stop,
        FinishReason::Length => proto::FinishReason::Length,
        FinishReason::StopSequence => proto::FinishReason::StopSequence,
        FinishReason::Cancelled => proto::FinishReason::Cancelled,
        FinishReason::Deadline => proto::FinishReason::Deadline,
    }
}

/// Tokens used.
pub fn usage(usage: Usage) -> proto::Usage {
    proto::Usage {
        prompt_tokens: usage.prompt as u32,
        prefix_tokens: usage.prefix as u32,
        cached_tokens: usage.cached as u32,
        generated_tokens: usage.generated as u32,
    }
}

/// Where the time went.
pub fn timings(timings: &Timings) -> proto::Timings {
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    proto::Timings {
        queue_ms: ms(timings.queue),
        ttft_ms: ms(timings.ttft),
        e2el_ms: ms(timings.e2el),
        batch_max_sequences: timings.batch_max_sequences as u32,
        batch_max_adapters: timings.batch_max_adapters as u32,
        preemptions: timings.preemptions as u32,
    }
}
