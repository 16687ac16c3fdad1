//! Requests: from protobuf, with what the task card and the defaults add.
use crate::adapter::{AdapterId, CardSampling, CardStopping, Generation};
use crate::config::Limits;
use crate::engine::request::{Sampling, Stopping};
use crate::error::{Error, Result};
use crate::rpc::proto;
use crate::tokenizer::chat::ChatMessage;

/// New tokens where neither the request nor the task card says.
const DEFAULT_MAX_NEW_TOKENS: usize = 64;

/// Prefixes before the adapter's own.
const MAX_PREFIX_ADAPTERS: usize = 8;
/// Messages of one conversation: a chat template may walk through all of them for each.
const MAX_MESSAGES: usize = 1024;

/// Which task answers.
#[derive(Clone, Debug, Default)]
pub struct Target {
    /// None: the bare base model.
    pub adapter: Option<AdapterId>,
    /// Only this generation will do.
    pub generation: Option<Generation>,
    /// Use the prompt as it is.
    pub skip_template: bool,
    /// Whose prefixes stand before it.
    pub prefix_adapters: Vec<AdapterId>,
    /// Which of its tasks.
    pub task_id: Option<u32>,
}

impl Target {
    /// Checks the id.
    pub fn new(adapter_id: &str, generation: Option<u64>, skip_template: bool) -> Result<Self> {
        let adapter = (!adapter_id.is_empty()).then(|| AdapterId::parse(adapter_id)).transpose()?;
        let generation = generation.map(Generation);
        if let (None, Some(Generation(g))) = (&adapter, generation) {
            return Err(Error::invalid("adapter_generation", g, "but no `adapter_id` is given"));
        }
        Ok(Target { adapter, generation, skip_template, ..Target::default() })
    }

    /// The same with prefixes before it, and a task of its own.
    pub fn with(self, prefix_adapter_ids: &[String], task_id: Option<u32>) -> Result<Self> {
        const FIELD: &str = "prefix_adapter_ids";
        if prefix_adapter_ids.len() > MAX_PREFIX_ADAPTERS {
            let value = format!("a list of {}", prefix_adapter_ids.len());
            return Err(Error::invalid(FIELD, value, format!("must have at most {MAX_PREFIX_ADAPTERS}")));
        }
        if let (None, Some(task)) = (&self.adapter, task_id) {
            return Err(Error::invalid("task_id", task, "but no `adapter_id` is given"));
        }
        let id = |id: &String| {
            let rule = "each must match [A-Za-z0-9][A-Za-z0-9._-]* and have at most 128 bytes";
            AdapterId::parse(id).map_err(|_| Error::invalid(FIELD, format!("{id:?}"), rule))
        };
        let prefix_adapters = prefix_adapter_ids.iter().map(id).collect::<Result<_>>()?;
        Ok(Target { prefix_adapters, task_id, ..self })
    }
}

/// The input of a request.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Goes through the template and the tokenizer.
    Text(String),
    /// Used as they are.
    Tokens(Vec<u32>),
    /// Goes through the model's chat template and the tokenizer.
    Chat(Chat),
}

/// A conversation: at least one message, each with a role.
#[derive(Clone, Debug)]
pub struct Chat {
    /// Oldest first.
    pub messages: Vec<ChatMessage>,
    /// End the text where the assistant's answer starts.
    pub add_generation_prompt: bool,
}

impl Chat {
    /// Bytes of all roles and contents.
    pub fn bytes(&self) -> usize {
        self.messages.iter().map(|m| m.role.len() + m.content.len()).sum()
    }
}

impl TryFrom<proto::Messages> for Chat {
    type Error = Error;
    fn try_from(wire: proto::Messages) -> Result<Self> {
        let count = wire.messages.len();
        if !(1..=MAX_MESSAGES).contains(&count) {
            return Err(Error::invalid(
                "messages",
                format!("a list of {count}"),
                format!("must have 1 to {MAX_MESSAGES}"),
            ));
        }
        if let Some(i) = wire.messages.iter().position(|m| m.role.is_empty()) {
            return Err(Error::invalid("messages", format!("without a role at index {i}"), "each must have one"));
        }
        let message = |m: proto::ChatMessage| ChatMessage { role: m.role, content: m.content };
        Ok(Chat {
            messages: wire.messages.into_iter().map(message).collect(),
            add_generation_prompt: wire.add_generation_prompt.unwrap_or(true),
        })
    }
}

/// The three `input` oneofs say the same thing in three generated types.
macro_rules! prompt_from {
    ($($module:ident),*) => {$(
        impl TryFrom<Option<proto::$module::Input>> for Prompt {
            type Error = Error;
            fn try_from(input: Option<proto::$module::Input>) -> Result<Self> {
                match input {
                    Some(proto::$module::Input::Prompt(text)) => Ok(Prompt::Text(text)),
                    Some(proto::$module::Input::TokenIds(t)) => Ok(Prompt::Tokens(t.ids)),
                    Some(proto::$module::Input::Messages(m)) => Ok(Prompt::Chat(m.try_into()?)),
                    None => Err(Error::invalid("input", "missing", "give `prompt`, `token_ids` or `messages`")),
                }
            }
        }
    )*};
}
prompt_from!(generate_request, score_request, classify_request);

/// One continuation's content.
pub fn content(continuation: proto::Continuation) -> Result<Prompt> {
    match continuation.content {
        Some(proto::continuation::Content::Text(text)) => Ok(Prompt::Text(text)),
        Some(proto::continuation::Content::TokenIds(t)) => Ok(Prompt::Tokens(t.ids)),
        None => Err(Error::invalid("continuations", "without content", "give `text` or `token_ids` in each")),
    }
}

/// Checks given ids against the vocabulary.
pub fn token_ids(field: &'static str, ids: Vec<u32>, vocab_size: usize) -> Result<Vec<u32>> {
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => Err(Error::invalid(field, id, format!("must be below the vocabulary's {vocab_size}"))),
        None => Ok(ids),
    }
}

/// `sampling.n`, checked.
pub fn choices(wish: Option<&proto::Sampling>, limits: &Limits) -> Result<usize> {
    let n = wish.and_then(|w| w.n).unwrap_or(1) as usize;
    if n == 0 || n > limits.max_n {
        return Err(Error::invalid("sampling.n", n, format!("must be from 1 to {}", limits.max_n)));
    }
    Ok(n)
}

/// The request's sampling over the card's over the defaults, checked. Without a seed a random one is drawn.
pub fn sampling(wish: Option<&proto::Sampling>, card: &CardSampling) -> Result<Sampling> {
    let wish = wish.copied().unwrap_or_default();
    let base = Sampling::default();
    let sampling = Sampling {
        temperature: wish.temperature.or(card.temperature).unwrap_or(base.temperature),
        top_k: wish.top_k.or(card.top_k).map_or(base.top_k, |k| k as usize),
        top_p: wish.top_p.or(card.top_p).unwrap_or(base.top_p),
        min_p: wish.min_p.or(card.min_p).unwrap_or(base.min_p),
        repetition_penalty: wish.repetition_penalty.or(card.repetition_penalty).unwrap_or(base.repetition_penalty),
        presence_penalty: wish.presence_penalty.unwrap_or(base.presence_penalty),
        frequency_penalty: wish.frequency_penalty.unwrap_or(base.frequency_penalty),
        seed: wish.seed.unwrap_or_else(rand::random),
    };
    sampling.validate()?;
    Ok(sampling)
}

/// Room that a sequence has in the context.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Positions of the adapter's prefix.
    pub prefix: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Longest sequence.
    pub max_model_len: usize,
}

impl Room {
    /// An error unless `new` more tokens fit; it names all parts of the sum.
    pub fn check(&self, field: &'static str, value: usize, new: usize) -> Result<()> {
        let Room { prefix, prompt, max_model_len } = *self;
        if prefix + prompt + new <= max_model_len {
            return Ok(());
        }
        let rule = format!(
            "but prefix {prefix} + prompt {prompt} + new {new} tokens must be at most {max_model_len} (max_model_len)"
        );
        Err(Error::too_long(field, value, rule))
    }
}

/// The request's stopping over the card's over the defaults, checked. `scores`: the prompt's log-probabilities
/// are asked for, so no new token at all is a fair wish.
pub fn stopping(
    wish: Option<proto::Stopping>,
    card: CardStopping,
    room: Room,
    limits: &Limits,
    scores: bool,
) -> Result<Stopping> {
    let wish = wish.unwrap_or_default();
    let max_new_tokens = match wish.max_new_tokens.map(|m| m as usize) {
        Some(0) if !scores => {
            return Err(Error::invalid(
                "stopping.max_new_tokens",
                0,
                "must be at least 1 without `output.input_logprobs`",
            ));
        }
        Some(asked) => {
            room.check("stopping.max_new_tokens", asked, asked)?;
            asked
        }
        None => {
            // One new token at the least, or there is nothing to answer with.
            room.check("prompt", room.prompt, 1)?;
            let free = room.max_model_len - room.prefix - room.prompt;
            card.max_new_tokens.unwrap_or(DEFAULT_MAX_NEW_TOKENS).clamp(1, free)
        }
    };
    let min_new_tokens = wish.min_new_tokens.unwrap_or(0) as usize;
    if min_new_tokens > max_new_tokens {
        let rule = format!("must be at most max_new_tokens ({max_new_tokens})");
        return Err(Error::invalid("stopping.min_new_tokens", min_new_tokens, rule));
    }
    let given = !wish.stop_sequences.is_empty();
    let stop_sequences = if given { wish.stop_sequences } else { card.stop_sequences };
    if given {
        check_stop_sequences(&stop_sequences, limits)?;
    }
    Ok(Stopping {
        max_new_tokens,
        min_new_tokens,
        stop_sequences,
        ignore_eos: wish.ignore_eos,
        include_stop_sequence: wish.include_stop_sequence,
    })
}

fn check_stop_sequences(sequences: &[String], limits: &Limits) -> Result<()> {
    const FIELD: &str = "stopping.stop_sequences";
    if sequences.len() > limits.max_stop_sequences {
        let value = format!("a list of {}", sequences.len());
        return Err(Error::invalid(FIELD, value, format!("must have at most {}", limits.max_stop_sequences)));
    }
    let most = limits.max_stop_sequence_bytes;
    match sequences.iter().find(|s| s.is_empty() || s.len() > most) {
        Some(s) => Err(Error::invalid(FIELD, format!("{s:?}"), format!("each must have 1 to {most} bytes"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const ROOM: Room = Room { prefix: 10, prompt: 20, max_model_len: 64 };

    fn merge(wish: proto::Stopping) -> Result<Stopping> {
        let card = CardStopping { stop_sequences: vec!["\n".into()], max_new_tokens: Some(50) };
        stopping(Some(wish), card, ROOM, &Limits::default(), false)
    }

    #[test]
    fn the_default_is_cut_to_the_room_and_a_wish_is_not() {
        assert_eq!(merge(proto::Stopping::default()).unwrap().max_new_tokens, 34);
        let wish = proto::Stopping { max_new_tokens: Some(35), ..Default::default() };
        let e = merge(wish).unwrap_err().to_string();
        assert!(["prefix 10", "prompt 20", "new 35", "64"].iter().all(|part| e.contains(part)), "{e}");
    }

    #[test]
    fn given_stop_sequences_replace_the_cards() {
        assert_eq!(merge(proto::Stopping::default()).unwrap().stop_sequences, ["\n"]);
        let wish = proto::Stopping { stop_sequences: vec!["END".into()], ..Default::default() };
        assert_eq!(merge(wish).unwrap().stop_sequences, ["END"]);
        let wish = proto::Stopping { stop_sequences: vec![String::new()], ..Default::default() };
        assert_eq!(merge(wish).unwrap_err().field(), Some("stopping.stop_sequences"));
    }

    #[test]
    fn the_request_wins_over_the_card_and_the_card_over_the_default() {
        let card = CardSampling { temperature: Some(0.5), top_p: Some(0.9), ..Default::default() };
        let wish = proto::Sampling { temperature: Some(0.7), seed: Some(3), ..Default::default() };
        let s = sampling(Some(&wish), &card).unwrap();
        assert_eq!((s.temperature, s.top_p, s.top_k, s.seed), (0.7, 0.9, 0, 3));
        let wish = proto::Sampling { temperature: Some(f32::NAN), ..Default::default() };
        assert_eq!(sampling(Some(&wish), &card).unwrap_err().field(), Some("sampling.temperature"));
    }

    #[test]
    fn n_has_bounds() {
        let n = |n| choices(Some(&proto::Sampling { n: Some(n), ..Default::default() }), &Limits::default());
        assert_eq!(n(16).unwrap(), 16);
        assert!(n(0).is_err());
        assert_eq!(n(1000).unwrap_err().to_string(), "`sampling.n` is 1000, must be from 1 to 16");
    }
}
