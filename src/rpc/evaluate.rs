//! `Evaluate`: a dataset through an adapter and through the bare base, by the same calls that clients make.
use super::call::Call;
use super::convert;
use super::inference::Inference;
use super::proto::{self, classify_request, continuation, generate_request, score_request};
use crate::adapter::{Adapter, AdapterId, Registry};
use crate::error::{Error, Kind, Result};
use crate::tokenizer::chat::ChatMessage;
use crate::training::dataset::Record;
use crate::training::metrics;
use crate::training::settings::TARGET;
use std::collections::HashSet;
use std::sync::Arc;
use tokio::task::JoinSet;

/// Examples under way at once: enough to fill a step, few beside the queue of others.
const AT_ONCE: usize = 32;

/// Examples whose answers are returned.
const SHOWN: usize = 100;

/// Runs datasets. Cheap to clone.
#[derive(Clone)]
pub struct Evaluator {
    /// Answers.
    pub inference: Inference,
    /// Who is in service.
    pub registry: Arc<Registry>,
}

/// How one side answers.
#[derive(Clone)]
struct Side {
    adapter_id: String,
    generation: Option<u64>,
    task_id: Option<u32>,
    /// It has several.
    tasks: bool,
    /// What to choose from, and the names of the choices; `None`: it writes.
    labels: Option<Labels>,
    stopping: proto::Stopping,
    target_template: String,
}

#[derive(Clone)]
struct Labels {
    /// Empty: those of a head.
    texts: Vec<String>,
    names: Vec<String>,
}

/// A record's number, and the answer to it.
type Answered = (usize, Answer);

/// One answer.
struct Answer {
    text: String,
    /// Sum of log-probabilities of the first target's tokens, and their number.
    likelihood: Option<(f64, usize)>,
}

impl Evaluator {
    /// Answers for every record, and figures.
    pub async fn evaluate(
        &self,
        call: &Call,
        request: proto::EvaluateRequest,
        mut data: Vec<Record>,
    ) -> Result<proto::EvaluateResponse> {
        let most = if request.max_examples == 0 { data.len() } else { request.max_examples as usize };
        data.truncate(most);
        let template = request.target_template.clone().unwrap_or_else(|| TARGET.into());
        if template.matches(TARGET).count() != 1 {
            return Err(Error::invalid("target_template", format!("{template:?}"), format!("must hold {TARGET} once")));
        }
        let adapter = match request.adapter_id.as_str() {
            "" => None,
            id => Some(self.registry.resolve(&AdapterId::parse(id)?)?),
        };
        if request.generate && adapter.as_ref().is_some_and(|a| a.head.is_some()) {
            return Err(Error::invalid("generate", true, "but a head answers for this adapter"));
        }
        let side = Side::of(adapter.as_deref(), &request, template);
        let data: Arc<[Record]> = data.into();
        let mut answered: Vec<Answered> = self.side(call, &side, &data, 0..data.len()).await?;
        let base = side.base().filter(|_| adapter.is_some() && !request.skip_base);
        let mut base_answers = Vec::new();
        if let Some(base) = &base {
            base_answers = self.side(call, base, &data, answered.iter().map(|(i, _)| *i)).await?;
            // Both are judged by the same examples.
            let both: HashSet<usize> = base_answers.iter().map(|(i, _)| *i).collect();
            answered.retain(|(i, _)| both.contains(i));
        }
        if answered.is_empty() {
            let rule = "none of them fits into the context";
            return Err(Error::invalid("data", format!("{} examples", data.len()), rule));
        }
        let scores = figures(&side, &data, &answered);
        let base_scores = base.map(|base| figures(&base, &data, &base_answers));
        let shown = answered.iter().take(SHOWN).enumerate().map(|(at, (i, answer))| proto::EvaluatedExample {
            index: *i as u32,
            prediction: answer.text.clone(),
            base_prediction: base_answers.get(at).map(|(_, a)| a.text.clone()).unwrap_or_default(),
            target: data[*i].answers().first().map(|t| (*t).to_owned()).unwrap_or_default(),
        });
        Ok(proto::EvaluateResponse {
            request_id: call.id.to_string(),
            adapter: Some(convert::adapter_ref(&adapter)),
            examples: answered.len() as u32,
            too_long: (data.len() - answered.len()) as u32,
            scores: Some(scores),
            base_scores,
            answers: shown.collect(),
        })
    }

    /// The answers of one side to some records, in their order, without those that are too long for it. A caller that goes away ends it:
    /// its tasks go with the set.
    async fn side(
        &self,
        call: &Call,
        side: &Side,
        data: &Arc<[Record]>,
        mut some: impl Iterator<Item = usize>,
    ) -> Result<Vec<Answered>> {
        let (mut tasks, mut answers) = (JoinSet::new(), Vec::new());
        loop {
            while tasks.len() < AT_ONCE {
                let Some(index) = some.next() else { break };
                let (this, side, data, call) = (self.clone(), side.clone(), Arc::clone(data), call.part());
                tasks.spawn(async move { (index, this.answer(&call, &side, &data[index]).await) });
            }
            match tasks.join_next().await {
                None => {
                    answers.sort_unstable_by_key(|(index, _)| *index);
                    return Ok(answers);
                }
                Some(Ok((index, Ok(answer)))) => answers.push((index, answer)),
                Some(Ok((_, Err(e)))) if e.is_too_long() => {}
                Some(Ok((index, Err(e)))) => return Err(e.context(format!("example {index}"))),
                Some(Err(e)) => return Err(Error::internal(format!("evaluation: {e}"))),
            }
        }
    }

    /// One record's answer; a full queue is waited for.
    async fn answer(&self, call: &Call, side: &Side, record: &Record) -> Result<Answer> {
        loop {
            match self.try_answer(call, side, record).await {
                Err(e) if e.kind() == Kind::ResourceExhausted && e.retry_after().is_some() => {
                    tokio::time::sleep(e.retry_after().unwrap_or_default()).await;
                }
                answer => return answer,
            }
        }
    }

    async fn try_answer(&self, call: &Call, side: &Side, record: &Record) -> Result<Answer> {
        // The bare base has no tasks. To an adapter without them, the first is what it has.
        let of_record = record.task_id.filter(|task| !side.adapter_id.is_empty() && (side.tasks || *task > 0));
        let task_id = side.task_id.or(of_record);
        let (adapter_id, adapter_generation) = (side.adapter_id.clone(), side.generation);
        if let Some(labels) = &side.labels {
            let input = match &record.input {
                Some(prompt) => classify_request::Input::Prompt(prompt.clone()),
                None => classify_request::Input::Messages(messages(record)),
            };
            let (input, texts) = (Some(input), labels.texts.clone());
            let request = proto::ClassifyRequest {
                adapter_id,
                adapter_generation,
                input,
                labels: texts,
                task_id,
                ..Default::default()
            };
            let label = self.inference.classified(call, request).await?.label;
            let name = labels.texts.iter().position(|t| *t == label).and_then(|i| labels.names.get(i));
            let text = name.cloned().unwrap_or(label);
            // A head has no likelihood of tokens.
            let likelihood =
                if labels.texts.is_empty() { None } else { self.likelihood(call, side, record, task_id).await? };
            return Ok(Answer { text, likelihood });
        }
        let generate = match &record.input {
            Some(prompt) => generate_request::Input::Prompt(prompt.clone()),
            None => generate_request::Input::Messages(messages(record)),
        };
        let request = proto::GenerateRequest {
            adapter_id,
            adapter_generation,
            input: Some(generate),
            sampling: Some(proto::Sampling { temperature: Some(0.0), ..Default::default() }),
            stopping: Some(side.stopping.clone()),
            task_id,
            ..Default::default()
        };
        let text = self.inference.generated(call, request).await?.choices.into_iter().next().map(|c| c.text);
        let likelihood = self.likelihood(call, side, record, task_id).await?;
        Ok(Answer { text: text.unwrap_or_default(), likelihood })
    }

    /// Of the first target: the sum of its tokens' log-probabilities, and their number.
    async fn likelihood(
        &self,
        call: &Call,
        side: &Side,
        record: &Record,
        task_id: Option<u32>,
    ) -> Result<Option<(f64, usize)>> {
        let input = match &record.input {
            Some(prompt) => score_request::Input::Prompt(prompt.clone()),
            None => score_request::Input::Messages(messages(record)),
        };
        let target = record.answers().first().copied().unwrap_or_default();
        // A label is written as its verbalizer.
        let verbalizer = side.labels.as_ref().and_then(|labels| {
            let at = labels.names.iter().position(|name| name == target.trim())?;
            labels.texts.get(at).cloned()
        });
        let target = verbalizer.unwrap_or_else(|| side.target_template.replace(TARGET, target));
        let request = proto::ScoreRequest {
            adapter_id: side.adapter_id.clone(),
            adapter_generation: side.generation,
            input: Some(input),
            continuations: vec![proto::Continuation { content: Some(continuation::Content::Text(target)) }],
            task_id,
            ..Default::default()
        };
        let scored = self.inference.scored(call, request).await?.scores.into_iter().next();
        Ok(scored.map(|s| (s.logprob, s.tokens.len())))
    }
}

/// A chat without its last message, which is the answer.
fn messages(record: &Record) -> proto::Messages {
    let asked = &record.messages[..record.messages.len().saturating_sub(1)];
    let message = |m: &ChatMessage| proto::ChatMessage { role: m.role.clone(), content: m.content.clone() };
    proto::Messages { messages: asked.iter().map(message).collect(), add_generation_prompt: Some(true) }
}

impl Side {
    fn of(adapter: Option<&Adapter>, request: &proto::EvaluateRequest, target_template: String) -> Self {
        let chooses = |a: &&Adapter| a.head.is_some() || !a.card.labels.is_empty() && !request.generate;
        let labels = adapter.filter(chooses).map(|a| {
            let head = a.head.is_some();
            let texts = if head { Vec::new() } else { a.card.verbalizers().to_vec() };
            Labels { texts: texts.clone(), names: a.card.labels.clone() }
        });
        // The bare base ends its answers where the adapter does.
        let stopping =
            adapter.map(|a| a.card.stopping()).map_or_else(proto::Stopping::default, |card| proto::Stopping {
                stop_sequences: card.stop_sequences.clone(),
                max_new_tokens: card.max_new_tokens.map(|n| n as u32),
                ..Default::default()
            });
        Side {
            adapter_id: request.adapter_id.clone(),
            generation: adapter.map(|a| a.generation.0),
            task_id: request.task_id,
            tasks: adapter.is_some_and(|a| a.tasks.is_some()),
            labels,
            stopping,
            target_template,
        }
    }

    /// The bare base doing the same; `None` where a head answers, which it does not have.
    fn base(&self) -> Option<Self> {
        let head = self.labels.as_ref().is_some_and(|l| l.texts.is_empty());
        (!head).then(|| Side { adapter_id: String::new(), generation: None, task_id: None, ..self.clone() })
    }
}

fn figures(side: &Side, data: &[Record], answers: &[Answered]) -> proto::EvaluationScores {
    let predictions: Vec<&str> = answers.iter().map(|(_, a)| a.text.trim()).collect();
    let references: Vec<Vec<&str>> =
        answers.iter().map(|(i, _)| data[*i].answers().iter().map(|t| t.trim()).collect()).collect();
    let exact_match = metrics::exact_match(&predictions, &references);
    let (sum, tokens) =
        answers.iter().filter_map(|(_, a)| a.likelihood).fold((0.0, 0), |(s, n), (l, k)| (s + l, n + k));
    let perplexity = (tokens > 0).then(|| metrics::perplexity(-sum, tokens));
    if side.labels.is_some() {
        let right: Vec<&str> = references.iter().map(|r| r.first().copied().unwrap_or("")).collect();
        let macro_f1 = Some(metrics::macro_f1(&predictions, &right));
        return proto::EvaluationScores { exact_match, macro_f1, perplexity, ..Default::default() };
    }
    let rouge = metrics::rouge(&predictions, &references);
    proto::EvaluationScores {
        exact_match,
        bleu: Some(metrics::bleu(&predictions, &references)),
        rouge1: Some(rouge.rouge1),
        rouge2: Some(rouge.rouge2),
        rouge_l: Some(rouge.rouge_l),
        perplexity,
        ..Default::default()
    }
}
