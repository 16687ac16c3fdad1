//! The task card, `task.toml`: how one adapter's requests are worded, stopped and sampled.
//!
//! A card comes from whoever uploads an adapter, so everything in it is checked when it is parsed:
//! what [`TaskCard::parse`] returns holds only values that a request may use as they are.
mod template;

use super::Method;
use crate::error::{Error, Kind, Result};
use serde::Deserialize;
use std::collections::HashSet;
use template::Template;

/// A card beside an adapter's weights, or alone: then the adapter is its text.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskCard {
    /// One sentence for whoever lists adapters.
    #[serde(default)]
    pub description: String,
    /// Text that belongs to the adapter's own prefix: computed once, shared by every request.
    pub prefix: Option<String>,
    /// minijinja source, `input` being the request's prompt; `None`: the prompt as it is.
    template: Option<Template>,
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

    /// The text sent to the model for a request whose prompt is `input`.
    ///
    /// # Errors
    /// `InvalidArgument` if the template fails on this input or passes [`TaskCard::MAX_RENDERED_BYTES`].
    pub fn render(&self, input: &str) -> Result<String> {
        match &self.template {
            Some(template) => template.render(input),
            None => Ok(input.to_owned()),
        }
    }

    /// Longest text that [`TaskCard::render`] makes.
    pub const MAX_RENDERED_BYTES: usize = template::MAX_OUTPUT;

    /// What Classify scores for each label: `verbalizers`, or the labels themselves.
    pub fn verbalizers(&self) -> &[String] {
        if self.verbalizers.is_empty() { &self.labels } else { &self.verbalizers }
    }

    /// Default stopping.
    pub fn stopping(&self) -> &CardStopping {
        &self.stopping
    }

    /// Default sampling.
    pub fn sampling(&self) -> &CardSampling {
        &self.sampling
    }

    /// Whether there are tokens of text in the adapter's own prefix.
    pub fn has_prefix_text(&self) -> bool {
        self.prefix.as_ref().is_some_and(|text| !text.is_empty()) || !self.control_tokens.is_empty()
    }

    /// Whether a request's own text is tokenised with special tokens (BOS).
    ///
    /// The card decides if it says so. Otherwise a text-only adapter with prefix text has its BOS in the
    /// prefix already, so `false`; after virtual tokens PEFT's inputs keep theirs, so `true`.
    pub fn adds_special_tokens(&self, method: Method) -> bool {
        self.add_special_tokens.unwrap_or(method != Method::Text || !self.has_prefix_text())
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
        self.stopping.check()?;
        self.sampling.check()
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
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const FULL: &str = r#"
description = "sentiment of a review"
prefix = "Reviews and their sentiment.\n"
template = "{{ input }}\n=>"
add_special_tokens = false
labels = ["positive", "negative"]
verbalizers = [" positive", " negative"]
task_id = 2
control_tokens = ["<json>"]
[stopping]
stop_sequences = ["\n"]
max_new_tokens = 48
[sampling]
temperature = 0.5
top_k = 40
top_p = 0.9
min_p = 0.05
repetition_penalty = 1.1
"#;

    #[test]
    fn every_key_is_read() {
        let card = TaskCard::parse(FULL).unwrap();
        assert_eq!(card.description, "sentiment of a review");
        assert_eq!(card.render("good").unwrap(), "good\n=>");
        assert_eq!(card.labels, ["positive", "negative"]);
        assert_eq!(card.verbalizers(), [" positive", " negative"]);
        assert_eq!((card.task_id, &card.control_tokens[..]), (2, &["<json>".to_owned()][..]));
        assert_eq!(card.stopping().stop_sequences, ["\n"]);
        assert_eq!(card.stopping().max_new_tokens, Some(48));
        let s = card.sampling();
        assert_eq!((s.temperature, s.top_k, s.top_p), (Some(0.5), Some(40), Some(0.9)));
        assert_eq!((s.min_p, s.repetition_penalty), (Some(0.05), Some(1.1)));
    }

    #[test]
    fn nothing_is_required() {
        let card = TaskCard::parse("").unwrap();
        assert_eq!(card.render("as {{ it }} is").unwrap(), "as {{ it }} is");
        assert!(card.verbalizers().is_empty() && !card.has_prefix_text());
        assert_eq!(TaskCard::parse("labels = ['a']").unwrap().verbalizers(), ["a"]);
        assert_eq!(TaskCard::default().render("x").unwrap(), "x");
    }

    #[test]
    fn special_tokens_follow_prefix_text_and_method() {
        let adds = |text: &str, method| TaskCard::parse(text).unwrap().adds_special_tokens(method);
        assert!(adds("", Method::Text));
        assert!(!adds("prefix = 'a'", Method::Text));
        assert!(!adds("control_tokens = ['a']", Method::Text));
        assert!(adds("prefix = 'a'", Method::PromptTuning));
        assert!(!adds("add_special_tokens = false", Method::PrefixTuning));
        assert!(adds("prefix = 'a'\nadd_special_tokens = true", Method::Text));
    }

    #[test]
    fn refusals_name_the_key_and_the_rule() {
        let cases = [
            ("descripton = 'x'", "line 1 (`descripton = 'x'`): unknown field `descripton`"),
            ("\n[stopping]\nmax_new_tokens = 'x'", "line 3 (`max_new_tokens = 'x'`)"),
            ("[stopping]\nmax_new_tokens = -1", "line 2"),
            ("[stopping]\nmax_new_tokens = 0", "`stopping.max_new_tokens` is 0"),
            ("[stopping]\nstop_sequences = ['']", "`stopping.stop_sequences[0]` has 0 bytes"),
            ("[sampling]\ntemperature = nan", "`sampling.temperature` is NaN, must be 0 to 100"),
            ("[sampling]\ntop_p = 0.0", "`sampling.top_p` is 0,"),
            ("[sampling]\nmin_p = 1.5", "`sampling.min_p` is 1.5,"),
            ("[sampling]\nrepetition_penalty = inf", "`sampling.repetition_penalty` is inf"),
            ("labels = ['a', 'a']", "`labels[1]` is \"a\" once more"),
            ("labels = ['a']\nverbalizers = ['b', 'c']", "`verbalizers` has 2 entries, `labels` has 1"),
            ("control_tokens = ['']", "`control_tokens[0]` is empty"),
            ("template = '{{ input '", "`template`"),
        ];
        for (text, expected) in cases {
            let e = TaskCard::parse(text).unwrap_err();
            assert_eq!(e.kind(), Kind::InvalidArgument);
            let message = e.to_string();
            assert!(message.starts_with("task.toml: ") && message.contains(expected), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
        let e = TaskCard::parse(&"#".repeat(TaskCard::MAX_BYTES + 1)).unwrap_err();
        assert!(e.to_string().contains("1048577 bytes, at most 1048576"), "{e}");
    }
}
