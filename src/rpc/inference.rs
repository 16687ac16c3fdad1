//! `InferenceService`: admission, the engine, and the answer's form.
use super::admission::{Admission, Scoring};
use super::call::Call;
use super::convert::{self, Vocabulary};
use super::drain::Drain;
use super::outcome::{self, Outcome};
use super::proto::{self, inference_service_server::InferenceService};
use super::stream::Answer;
use crate::adapter::InputRow;
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
            Ok((admitted.who, admitted.wanted, receivers))
        });
        match submitted {
            Err(e) => Err(call.fail(e)),
            Ok((who, wanted, receivers)) => {
                let headers = call.response(());
                let answer = Answer::new(call, who, self.vocabulary(), wanted, receivers);
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
    pub(super) async fn generated(
        &self,
        call: &Call,
        message: proto::GenerateRequest,
    ) -> Result<proto::GenerateResponse> {
        let admitted = self.admission.generate(call, message).await?;
        let outcomes = outcome::run(&self.engine, &admitted.who.adapter, admitted.requests).await?;
        let vocabulary = self.vocabulary();
        let usage = outcome::usage_of_choices(&outcomes);
        // The slowest choice is the request's time.
        let slowest = outcomes.iter().map(|o| &o.finish.timings).max_by_key(|t| t.e2el);
        let choice = |(index, o): (usize, &Outcome)| proto::Choice {
            index: index as u32,
            text: o.text.clone(),
            token_ids: if admitted.wanted.token_ids { o.tokens.clone() } else { Vec::new() },
            logprobs: if admitted.wanted.logprobs { vocabulary.logprobs(&o.logprobs) } else { Vec::new() },
            finish_reason: convert::finish_reason(o.finish.reason).into(),
            stop_sequence: o.finish.stop_sequence.clone().unwrap_or_default(),
        };
        Ok(proto::GenerateResponse {
            request_id: call.id.to_string(),
            choices: outcomes.iter().enumerate().map(choice).collect(),
            input_logprobs: outcomes.first().map(|o| vocabulary.logprobs(&o.scored)).unwrap_or_default(),
            usage: Some(convert::usage(usage)),
            timings: slowest.map(convert::timings),
            adapter: Some(convert::adapter_ref(&admitted.who.adapter)),
            prefix_adapters: convert::adapter_refs(&admitted.who.stacked),
        })
    }

    pub(super) async fn scored(&self, call: &Call, message: proto::ScoreRequest) -> Result<proto::ScoreResponse> {
        let Scoring { who, requests, .. } = self.admission.score(call, message).await?;
        let outcomes = outcome::run(&self.engine, &who.adapter, requests).await?;
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
            adapter: Some(convert::adapter_ref(&who.adapter)),
            prefix_adapters: convert::adapter_refs(&who.stacked),
        })
    }

    pub(super) async fn classified(
        &self,
        call: &Call,
        message: proto::ClassifyRequest,
    ) -> Result<proto::ClassifyResponse> {
        let Scoring { who, requests, labels } = self.admission.classify(call, message).await?;
        let outcomes = outcome::run(&self.engine, &who.adapter, requests).await?;
        let scores = match outcomes.as_slice() {
            [Outcome { pooled, .. }] if !pooled.is_empty() => label_scores(labels, &log_softmax(pooled)),
            _ => label_scores(labels, &outcomes.iter().map(sum_logprob).collect::<Vec<_>>()),
        };
        Ok(proto::ClassifyResponse {
            request_id: call.id.to_string(),
            label: scores.first().map(|s| s.label.clone()).unwrap_or_default(),
            scores,
            usage: Some(convert::usage(outcome::usage_of_all(&outcomes))),
            adapter: Some(convert::adapter_ref(&who.adapter)),
            prefix_adapters: convert::adapter_refs(&who.stacked),
        })
    }

    async fn tokenized(&self, message: proto::TokenizeRequest) -> Result<proto::TokenizeResponse> {
        let input = self.admission.tokenize(message).await?;
        let token = |row: &InputRow| if let InputRow::Token(id) = row { Some(*id) } else { None };
        let token_ids: Vec<u32> = input.rows.iter().filter_map(token).collect();
        Ok(proto::TokenizeResponse {
            tokens: token_ids.iter().map(|&id| self.admission.tokenizer().token_text(id)).collect(),
            prefix_tokens: input.who.prefix_len() as u32,
            virtual_tokens: (input.rows.len() - token_ids.len()) as u32,
            token_ids,
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

/// The labels and their log-probabilities, best first, with probabilities that sum to 1.
fn label_scores(labels: Vec<String>, logprobs: &[f64]) -> Vec<proto::LabelScore> {
    let total = log_sum_exp(logprobs);
    let score = |(label, logprob): (String, &f64)| proto::LabelScore {
        label,
        probability: (logprob - total).exp(),
        logprob: *logprob,
    };
    let mut scores: Vec<_> = labels.into_iter().zip(logprobs).map(score).collect();
    // Stable: equal labels stay in the card's order.
    scores.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
    scores
}

fn log_sum_exp(values: &[f64]) -> f64 {
    let best = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    best + values.iter().map(|v| (v - best).exp()).sum::<f64>().ln()
}

/// A head's logits as log-probabilities.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let logits: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
    let total = log_sum_exp(&logits);
    logits.into_iter().map(|logit| logit - total).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logits_become_labels_best_first() {
        let scores = label_scores(["a", "b", "c"].map(String::from).to_vec(), &log_softmax(&[1000.0, 1002.0, 1001.0]));
        let labels: Vec<_> = scores.iter().map(|s| s.label.as_str()).collect();
        assert_eq!(labels, ["b", "c", "a"]);
        let total: f64 = (0..3).map(|i| f64::from(-i).exp()).sum();
        for (i, score) in scores.iter().enumerate() {
            assert!((score.logprob - (-(i as f64) - total.ln())).abs() < 1e-12, "{score:?}");
            assert!((score.probability - score.logprob.exp()).abs() < 1e-12, "{score:?}");
        }
    }
}
