//! `InferenceService`: admission, the engine, and the answer's form.
use super::admission::{Admission, Scoring, prefix_len};
use super::call::Call;
use super::convert::{self, Vocabulary};
use super::drain::Drain;
use super::outcome::{self, Outcome};
use super::proto::{self, inference_service_server::InferenceService};
use super::stream::Answer;
use crate::engine::EngineHandle;
use crate::error::Result;
use tonic::{Request, Response, Status};

/// Runs requests of any task in one shared batch.
#[derive(Clone)]
pub struct Inference {
    /// Checks requests.
    pub admission: Admission,
    /// Runs them.
    pub engine: EngineHandle,
    /// Closed while the server drains.
    pub drain: Drain,
}

#[tonic::async_trait]
impl InferenceService for Inference {
    type GenerateStreamStream = Answer;

    async fn generate(
        &self,
        request: Request<proto::GenerateRequest>,
    ) -> Result<Response<proto::GenerateResponse>, Status> {
        let call = Call::work("Generate", request.metadata(), &self.drain)?;
        let result = call.within(self.generated(&call, request.into_inner())).await;
        call.finish(result)
    }

    async fn generate_stream(&self, request: Request<proto::GenerateRequest>) -> Result<Response<Answer>, Status> {
        let mut call = Call::work("GenerateStream", request.metadata(), &self.drain)?;
        let admitted = call.within(self.admission.generate(&call, request.into_inner())).await;
        let submitted = admitted.and_then(|admitted| {
            let receivers = outcome::submit(&self.engine, admitted.requests)?;
            Ok((admitted.adapter, admitted.wanted, receivers))
        });
        match submitted {
            Err(e) => Err(call.fail(e)),
            Ok((adapter, wanted, receivers)) => {
                let headers = call.response(());
                let answer = Answer::new(call, adapter, self.vocabulary(), wanted, receivers);
                Ok(headers.map(|()| answer))
            }
        }
    }

    async fn score(&self, request: Request<proto::ScoreRequest>) -> Result<Response<proto::ScoreResponse>, Status> {
        let call = Call::work("Score", request.metadata(), &self.drain)?;
        let result = call.within(self.scored(&call, request.into_inner())).await;
        call.finish(result)
    }

    async fn classify(
        &self,
        request: Request<proto::ClassifyRequest>,
    ) -> Result<Response<proto::ClassifyResponse>, Status> {
        let call = Call::work("Classify", request.metadata(), &self.drain)?;
        let result = call.within(self.classified(&call, request.into_inner())).await;
        call.finish(result)
    }

    async fn tokenize(
        &self,
        request: Request<proto::TokenizeRequest>,
    ) -> Result<Response<proto::TokenizeResponse>, Status> {
        let call = Call::work("Tokenize", request.metadata(), &self.drain)?;
        let result = call.within(self.tokenized(request.into_inner())).await;
        call.finish(result)
    }
}

impl Inference {
    async fn generated(&self, call: &Call, message: proto::GenerateRequest) -> Result<proto::GenerateResponse> {
        let admitted = self.admission.generate(call, message).await?;
        let outcomes = outcome::run(&self.engine, &admitted.adapter, admitted.requests).await?;
        let vocabulary = self.vocabulary();
        let usage = outcome::usage_of_choices(&outcomes);
        // The slowest choice is the request's time.
        let slowest = outcomes.iter().map(|o| &o.finish.timings).max_by_key(|t| t.e2el);
        let choice = |(index, o): (usize, &Outcome)| proto::Choice {
            index: index as u32,
            text: o.text.clone(),
            token_ids: if admitted.wanted.token_ids { o.tokens.iter().map(|t| t.id).collect() } else { Vec::new() },
            logprobs: if admitted.wanted.logprobs { vocabulary.logprobs(&o.tokens) } else { Vec::new() },
            finish_reason: convert::finish_reason(o.finish.reason).into(),
            stop_sequence: o.finish.stop_sequence.clone().unwrap_or_default(),
        };
        Ok(proto::GenerateResponse {
            request_id: call.id.to_string(),
            choices: outcomes.iter().enumerate().map(choice).collect(),
            input_logprobs: outcomes.first().map(|o| vocabulary.logprobs(&o.scored)).unwrap_or_default(),
            usage: Some(convert::usage(usage)),
            timings: slowest.map(convert::timings),
            adapter: Some(convert::adapter_ref(&admitted.adapter)),
        })
    }

    async fn scored(&self, call: &Call, message: proto::ScoreRequest) -> Result<proto::ScoreResponse> {
        let Scoring { adapter, requests, .. } = self.admission.score(call, message).await?;
        let outcomes = outcome::run(&self.engine, &adapter, requests).await?;
        let vocabulary = self.vocabulary();
        let score = |o: &Outcome| {
            let logprob = sum_logprob(o);
            proto::ContinuationScore {
                tokens: vocabulary.logprobs(&o.scored),
                logprob,
                perplexity: (-logprob / o.scored.len() as f64).exp(),
            }
        };
        Ok(proto::ScoreResponse {
            request_id: call.id.to_string(),
            scores: outcomes.iter().map(score).collect(),
            usage: Some(convert::usage(outcome::usage_of_all(&outcomes))),
            adapter: Some(convert::adapter_ref(&adapter)),
        })
    }

    async fn classified(&self, call: &Call, message: proto::ClassifyRequest) -> Result<proto::ClassifyResponse> {
        let Scoring { adapter, requests, labels } = self.admission.classify(call, message).await?;
        let outcomes = outcome::run(&self.engine, &adapter, requests).await?;
        let logprobs: Vec<f64> = outcomes.iter().map(sum_logprob).collect();
        let best = logprobs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logprobs.iter().map(|l| (l - best).exp()).sum();
        let score = |(label, logprob): (String, &f64)| proto::LabelScore {
            label,
            probability: (logprob - best).exp() / total,
            logprob: *logprob,
        };
        let mut scores: Vec<_> = labels.into_iter().zip(&logprobs).map(score).collect();
        // Stable: equal labels stay in the card's order.
        scores.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
        Ok(proto::ClassifyResponse {
            request_id: call.id.to_string(),
            label: scores.first().map(|s| s.label.clone()).unwrap_or_default(),
            scores,
            usage: Some(convert::usage(outcome::usage_of_all(&outcomes))),
            adapter: Some(convert::adapter_ref(&adapter)),
        })
    }

    async fn tokenized(&self, message: proto::TokenizeRequest) -> Result<proto::TokenizeResponse> {
        let input = self.admission.tokenize(message).await?;
        Ok(proto::TokenizeResponse {
            tokens: input.tokens.iter().map(|&id| self.admission.tokenizer().token_text(id)).collect(),
            prefix_tokens: prefix_len(&input.adapter) as u32,
            token_ids: input.tokens,
            text: input.text,
        })
    }

    fn vocabulary(&self) -> Vocabulary {
        Vocabulary(self.admission.tokenizer().clone())
    }
}

/// Sum in f64: hundreds of small terms.
fn sum_logprob(outcome: &Outcome) -> f64 {
    outcome.scored.iter().map(|t| f64::from(t.logprob)).sum()
}
