//! From JSON lines to sequences with targets.
//!
//! A line is an object with `input` and `target` (or `targets`, the first of which is trained), or with `messages`, whose
//! last one is the target; `task_id` says which task of a multitask prompt it belongs to.
use super::settings::{Settings, TARGET};
use super::step::{Example, Goal};
use crate::adapter::{BaseShape, InputRow, Method, Piece, Placement, TaskCard, place};
use crate::error::{Error, Kind, Result};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat::{ChatMessage, ChatTemplate};
use serde::{Deserialize, Serialize};

/// One line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// What a client would send as the prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// What the model is to answer, or the label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Several right answers; training takes the first, evaluation compares with all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<String>,
    /// A conversation that ends with the assistant's answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<ChatMessage>,
    /// Which task of a multitask prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_id: Option<u32>,
}

/// Bad lines that an error quotes.
const QUOTED: usize = 5;
/// Bytes of the texts of one record: no context holds more, and tokenizing it would take the memory of all others.
const MOST_TEXT: usize = 1 << 20;

impl Record {
    /// A line with `input` and `target`.
    pub fn new(input: &str, target: &str) -> Self {
        Record { input: Some(input.into()), target: Some(target.into()), ..Record::default() }
    }

    /// All right answers.
    pub fn answers(&self) -> Vec<&str> {
        match &self.target {
            Some(target) => vec![target.as_str()],
            None if !self.messages.is_empty() => self.messages.last().map(|m| m.content.as_str()).into_iter().collect(),
            None => self.targets.iter().map(String::as_str).collect(),
        }
    }

    fn check(&self) -> std::result::Result<(), String> {
        let said = self.messages.iter().map(|m| m.content.len());
        let bytes =
            self.input.iter().chain(&self.target).chain(&self.targets).map(String::len).chain(said).sum::<usize>();
        if bytes > MOST_TEXT {
            return Err(format!("has {bytes} bytes of text, at most {MOST_TEXT} are taken"));
        }
        let (prompt, chat) = (self.input.is_some(), !self.messages.is_empty());
        match (prompt, chat) {
            (true, true) => return Err("has both `input` and `messages`".into()),
            (false, false) => return Err("has neither `input` nor `messages`".into()),
            (false, true) if self.target.is_some() || !self.targets.is_empty() => {
                return Err("has `messages`, whose last one is the target, and a target besides".into());
            }
            (false, true) if self.messages.len() < 2 => return Err("`messages` needs a question and an answer".into()),
            (false, true) if self.messages.last().is_some_and(|m| m.role != "assistant") => {
                return Err("`messages` must end with one of role `assistant`".into());
            }
            _ => {}
        }
        match (&self.target, self.targets.is_empty()) {
            (Some(_), false) => Err("has both `target` and `targets`".into()),
            (None, true) if prompt => Err("has no `target`".into()),
            _ if self.answers().iter().any(|t| t.is_empty()) => Err("has an empty target".into()),
            _ if self.input.as_deref() == Some("") => Err("has an empty `input`".into()),
            _ => Ok(()),
        }
    }
}

/// Reads JSON lines; empty ones are skipped.
///
/// # Errors
/// `InvalidArgument` for a text without records, for more than `max` of them, and naming the first lines that are none.
pub fn parse(text: &str, max: usize) -> Result<Vec<Record>> {
    let (mut records, mut bad, mut count) = (Vec::new(), Vec::new(), 0);
    // What some editors put before the text.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let record = serde_json::from_str::<Record>(line).map_err(|e| e.to_string());
        match record.and_then(|r| r.check().map(|()| r)) {
            Ok(record) => records.push(record),
            Err(why) => {
                count += 1;
                if bad.len() < QUOTED {
                    bad.push(format!("line {}: {why}", i + 1));
                }
            }
        }
    }
    if count > 0 {
        let more = if count > bad.len() { format!("; and {} more", count - bad.len()) } else { String::new() };
        return Err(invalid(format!("{count} bad lines: {}{more}", bad.join("; "))));
    }
    bounded(records, max)
}

/// Checks records that did not come as text.
pub fn check(records: Vec<Record>, max: usize) -> Result<Vec<Record>> {
    for (i, record) in records.iter().enumerate() {
        record.check().map_err(|why| invalid(format!("example {i} {why}")))?;
    }
    bounded(records, max)
}

fn bounded(records: Vec<Record>, max: usize) -> Result<Vec<Record>> {
    match records.len() {
        0 => Err(invalid("no example in it".into())),
        n if n > max => Err(invalid(format!("{n} examples, at most {max} are taken"))),
        _ => Ok(records),
    }
}

fn invalid(message: String) -> Error {
    Error::new(Kind::InvalidArgument, format!("`data`: {message}"))
}

/// Makes sequences of records, as a request for the finished adapter would be made.
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    chat_template: &'a Result<ChatTemplate>,
    card: TaskCard,
    method: Method,
    settings: &'a Settings,
    /// Where the virtual tokens and the card's text stand.
    pub placement: Placement,
    leading: usize,
    max_length: usize,
    eos: Option<u32>,
    encoder: bool,
}

/// The sequences of a dataset.
#[derive(Debug, Default)]
pub struct Encoded {
    /// In the order of the records.
    pub examples: Vec<Example>,
    /// Records that were longer than the longest sequence, and are not among them.
    pub too_long: usize,
}

impl<'a> Encoder<'a> {
    /// For an adapter with `card` on the base of `shape`. `eos`: the token that ends a text.
    ///
    /// # Errors
    /// As [`place`]; `FailedPrecondition` for an encoder base without a head to train.
    pub fn new(
        settings: &'a Settings,
        mut card: TaskCard,
        shape: &BaseShape,
        tokenizer: &'a Tokenizer,
        chat_template: &'a Result<ChatTemplate>,
        eos: Option<u32>,
    ) -> Result<Self> {
        let (method, n) = (settings.method.method(), settings.num_virtual_tokens);
        if shape.encoder && !settings.classification_head {
            let rule = "but the base is an encoder, which writes nothing: a head must learn the classes";
            return Err(Error::invalid("settings.classification_head", false, rule));
        }
        let placement = place(&mut card, method, n, shape, tokenizer)?;
        let prefix = n * usize::from(!placement.among_rows) + placement.text_len();
        let room = shape.max_model_len.saturating_sub(prefix);
        let max_length = if settings.max_length == 0 { room } else { settings.max_length.min(room) };
        let leading = if placement.among_rows && !card.places_virtual_tokens() { n } else { 0 };
        let append = settings.append_eos.unwrap_or_else(|| {
            let end = settings.target_template.rsplit(TARGET).next().unwrap_or("");
            !card.stopping().stop_sequences.iter().any(|stop| end.ends_with(stop.as_str()))
        });
        if append && eos.is_none() && !settings.classification_head {
            let rule = "but the base names no end-of-sequence token; end the target's template with a stop sequence";
            return Err(Error::invalid("settings.append_eos", true, rule));
        }
        let (eos, encoder) = (eos.filter(|_| append), shape.encoder);
        Ok(Encoder { tokenizer, chat_template, card, method, settings, placement, leading, max_length, eos, encoder })
    }

    /// The card, as its adapter will have it.
    pub fn card(&self) -> &TaskCard {
        &self.card
    }

    /// All records.
    ///
    /// # Errors
    /// `InvalidArgument` naming the record that cannot be encoded, and where none is short enough.
    pub fn encode(&self, records: &[Record]) -> Result<Encoded> {
        let mut encoded = Encoded::default();
        for (i, record) in records.iter().enumerate() {
            let example = self.example(record).map_err(|e| e.context(format!("`data`: example {i}")))?;
            if example.rows.len() > self.max_length {
                encoded.too_long += 1;
            } else {
                encoded.examples.push(example);
            }
        }
        if encoded.examples.is_empty() {
            let (n, max) = (records.len(), self.max_length);
            return Err(invalid(format!("all {n} examples are longer than {max} tokens")));
        }
        Ok(encoded)
    }

    fn example(&self, record: &Record) -> Result<Example> {
        let mut rows: Vec<InputRow> = (0..self.leading as u32).map(InputRow::Soft).collect();
        if self.method.is_kv() {
            // Text of the card follows stored rows as tokens of each sequence.
            rows.extend(&self.placement.after);
        }
        let (text_from, target) = (rows.len(), self.text(record, &mut rows)?);
        let task = record.task_id.unwrap_or(0) as usize;
        if self.settings.classification_head {
            let class = self
                .card
                .labels
                .iter()
                .position(|label| *label == target)
                .ok_or_else(|| Error::invalid("target", format!("{target:?}"), "is none of the card's `labels`"))?;
            return Ok(Example { task, rows, goal: Goal::Class(class as u32) });
        }
        let (before, after) = self.settings.target_template.split_once(TARGET).unwrap_or(("", ""));
        let label = self.card.labels.iter().position(|label| *label == target);
        let target = match label.filter(|_| self.card.has_verbalizers()) {
            // What Classify scores is what is trained; it has its own way of starting.
            Some(label) => format!("{}{after}", self.card.verbalizers()[label]),
            None => format!("{before}{target}{after}"),
        };
        let mut labels = vec![None; rows.len()];
        if self.settings.loss_on_input {
            for (label, row) in labels.iter_mut().zip(&rows).skip(text_from) {
                *label = if let InputRow::Token(id) = row { Some(*id) } else { None };
            }
        }
        let ids = self.tokenizer.encode(&target, false)?;
        if ids.is_empty() {
            return Err(Error::invalid("target", format!("{target:?}"), "has no token"));
        }
        for id in ids.into_iter().chain(self.eos) {
            rows.push(InputRow::Token(id));
            labels.push(Some(id));
        }
        Ok(Example { task, rows, goal: Goal::Tokens(labels) })
    }

    /// Adds the rows of the input; returns the target.
    fn text(&self, record: &Record, rows: &mut Vec<InputRow>) -> Result<String> {
        let Some(input) = &record.input else { return self.conversation(record, rows) };
        let pieces = self.card.render(input)?;
        let text = |piece: &Piece| if let Piece::Text(text) = piece { Some(text.clone()) } else { None };
        let texts: Vec<String> = pieces.iter().filter_map(text).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let special = self.card.adds_special_tokens(self.method);
        let mut tokens = self.tokenizer.encode_pieces(&texts, special)?.into_iter();
        for piece in pieces {
            match piece {
                Piece::Virtual(range) => rows.extend(range.map(InputRow::Soft)),
                Piece::Text(_) => rows.extend(tokens.next().into_iter().flatten().map(InputRow::Token)),
            }
        }
        Ok(record.answers().first().map(|t| (*t).to_owned()).unwrap_or_default())
    }

    fn conversation(&self, record: &Record, rows: &mut Vec<InputRow>) -> Result<String> {
        if self.card.places_virtual_tokens() || self.encoder {
            let rule =
                "but this adapter's virtual tokens stand among the text, and a conversation has no place for them";
            return Err(Error::invalid("messages", "given", rule));
        }
        let template = self.chat_template.as_ref().map_err(Clone::clone)?;
        let before = record.messages.len().saturating_sub(1);
        let prompt = template.render(&record.messages[..before], true)?;
        rows.extend(self.tokenizer.encode(&prompt, false)?.into_iter().map(InputRow::Token));
        Ok(record.answers().first().map(|t| (*t).to_owned()).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn bad_lines_are_named_and_counted() {
        let text = "{\"input\": \"a\", \"target\": \"b\"}\n\n{\"input\": \"a\"}\nnot json\n{\"input\":\"a\",\"target\":\"\"}\n";
        let e = parse(text, 10).unwrap_err().to_string();
        assert!(e.contains("3 bad lines") && e.contains("line 3: has no `target`") && e.contains("line 4:"), "{e}");
        let many = "{}\n".repeat(9);
        let e = parse(&many, 10).unwrap_err().to_string();
        assert!(e.contains("9 bad lines") && e.contains("and 4 more"), "{e}");
        assert!(parse("\n", 10).unwrap_err().to_string().contains("no example"));
        let long = format!("{{\"input\": \"{}\", \"target\": \"b\"}}\n", "a".repeat(MOST_TEXT));
        assert!(parse(&long, 10).unwrap_err().to_string().contains("line 1: has 1048577 bytes"));
        assert_eq!(parse("\u{feff}{\"input\": \"a\", \"target\": \"b\"}\r\n", 10).unwrap(), [Record::new("a", "b")]);
        let good = "{\"input\": \"a\", \"targets\": [\"b\", \"c\"]}\n".repeat(3);
        assert!(parse(&good, 2).unwrap_err().to_string().contains("3 examples, at most 2"));
        assert_eq!(parse(&good, 3).unwrap()[2].answers(), ["b", "c"]);
    }

    #[test]
    fn conversations_end_with_the_answer() {
        let line = |roles: &[&str]| {
            let all: Vec<_> = roles.iter().map(|r| serde_json::json!({ "role": r, "content": "x" })).collect();
            parse(&serde_json::json!({ "messages": all }).to_string(), 9)
        };
        assert_eq!(line(&["user", "assistant"]).unwrap()[0].answers(), ["x"]);
        assert!(line(&["user", "user"]).unwrap_err().to_string().contains("`assistant`"));
        assert!(line(&["assistant"]).unwrap_err().to_string().contains("a question and an answer"));
    }
}
