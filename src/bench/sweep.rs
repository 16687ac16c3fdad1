//! What changes from run to run.
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// Doublings at most, where nobody gives an end: a thousandfold.
const DOUBLINGS: u32 = 10;

/// Bisections between the last rate that held and the first that did not: within 1/8 of the doubling.
const BISECTIONS: u32 = 3;

/// Runs of a sweep over adapters, at most.
const POINTS: usize = 32;

/// A series of runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Sweep {
    /// `adapters:1,10,100`: so many adapters each.
    Adapters(Vec<usize>),
    /// `rate:2..` or `rate:2..64`: doubles the rate until too few requests are within the limits, then closes in.
    Rate {
        /// Requests a second of the first run.
        from: f64,
        /// No run has more.
        to: Option<f64>,
    },
}

impl FromStr for Sweep {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |rule: String| Error::invalid("sweep", format!("{text:?}"), rule);
        let form = "must be adapters:N,N,... or rate:FROM.. or rate:FROM..TO";
        match text.split_once(':') {
            Some(("adapters", counts)) => {
                let count = |part: &str| match part.trim().parse::<usize>() {
                    Ok(n) if n <= 100_000 => Ok(n),
                    _ => Err(wrong(format!("{part:?} must be a number of adapters from 0 to 100000"))),
                };
                let counts = counts.split(',').map(count).collect::<Result<Vec<_>>>()?;
                if counts.len() > POINTS {
                    return Err(wrong(format!("must have at most {POINTS} points")));
                }
                Ok(Sweep::Adapters(counts))
            }
            Some(("rate", range)) => {
                let rate = |part: &str| match part.parse::<f64>() {
                    Ok(rate) if rate > 0.0 && rate <= 1e6 => Ok(rate),
                    _ => Err(wrong(format!("{part:?} must be a rate above 0 and at most 1e6"))),
                };
                let (from, to) = range.split_once("..").ok_or_else(|| wrong(form.into()))?;
                let (from, to) = (rate(from)?, if to.is_empty() { None } else { Some(rate(to)?) });
                if to.is_some_and(|to| to < from) {
                    return Err(wrong("the second rate must be at least the first".into()));
                }
                Ok(Sweep::Rate { from, to })
            }
            _ => Err(wrong(form.into())),
        }
    }
}

impl fmt::Display for Sweep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sweep::Adapters(counts) => {
                let counts: Vec<_> = counts.iter().map(usize::to_string).collect();
                write!(f, "adapters:{}", counts.join(","))
            }
            Sweep::Rate { from, to: None } => write!(f, "rate:{from}.."),
            Sweep::Rate { from, to: Some(to) } => write!(f, "rate:{from}..{to}"),
        }
    }
}

/// Finds the highest rate that holds: doubles, then bisects. Ask and tell in turn.
#[derive(Clone, Debug)]
pub struct RateSearch {
    next: Option<f64>,
    most: f64,
    held: Option<f64>,
    failed: Option<f64>,
    bisections: u32,
}

impl RateSearch {
    /// From a rate, up to one if given.
    pub fn new(from: f64, to: Option<f64>) -> Self {
        let most = to.unwrap_or(from * f64::from(1u32 << DOUBLINGS));
        RateSearch { next: Some(from), most, held: None, failed: None, bisections: BISECTIONS }
    }

    /// The rate to try; none: the search is over.
    pub fn next_rate(&self) -> Option<f64> {
        self.next
    }

    /// Whether the rate asked for last held.
    pub fn tell(&mut self, held: bool) {
        let Some(rate) = self.next.take() else { return };
        if held {
            self.held = Some(rate);
        } else {
            self.failed = Some(rate);
        }
        self.next = match (self.held, self.failed) {
            (Some(held), Some(failed)) if self.bisections > 0 => {
                self.bisections -= 1;
                Some((held + failed) / 2.0)
            }
            // Not even the first one: there is nothing to close in on.
            (_, Some(_)) => None,
            (_, None) => Some((rate * 2.0).min(self.most)).filter(|next| *next > rate),
        };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn search(from: f64, to: Option<f64>, capacity: f64) -> Vec<f64> {
        let (mut search, mut tried) = (RateSearch::new(from, to), Vec::new());
        while let Some(rate) = search.next_rate() {
            tried.push(rate);
            search.tell(rate <= capacity);
        }
        tried
    }

    #[test]
    fn rates_double_then_close_in() {
        assert_eq!(search(2.0, None, 11.0), [2.0, 4.0, 8.0, 16.0, 12.0, 10.0, 11.0]);
        assert_eq!(search(2.0, None, 1.0), [2.0]);
        assert_eq!(search(2.0, Some(12.0), 100.0), [2.0, 4.0, 8.0, 12.0]);
        assert_eq!(search(1.0, None, f64::INFINITY).len() as u32, DOUBLINGS + 1);
    }

    #[test]
    fn forms_come_back_and_errors_name_what_is_wrong() {
        for text in ["adapters:1,10,100", "rate:2..", "rate:0.5..64"] {
            assert_eq!(text.parse::<Sweep>().unwrap().to_string(), text);
        }
        for (text, part) in [
            ("adapters:", "\"\""),
            ("adapters:1,x", "\"x\""),
            ("rate:2", "FROM.."),
            ("rate:0..", "above 0"),
            ("rate:8..4", "at least the first"),
            ("tenants:1", "adapters:N"),
        ] {
            let message = text.parse::<Sweep>().unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
