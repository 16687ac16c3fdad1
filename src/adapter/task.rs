//! The task card, `task.toml`: how one adapter's requests are worded, stopped and sampled.
//!
//! A card comes from whoever uploads an adapter, so everything in it is checked when it is parsed:
//! what [`TaskCard::parse`] returns holds only values that a request may use as they are.
mod template;

use super::Method;
use crate::error::{Error, Kind, Result};
use serde::Deserialize;
use std::collections::HashSet;
use std::ops::Range;
use template::{Marker, Part, Template};

/// A card beside an adapter's weights, or alone: then the adapter is its text.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskCard {
    /// One sentence for whoever lists adapters.
    #[serde(default)]
    pub description: String,
    /// Text that belongs to the adapter's own prefix: computed once, shared by every request. It follows the virtual
    /// tokens.
    pub prefix: Option<String>,
    /// The same in front of the virtual tokens. It starts with the tokenizer's special tokens.
    pub prefix_before: Option<String>,
    /// minijinja source, `input` being the request's prompt; `None`: the prompt as it is. `{{ virtual }}`, or
    /// `{{ virtual_0 }}`... with `virtual_token_splits`, are the places of virtual tokens.
    template: Option<Template>,
    /// Virtual tokens at each of the places `{{ virtual_0 }}`, `{{ virtual_1 }}`...
    #[serde(default)]
    virtual_token_splits: Vec<u32>,
    /// Set by [`TaskCard::bind`].
    #[serde(skip)]
    num_virtual_tokens: u32,
    /// Whether a request's own text gets the tokenizer's special tokens; see
    /// [`TaskCard::adds_special_tokens`].
    pub add_special_tokens: Option<bool>,
    /// What Classify answers with.
    #[serde(default)]
    pub labels: Vec<String>,
    #[serde(default)]
    verbalizers: Vec<String>,
    /// Which task of a multitask prompt this adapter is.
    #[serde(default)]
    pub task_id: usize,
    /// Vocabulary entries put after `prefix` (controlled generation); one token each.
    #[serde(default)]
    pub control_tokens: Vec<String>,
    #[serde(default)]
    stopping: CardStopping,
    #[serde(default)]
    sampling: CardSampling,
}

/// `[stopping]`: defaults for requests that say nothing themselves.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardStopping {
    /// The text ends before any of these.
    #[serde(default)]
    pub stop_sequences: Vec<String>,
    /// Tokens, at least 1.
    pub max_new_tokens: Option<usize>,
}

/// `[sampling]`: defaults for requests that say nothing themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardSampling {
    /// 0 (greedy) to 100.
    pub temperature: Option<f32>,
    /// Tokens kept; 0 keeps all.
    pub top_k: Option<u32>,
    /// Probability mass kept, above 0, to 1.
    pub top_p: Option<f32>,
    /// Least probability kept, as a share of the best token's, 0 to 1.
    pub min_p: Option<f32>,
    /// Above 0, to 100; 1 is none.
    pub repetition_penalty: Option<f32>,
}

/// A piece of a rendered request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// To be tokenised by itself.
    Text(String),
    /// Rows of the adapter's virtual tokens.
    Virtual(Range<u32>),
}

impl TaskCard {
    /// Longest `task.toml` in bytes.
    pub const MAX_BYTES: usize = 1 << 20;
    /// Most stop sequences, and the longest of them in bytes.
    pub const MAX_STOP_SEQUENCES: (usize, usize) = (64, 1024);

    /// Parses and checks the text of a `task.toml`.
    ///
    /// # Errors
    /// `InvalidArgument`, led by `task.toml: ` and naming the key, its value and the rule.
    pub fn parse(text: &str) -> Result<Self> {
        if text.len() > Self::MAX_BYTES {
            let n = text.len();
            return Err(malformed(format!("{n} bytes, at most {} are read", Self::MAX_BYTES)));
        }
        let card: TaskCard = toml::from_str(text).map_err(|e| malformed(describe(text, &e)))?;
        card.check()?;
        Ok(card)
    }

    /// What is sent to the model for a request whose prompt is `input`, in order.
    ///
    /// # Errors
    /// `InvalidArgument` if the template fails on this input or passes [`TaskCard::MAX_RENDERED_BYTES`].
    pub fn render(&self, input: &str) -> Result<Vec<Piece>> {
        let Some(template) = &self.template else { return Ok(vec![Piece::Text(input.to_owned())]) };
        let piece = |part| match part {
            Part::Text(text) => Piece::Text(text),
            Part::Marker(Marker::All) => Piece::Virtual(0..self.num_virtual_tokens),
            Part::Marker(Marker::Split(i)) => {
                let start = self.virtual_token_splits[..i as usize].iter().sum();
                Piece::Virtual(start..start + self.virtual_token_splits[i as usize])
            }
        };
        Ok(template.render(input)?.into_iter().map(piece).collect())
    }

    /// Whether the template has places for virtual tokens.
    pub fn places_virtual_tokens(&self) -> bool {
        self.template.as_ref().is_some_and(|template| template.markers().next().is_some())
    }

    /// Tells the card how many virtual tokens its adapter has.
    ///
    /// # Errors
    /// `InvalidArgument` if `virtual_token_splits` has another sum.
    pub(super) fn bind(&mut self, num_virtual_tokens: usize) -> Result<()> {
        let splits = &self.virtual_token_splits;
        let sum: u64 = splits.iter().map(|&n| u64::from(n)).sum();
        require(splits.is_empty() || sum == num_virtual_tokens as u64, || {
            format!("`virtual_token_splits` {splits:?} sums to {sum}, `num_virtual_tokens` is {num_virtual_tokens}")
        })?;
        self.num_virtual_tokens = num_virtual_tokens as u32; // below the longest sequence
        Ok(())
    }

    /// Longest text that [`TaskCard::render`] makes.
    pub const MAX_RENDERED_BYTES: usize = template::MAX_OUTPUT;

    /// What Classify scores for each label: `verbalizers`, or the labels themselves.
    pub fn verbalizers(&self) -> &[String] {
        if self.verbalizers.is_empty() { &self.labels } else { &self.verbalizers }
    }

    /// Whether labels have other texts than their names.
    pub fn has_verbalizers(&self) -> bool {
        !self.verbalizers.is_empty()
    }

    /// Default stopping.
    pub fn stopping(&self) -> &CardStopping {
        &self.stopping
    }

    /// Default sampling.
    pub fn sampling(&self) -> &CardSampling {
        &self.sampling
    }

    /// Whether there are tokens of text in the adapter's own prefix, after its virtual tokens.
    pub fn has_prefix_text(&self) -> bool {
        self.prefix.as_ref().is_some_and(|text| !text.is_empty()) || !self.control_tokens.is_empty()
    }

    /// Whether there is text before the virtual tokens.
    pub fn has_text_before(&self) -> bool {
        self.prefix_before.as_ref().is_some_and(|text| !text.is_empty())
    }

    /// Whether prefix text, and with it the special tokens (BOS), stands first of all.
    pub fn begins_with_text(&self, method: Method) -> bool {
        let no_virtual_tokens = method == Method::Text || self.places_virtual_tokens();
        self.has_text_before() || no_virtual_tokens && self.has_prefix_text()
    }

    /// Whether a request's own text is tokenised with special tokens (BOS).
    ///
    /// The card decides if it says so. Otherwise prefix text that stands first has the BOS already, so `false`;
    /// after virtual tokens PEFT's inputs keep theirs, so `true`.
    pub fn adds_special_tokens(&self, method: Method) -> bool {
        self.add_special_tokens.unwrap_or(!self.begins_with_text(method))
    }

    fn check(&self) -> Result<()> {
        let mut seen = HashSet::new();
        for (i, label) in self.labels.iter().enumerate() {
            require(!label.is_empty(), || format!("`labels[{i}]` is empty"))?;
            require(seen.insert(label), || format!("`labels[{i}]` is {label:?} once more"))?;
        }
        let (labels, verbalizers) = (self.labels.len(), self.verbalizers.len());
        require(verbalizers == 0 || verbalizers == labels, || {
            format!("`verbalizers` has {verbalizers} entries, `labels` has {labels}; one for each")
        })?;
        for (i, text) in self.verbalizers.iter().enumerate() {
            require(!text.is_empty(), || format!("`verbalizers[{i}]` is empty"))?;
        }
        for (i, token) in self.control_tokens.iter().enumerate() {
            require(!token.is_empty(), || format!("`control_tokens[{i}]` is empty"))?;
        }
        self.check_markers()?;
        self.stopping.check()?;
        self.sampling.check()
    }

    /// Each place exactly once: `{{ virtual }}`, or one for each split.
    fn check_markers(&self) -> Result<()> {
        let markers: Vec<Marker> = self.template.iter().flat_map(Template::markers).collect();
        let splits = self.virtual_token_splits.len();
        let times = |marker: Marker| markers.iter().filter(|&&m| m == marker).count();
        for &marker in &markers {
            let name = marker.name();
            match marker {
                Marker::All => require(splits == 0, || {
                    format!(
                        "`template` has `{{{{ virtual }}}}`, with `virtual_token_splits` the places are \
                         `{{{{ virtual_0 }}}}` to `{{{{ virtual_{} }}}}`",
                        splits - 1
                    )
                })?,
                Marker::Split(i) => require((i as usize) < splits, || {
                    format!("`template` has `{{{{ {name} }}}}`, `virtual_token_splits` has {splits} entries")
                })?,
            }
            let n = times(marker);
            require(n == 1, || format!("`template` has `{{{{ {name} }}}}` {n} times, must have it once"))?;
        }
        for (i, &n) in self.virtual_token_splits.iter().enumerate() {
            require(n > 0, || format!("`virtual_token_splits[{i}]` is 0, must be at least 1"))?;
            let there = times(Marker::Split(i as u32));
            require(there == 1, || {
                format!("`virtual_token_splits` has {splits} entries, `template` has no `{{{{ virtual_{i} }}}}`")
            })?;
        }
        Ok(())
    }
}

impl CardStopping {
    fn check(&self) -> Result<()> {
        let (most, longest) = TaskCard::MAX_STOP_SEQUENCES;
        let n = self.stop_sequences.len();
        require(n <= most, || format!("`stopping.stop_sequences` has {n} entries, at most {most}"))?;
        for (i, stop) in self.stop_sequences.iter().enumerate() {
            require((1..=longest).contains(&stop.len()), || {
                let len = stop.len();
                format!("`stopping.stop_sequences[{i}]` has {len} bytes, must have 1 to {longest}")
            })?;
        }
        require(self.max_new_tokens != Some(0), || "`stopping.max_new_tokens` is 0, must be at least 1".into())
    }
}

impl CardSampling {
    fn check(&self) -> Result<()> {
        let within = |key: &str, value: Option<f32>, ok: fn(f32) -> bool, rule: &str| match value {
            Some(v) if !ok(v) => Err(malformed(format!("`sampling.{key}` is {v}, must be {rule}"))),
            _ => Ok(()),
        };
        // Each range also refuses NaN and infinity, which TOML can spell.
        within("temperature", self.temperature, |v| (0.0..=100.0).contains(&v), "0 to 100")?;
        within("top_p", self.top_p, |v| v > 0.0 && v <= 1.0, "above 0, at most 1")?;
        within("min_p", self.min_p, |v| (0.0..=1.0).contains(&v), "0 to 1")?;
        let penalty = self.repetition_penalty;
        within("repetition_penalty", penalty, |v| v > 0.0 && v <= 100.0, "above 0, at most 100")
    }
}

fn malformed(message: String) -> Error {
    Error::new(Kind::InvalidArgument, format!("task.toml: {message}"))
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(malformed(message())) }
}

/// One line: where, the offending line (it shows the key), what is wrong with it.
fn describe(text: &str, e: &toml::de::Error) -> String {
    let Some(start) = e.span().map(|span| span.start).filter(|&at| text.is_char_boundary(at)) else {
        return e.message().to_owned();
    };
    let before = &text[..start];
    let from = before.rfind('\n').map_or(0, |at| at + 1);
    let line: String = text[from..].lines().next().unwrap_or("").trim().chars().take(80).collect();
    format!("line {} (`{line}`): {}", before.matches('\n').count() + 1, e.message())
}

#[cfg(test)]
mod tests;
