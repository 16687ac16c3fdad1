//! From a client's request to sequences that the engine may run. Everything that can be refused for its form is
//! refused here, before the queue.
use super::call::Call;
use super::convert::{self, Prompt, Room, Target};
use super::proto;
use crate::adapter::{Adapter, Generation, InputRow, Registry};
use crate::config::Limits;
use crate::engine::request::{Request, Sampling, Stopping};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tracing::Span;

/// Longer texts are tokenised on a thread of their own: about a millisecond of work.
const SMALL_TEXT: usize = 8 << 10;

/// Of those, so many at once: a crowd of huge prompts must not take the engine's cores.
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
    /// Who is loaded.
    pub registry: Arc<Registry>,
    /// What a request may ask for.
    pub limits: Limits,
    /// Longest sequence, prefix included.
    pub max_model_len: usize,
    /// Token ids of the model.
    pub vocab_size: usize,
}

/// An input ready for the engine, and whom it is for.
pub struct Input {
    /// None: the bare base. Holding it pins the generation.
    pub adapter: Option<Arc<Adapter>>,
    /// After template and tokenizer; not empty.
    pub tokens: Vec<u32>,
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
    pub adapter: Option<Arc<Adapter>>,
    /// One for each choice.
    pub requests: Vec<Request>,
    /// What to return besides the text.
    pub wanted: Wanted,
}

/// A `Score` or `Classify` ready to be submitted.
pub struct Scoring {
    /// Who answers.
    pub adapter: Option<Arc<Adapter>>,
    /// One for each continuation.
    pub requests: Vec<Request>,
    /// The labels that the continuations stand for; empty for `Score`.
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
        let target = Target::new(&message.adapter_id, message.adapter_generation, message.skip_template)?;
        let n = convert::choices(message.sampling.as_ref(), &self.parts.limits)?;
        let output = message.output.unwrap_or_default();
        if output.logprobs.is_some_and(|k| k > MAX_TOP_LOGPROBS) {
            let rule = format!("must be from 0 to {MAX_TOP_LOGPROBS}");
            return Err(Error::invalid("output.logprobs", output.logprobs.unwrap_or(0), rule));
        }
        let input = self.input(target, message.input.try_into()?).await?;
        let card = input.adapter.as_ref().map(|a| &a.card);
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
        let score_from = (output.input_logprobs && input.tokens.len() > 1).then_some(1);
        let seed = sampling.seed;
        let first = Request {
            top_logprobs: output.logprobs.unwrap_or(0) as usize,
            ..sequence(call, &input.adapter, input.tokens, sampling, stopping)
        };
        let requests = (0..n as u64).map(|i| Request {
            sampling: Sampling { seed: seed.wrapping_add(i), ..first.sampling.clone() },
            score_from: score_from.filter(|_| i == 0),
            ..first.clone()
        });
        let wanted = Wanted { logprobs: output.logprobs.is_some(), token_ids: output.token_ids };
        Ok(Answering { requests: requests.collect(), adapter: input.adapter, wanted })
    }

    /// Checks a `Score`.
    pub async fn score(&self, call: &Call, message: proto::ScoreRequest) -> Result<Scoring> {
        let target = Target::new(&message.adapter_id, message.adapter_generation, message.skip_template)?;
        self.check_continuations("continuations", message.continuations.len())?;
        let continuations = message.continuations.into_iter().map(convert::content).collect::<Result<Vec<_>>>()?;
        let bytes = continuations.iter().map(|c| if let Prompt::Text(t) = c { t.len() } else { 0 }).sum();
        self.check_bytes("continuations", bytes)?;
        let input = self.input(target, message.input.try_into()?).await?;
        let continuations = self.continuations("continuations", continuations).await?;
        self.scoring(call, input, continuations, Vec::new())
    }

    /// Checks a `Classify`.
    pub async fn classify(&self, call: &Call, message: proto::ClassifyRequest) -> Result<Scoring> {
        let target = Target::new(&message.adapter_id, message.adapter_generation, message.skip_template)?;
        let adapter = self.resolve(&target)?;
        let (labels, texts) = match (message.labels, &adapter) {
            (labels, _) if !labels.is_empty() => (labels.clone(), labels),
            (_, Some(adapter)) if !adapter.card.labels.is_empty() => {
                (adapter.card.labels.clone(), adapter.card.verbalizers().to_vec())
            }
            _ => return Err(Error::invalid("labels", "empty", "and the adapter's task card has none either")),
        };
        self.check_continuations("labels", labels.len())?;
        self.check_bytes("labels", texts.iter().map(String::len).sum())?;
        let input = self.input_for(adapter, target.skip_template, message.input.try_into()?).await?;
        let texts = texts.into_iter().map(Prompt::Text).collect();
        let continuations = self.continuations("labels", texts).await?;
        self.scoring(call, input, continuations, labels)
    }

    /// Checks a `Tokenize`.
    pub async fn tokenize(&self, message: proto::TokenizeRequest) -> Result<Input> {
        let target = Target::new(&message.adapter_id, None, message.skip_template)?;
        self.input(target, Prompt::Text(message.prompt)).await
    }

    async fn input(&self, target: Target, prompt: Prompt) -> Result<Input> {
        let adapter = self.resolve(&target)?;
        self.input_for(adapter, target.skip_template, prompt).await
    }

    fn resolve(&self, target: &Target) -> Result<Option<Arc<Adapter>>> {
        let Some(id) = &target.adapter else { return Ok(None) };
        let adapter = self.parts.registry.resolve(id)?;
        if let Some(Generation(asked)) = target.generation
            && asked != adapter.generation.0
        {
            let serving = adapter.generation.0;
            return Err(Error::precondition(format!(
                "`adapter_generation` is {asked}, but generation {serving} of adapter {id} serves"
            )));
        }
        let span = Span::current();
        span.record("adapter", id.as_str());
        span.record("generation", adapter.generation.0);
        Ok(Some(adapter))
    }

    async fn input_for(&self, adapter: Option<Arc<Adapter>>, skip_template: bool, prompt: Prompt) -> Result<Input> {
        let (text, tokens) = match prompt {
            Prompt::Tokens(ids) => (String::new(), convert::token_ids("token_ids", ids, self.parts.vocab_size)?),
            Prompt::Text(text) => {
                self.check_bytes("prompt", text.len())?;
                if text.is_empty() {
                    return Err(Error::invalid("prompt", "empty", "must hold some text"));
                }
                let special = adapter.as_ref().is_none_or(|a| a.card.adds_special_tokens(a.method));
                let text = match &adapter {
                    Some(adapter) if !skip_template => adapter.card.render(&text)?,
                    _ => text,
                };
                let tokens = self.encode(text.clone(), special).await?;
                (text, tokens)
            }
        };
        if tokens.is_empty() {
            return Err(Error::invalid("input", "no token", "must be at least one"));
        }
        Ok(Input { adapter, tokens, text })
    }

    async fn continuations(&self, field: &'static str, contents: Vec<Prompt>) -> Result<Vec<Vec<u32>>> {
        let mut all = Vec::with_capacity(contents.len());
        for (i, content) in contents.into_iter().enumerate() {
            let tokens = match content {
                Prompt::Text(text) => self.encode(text, false).await?,
                Prompt::Tokens(ids) => convert::token_ids(field, ids, self.parts.vocab_size)?,
            };
            if tokens.is_empty() {
                return Err(Error::invalid(field, format!("empty at index {i}"), "each must hold a token"));
            }
            all.push(tokens);
        }
        Ok(all)
    }

    async fn encode(&self, text: String, special: bool) -> Result<Vec<u32>> {
        if text.len() <= SMALL_TEXT {
            return self.tokenizer().encode(&text, special);
        }
        // Never closed while `self` lives.
        let _permit = self.large_texts.acquire().await.map_err(|e| Error::internal(format!("tokenizer: {e}")))?;
        let tokenizer = self.tokenizer().clone();
        let tokens = tokio::task::spawn_blocking(move || tokenizer.encode(&text, special)).await;
        tokens.map_err(|e| Error::internal(format!("tokenizer: {e}")))?
    }

    fn scoring(&self, call: &Call, input: Input, continuations: Vec<Vec<u32>>, labels: Vec<String>) -> Result<Scoring> {
        let room = self.room(&input);
        let mut requests = Vec::with_capacity(continuations.len());
        for continuation in continuations {
            room.check("continuations", continuation.len(), continuation.len())?;
            let tokens = [input.tokens.as_slice(), &continuation].concat();
            let request = sequence(call, &input.adapter, tokens, Sampling::default(), Stopping::default());
            requests.push(Request { score_from: Some(input.tokens.len()), ..request });
        }
        Ok(Scoring { adapter: input.adapter, requests, labels })
    }

    fn room(&self, input: &Input) -> Room {
        Room { prefix: prefix_len(&input.adapter), prompt: input.tokens.len(), max_model_len: self.parts.max_model_len }
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

/// Positions of an adapter's prefix.
pub fn prefix_len(adapter: &Option<Arc<Adapter>>) -> usize {
    adapter.as_ref().and_then(|a| a.prefix.as_ref()).map_or(0, |p| p.len())
}

fn sequence(
    call: &Call,
    adapter: &Option<Arc<Adapter>>,
    tokens: Vec<u32>,
    sampling: Sampling,
    stopping: Stopping,
) -> Request {
    Request {
        id: Arc::clone(&call.id),
        tenant: adapter.as_ref().map_or("", |a| a.id.as_str()).into(),
        prefix: adapter.as_ref().and_then(|a| a.prefix.clone()),
        input: tokens.into_iter().map(InputRow::Token).collect(),
        soft: None,
        head: None,
        sampling,
        stopping,
        score_from: None,
        top_logprobs: 0,
        deadline: call.deadline,
        arrival: call.arrival,
    }
}
