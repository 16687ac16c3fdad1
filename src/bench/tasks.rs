//! Requests from a file of JSON lines.
use crate::error::{Context, Error, Kind, Result};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// One line: `{"adapter": id or null, "prompt": text, "max_new_tokens": N}`; the last is optional.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(super) struct Line {
    pub adapter: Option<String>,
    pub prompt: String,
    pub max_new_tokens: Option<u32>,
}

/// The lines of a tasks file, and what they leave open.
#[derive(Clone, Debug)]
pub struct Tasks {
    pub(super) lines: Arc<[Line]>,
    /// Adapters in the order of their first line; `None` is the bare base.
    pub(super) adapters: Arc<[Option<String>]>,
    /// Lines of each of `adapters`.
    pub(super) of_adapter: Arc<[Vec<usize>]>,
    /// For lines without a number of their own. None: the task card's.
    pub(super) output_len: Option<super::Lengths>,
    /// Go on after an end-of-sequence token.
    pub(super) past_eos: PastEos,
}

/// Whether an end-of-sequence token ends an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PastEos {
    Stop,
    GoOn,
}

impl Tasks {
    /// Reads a file. Lengths of answers are the line's, else drawn from `output_len`, else the task card's;
    /// `ignore_eos` makes each as long as that.
    ///
    /// # Errors
    /// `InvalidArgument` naming the file, the line and what is wrong with it.
    pub fn read(path: &Path, output_len: Option<super::Lengths>, ignore_eos: bool) -> Result<Self> {
        let text = std::fs::read_to_string(path).or_kind(Kind::InvalidArgument, path.display())?;
        Self::parse(&text, output_len, ignore_eos).map_err(|e| e.context(path.display()))
    }

    /// The same from text.
    ///
    /// # Errors
    /// `InvalidArgument` naming the line.
    pub fn parse(text: &str, output_len: Option<super::Lengths>, ignore_eos: bool) -> Result<Self> {
        let mut lines = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let place = || format!("line {}", number + 1);
            let line: Line = serde_json::from_str(line).or_kind(Kind::InvalidArgument, place())?;
            // An empty id is how the API says the same.
            let line = Line { adapter: line.adapter.filter(|id| !id.is_empty()), ..line };
            if line.max_new_tokens == Some(0) {
                return Err(Error::invalid("max_new_tokens", 0, "must be at least 1").context(place()));
            }
            lines.push(line);
        }
        if lines.is_empty() {
            return Err(Error::invalid("tasks", "empty", "must have at least one line"));
        }
        let (mut adapters, mut of_adapter, mut known) = (Vec::new(), Vec::<Vec<usize>>::new(), HashMap::new());
        for (index, line) in lines.iter().enumerate() {
            let tenant = *known.entry(line.adapter.clone()).or_insert_with(|| {
                adapters.push(line.adapter.clone());
                of_adapter.push(Vec::new());
                adapters.len() - 1
            });
            of_adapter[tenant].push(index);
        }
        let past_eos = if ignore_eos { PastEos::GoOn } else { PastEos::Stop };
        Ok(Tasks {
            lines: lines.into(),
            adapters: adapters.into(),
            of_adapter: of_adapter.into(),
            output_len,
            past_eos,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lines_are_grouped_by_adapter() {
        let text = "{\"adapter\":\"b\",\"prompt\":\"x\"}\n\n{\"adapter\":null,\"prompt\":\"y\",\"max_new_tokens\":3}\n\
                    {\"adapter\":\"b\",\"prompt\":\"z\"}\n";
        let tasks = Tasks::parse(text, None, false).unwrap();
        assert_eq!(*tasks.adapters, [Some("b".to_owned()), None]);
        assert_eq!(*tasks.of_adapter, [vec![0, 2], vec![1]]);
        assert_eq!(tasks.lines[1].max_new_tokens, Some(3));
    }

    #[test]
    fn errors_name_the_line() {
        for (text, part) in [
            ("", "at least one line"),
            ("{\"prompt\":\"x\"}\n{\"prompt\":3}", "line 2"),
            ("{\"prompt\":\"x\",\"max_new_tokens\":0}", "line 1: `max_new_tokens` is 0"),
            ("{\"prompt\":\"x\",\"adaptor\":\"y\"}", "adaptor"),
        ] {
            let message = Tasks::parse(text, None, false).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
