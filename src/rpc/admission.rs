//! From a client's request to sequences that the engine may run. Everything that can be refused for its form is
//! refused here, before the queue.
mod input;
mod who;

use super::call::Call;
use super::convert::{self, Prompt, Room, Target};
use super::proto;
use crate::adapter::{Head, InputRow, Registry};
use crate::config::Limits;
use crate::engine::request::{Request, Sampling, Stopping};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat::ChatTemplate;
use std::sync::Arc;
use tokio::sync::Semaphore;

pub use who::Who;

/// Long texts that are worded and tokenised at once: a crowd of huge prompts must not take the engine's cores.
const LARGE_TEXTS: usize = 2;

/// Most likely tokens that may be asked for at each place.
const MAX_TOP_LOGPROBS: u32 = 20;

/// Checks requests and makes sequences of them.
#[derive(Clone)]
pub struct Admission {
    large_texts: Arc<Semaphore>,
    parts: Parts,
}

/// What an admission works with.
#[derive(Clone)]
pub struct Parts {
    /// The base model's tokenizer.
    pub tokenizer: Tokenizer,
    /// How it words conversations; else why it cannot.
    pub chat_template: Result<ChatTemplate>,
    /// Who is loaded.
    pub registry: Arc<Registry>,
    /// What a request may ask for.
    pub limits: Limits,
    /// Longest sequence, prefix included.
    pub max_model_len: usize,
    /// Token ids of the model.
    pub vocab_size: usize,
    /// The base classifies and writes nothing.
    pub encoder: bool,
    /// The base's own classification head and the names of its classes, if it came with one.
    pub classifier: Option<(Arc<Head>, Vec<String>)>,
}

/// An input ready for the engine, and whom it is for.
pub struct Input {
    /// Who answers.
    pub who: Who,
    /// After template and tokenizer; not empty.
    pub rows: Vec<InputRow>,
    /// After the template; empty where token ids were given.
    pub text: String,
}

/// What to return besides the text.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// Log-probabilities of generated tokens.
    pub logprobs: bool,
    /// Ids of generated tokens.
    pub token_ids: bool,
}

/// A `Generate` ready to be submitted.
pub struct Answering {
    /// Who answers.
    pub who: Who,
    /// One for each choice.
    pub requests: Vec<Request>,
    /// What to return besides the text.
    pub wanted: Wanted,
}

/// A `Score` or `Classify` ready to be submitted.
pub struct Scoring {
    /// Who answers.
    pub who: Who,
    /// One for each continuation; a single one for a head.
    pub requests: Vec<Request>,
    /// The labels that the continuations or the head's logits stand for; empty for `Score`.
    pub labels: Vec<String>,
}

impl Admission {
    /// An admission over its parts.
    pub fn new(parts: Parts) -> Self {
        Admission { large_texts: Arc::new(Semaphore::new(LARGE_TEXTS)), parts }
    }

    /// The base model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.parts.tokenizer
    }

    /// Checks a `Generate`.
    pub async fn generate(&self, call: &Call, message: proto::GenerateRequest) -> Result<Answering> {
        self.check_writes("Generate")?;
        let target = Target::new(&message.adapter_id, message.adapter_generation, message.skip_template)?
            .with(&message.prefix_adapter_ids, message.task_id)?;
        let n = convert::choices(message.sampling.as_ref(), &self.parts.limits)?;
        let output = message.output.unwrap_or_default();
        if output.logprobs.is_some_and(|k| k > MAX_TOP_LOGPROBS) {
            let rule = format!("must be from 0 to {MAX_TOP_LOGPROBS}");
            return Err(Error::invalid("output.logprobs", output.logprobs.unwrap_or(0), rule));
        }
        let input = self.input(self.who(&target)?, target.skip_template, message.input.try_into()?).await?;
        if output.input_logprobs && input.who.soft.is_some() {
            let rule = "but virtual tokens stand in this adapter's input, and they have no probability";
            return Err(Error::invalid("output.input_logprobs", true, rule));
        }
        let card = input.who.adapter.as_ref().map(|a| &a.card);
        let card_sampling = card.map(|c| *c.sampling()).unwrap_or_default();
        let sampling = convert::sampling(message.sampling.as_ref(), &card_sampling)?;
        let stopping = convert::stopping(
            message.stopping,
            card.map(|c| c.stopping().clone()).unwrap_or_default(),
            self.room(&input),
            &self.parts.limits,
            output.input_logprobs,
        )?;
        // The first input token has no log-probability.
        let score_from = (output.input_logprobs && input.rows.len() > 1).then_some(1);
        let seed = sampling.seed;
        let first = Request {
            top_logprobs: output.logprobs.map(|k| k as usize),
            ..sequence(call, &input.who, input.rows, sampling, stopping)
        };
        let requests = (0..n as u64).map(|i| Request {
            sampling: Sampling { seed: seed.wrapping_add(i), ..first.sampling.clone() },
            score_from: score_from.filter(|_| i == 0),
            ..first.clone()
        });
        let wanted = Wanted { logprobs: output.logprobs.is_some(), token_ids: output.token_ids };
        Ok(Answering { requests: requests.collect(), who: input.who, wanted })
    }

    /// Checks a `Score`.
    pub async fn score(&self, call: &Call, message: proto::ScoreRequest) -> Result<Scoring> {
        self.check_writes("Score")?;
        let target = Target::new(&message.adapter_id, message.adapter_generation, message.skip_template)?
            .with(&message.prefix_adapter_ids, message.task_id)?;
        self.check_continuations("continuations", message.continuations.len())?;
        let continuations = message.continuations.into_iter().map(convert::content).collect::<Result<Vec<_>>>()?;
        let bytes = continuations.iter().map(|c| if let Prompt::Text(t) = c { t.len() } else { 0 }).sum();
        self.check_bytes("continuations", bytes)?;
        let input = self.input(self.who(&target)?, target.skip_template, message.input.try_into()?).await?;
        let continuations = self.continuations("continuations", continuations).await?;
        self.scoring(call, input, continuations, Vec::new())
    }

    /// Checks a `Classify`.
    pub async fn classify(&self, call: &Call, message: proto::ClassifyRequest) -> Result<Scoring> {
        let target = Target::new(&message.adapter_id, message.adapter_generation, message.skip_template)?
            .with(&message.prefix_adapter_ids, message.task_id)?;
        let who = self.who(&target)?;
        let prompt = message.input.try_into()?;
        if let Some((head, labels)) = self.classifier(&who)? {
            if !message.labels.is_empty() {
                let rule = "but a trained head answers here, which has labels of its own";
                return Err(Error::invalid("labels", format!("a list of {}", message.labels.len()), rule));
            }
            return self.pooled(call, self.input(who, target.skip_template, prompt).await?, head, labels);
        }
        let (labels, texts) = match (message.labels, &who.adapter) {
            (labels, _) if !labels.is_empty() => (labels.clone(), labels),
            (_, Some(adapter)) if !adapter.card.labels.is_empty() => {
                (adapter.card.labels.clone(), adapter.card.verbalizers().to_vec())
            }
            _ => return Err(Error::invalid("labels", "empty", "and the adapter's task card has none either")),
        };
        self.check_continuations("labels", labels.len())?;
        self.check_bytes("labels", texts.iter().map(String::len).sum())?;
        let input = self.input(who, target.skip_template, prompt).await?;
        let texts = texts.into_iter().map(Prompt::Text).collect();
        let continuations = self.continuations("labels", texts).await?;
        self.scoring(call, input, continuations, labels)
    }

    /// Checks a `Tokenize`.
    pub async fn tokenize(&self, message: proto::TokenizeRequest) -> Result<Input> {
        let target = Target::new(&message.adapter_id, None, message.skip_template)?
            .with(&message.prefix_adapter_ids, message.task_id)?;
        let prompt = match message.messages {
            Some(messages) if message.prompt.is_empty() => Prompt::Chat(messages.try_into()?),
            Some(_) => {
                return Err(Error::invalid("prompt", format!("{:?}", message.prompt), "but `messages` is given"));
            }
            None => Prompt::Text(message.prompt),
        };
        self.input(self.who(&target)?, target.skip_template, prompt).await
    }

    fn who(&self, target: &Target) -> Result<Who> {
        Who::resolve(&self.parts.registry, target)
    }

    fn scoring(&self, call: &Call, input: Input, continuations: Vec<Vec<u32>>, labels: Vec<String>) -> Result<Scoring> {
        let room = self.room(&input);
        let mut requests = Vec::with_capacity(continuations.len());
        for continuation in continuations {
            room.check("continuations", continuation.len(), continuation.len())?;
            let rows = input.rows.iter().copied().chain(continuation.into_iter().map(InputRow::Token)).collect();
            let request = sequence(call, &input.who, rows, Sampling::default(), Stopping::default());
            requests.push(Request { score_from: Some(input.rows.len()), ..request });
        }
        Ok(Scoring { who: input.who, requests, labels })
    }

    /// The head that answers: the adapter's, or that of an encoder; with the names of its classes. `None`: the labels
    /// are texts that a decoder scores.
    fn classifier(&self, who: &Who) -> Result<Option<(Arc<Head>, Vec<String>)>> {
        let card = who.adapter.as_ref().map_or(&[][..], |a| &a.card.labels);
        let (head, names) = match (who.adapter.as_ref().and_then(|a| a.head.clone()), &self.parts.classifier) {
            (Some(head), _) => (head, None),
            (None, _) if !self.parts.encoder => return Ok(None),
            (None, Some((head, names))) => (head.clone(), Some(names)),
            (None, None) => {
                return Err(Error::precondition(
                    "the base is an encoder without a classification head: Classify needs an adapter with one \
                     (`classifier` in its weights)",
                ));
            }
        };
        let count = head.labels();
        let labels = match names {
            _ if card.len() == count => card.to_vec(),
            _ if !card.is_empty() => {
                let what = format!("the task card has {} `labels`, the base's head {count}", card.len());
                return Err(Error::precondition(what));
            }
            Some(names) => names.clone(),
            // As transformers names them where a config does not.
            None => (0..count).map(|i| format!("LABEL_{i}")).collect(),
        };
        Ok(Some((head, labels)))
    }

    /// One request, whose pooled row goes through `head`.
    fn pooled(&self, call: &Call, input: Input, head: Arc<Head>, labels: Vec<String>) -> Result<Scoring> {
        self.room(&input).check("prompt", input.rows.len(), 0)?;
        let request = sequence(call, &input.who, input.rows, Sampling::default(), Stopping::default());
        let request = Request { head: Some(head), ..request };
        Ok(Scoring { who: input.who, requests: vec![request], labels })
    }

    fn room(&self, input: &Input) -> Room {
        let (prefix, prompt) = (input.who.prefix_len(), input.rows.len());
        Room { prefix, prompt, max_model_len: self.parts.max_model_len }
    }

    /// An encoder gives no probability of a next token.
    fn check_writes(&self, method: &str) -> Result<()> {
        if !self.parts.encoder {
            return Ok(());
        }
        Err(Error::precondition(format!(
            "the base is an encoder, which sees a text whole and has no next token: {method} needs a decoder; use \
             Classify"
        )))
    }

    fn check_bytes(&self, field: &'static str, bytes: usize) -> Result<()> {
        let most = self.parts.limits.max_prompt_bytes;
        if bytes <= most {
            return Ok(());
        }
        Err(Error::invalid(
            field,
            format!("{bytes} bytes long"),
            format!("must have at most {most} (max_prompt_bytes)"),
        ))
    }

    fn check_continuations(&self, field: &'static str, count: usize) -> Result<()> {
        let most = self.parts.limits.max_continuations;
        if (1..=most).contains(&count) {
            return Ok(());
        }
        Err(Error::invalid(field, format!("a list of {count}"), format!("must have 1 to {most} (max_continuations)")))
    }
}

fn sequence(call: &Call, who: &Who, input: Vec<InputRow>, sampling: Sampling, stopping: Stopping) -> Request {
    Request {
        id: Arc::clone(&call.id),
        tenant: who.adapter.as_ref().map_or("", |a| a.id.as_str()).into(),
        prefix: who.prefix.clone(),
        input,
        soft: who.soft.clone(),
        head: None,
        sampling,
        stopping,
        score_from: None,
        top_logprobs: None,
        deadline: call.deadline,
        arrival: call.arrival,
    }
}

#[cfg(test)]
mod tests;
