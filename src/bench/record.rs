//! What became of one request.
//!
//! Times of a request count from when it was due. In an open loop that is its place in the plan, as in wrk2: a generator
//! that falls behind shows as latency, where times from the sending would hide it ("coordinated omission") and have a
//! rate hold that was never offered. vLLM's benchmark counts from the sending; a generator that keeps up gives the same.
//! In a closed loop a request is due when it is sent.
use super::workload::Tenant;
use crate::error::{Error, Result};
use std::str::FromStr;
use std::time::Duration;

/// One request from its sending to its end. Times count from the run's start.
#[derive(Clone, Debug)]
pub struct Record {
    /// Whose it was.
    pub tenant: Tenant,
    /// When it was to be sent; in a closed loop, when it was.
    pub due: Duration,
    /// When it was sent.
    pub sent: Duration,
    /// When it ended, one way or the other.
    pub ended: Duration,
    /// From when it was due to the first token; none where none came.
    pub ttft: Option<Duration>,
    /// Between one token and the next.
    pub gaps: Vec<Duration>,
    /// From arrival to the first scheduling, as the server says.
    pub queued: Option<Duration>,
    /// Of the input, the prefix aside.
    pub prompt_tokens: usize,
    /// Of those, found in the server's cache.
    pub cached_tokens: usize,
    /// Received.
    pub output_tokens: usize,
    /// How many it had to bring, where that was known before.
    pub wanted: Option<usize>,
    /// How it ended.
    pub outcome: Outcome,
}

/// What a request failed with whose stream ended as if all were well, but without the answer's last message, the one
/// with the usage.
pub const INCOMPLETE: &str = "INCOMPLETE_ANSWER";

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Whole.
    Done,
    /// With that status, by gRPC's name, or as [`INCOMPLETE`].
    Failed(&'static str),
    /// The run was ended while it was under way.
    Interrupted,
}

impl Record {
    /// From when it was due to the end.
    pub fn e2el(&self) -> Duration {
        self.ended.saturating_sub(self.due)
    }

    /// How late it was sent.
    pub fn send_delay(&self) -> Duration {
        self.sent.saturating_sub(self.due)
    }

    /// When the server began with it: the server tells with its last message; of a request that broke off it is known
    /// from the first token on. None where it never began.
    pub(super) fn scheduled(&self) -> Option<Duration> {
        self.queued.map(|queued| self.sent + queued).or(self.ttft.map(|ttft| self.due + ttft))
    }

    /// Time of each output token but the first; none for less than two.
    pub fn tpot(&self) -> Option<Duration> {
        let (ttft, rest) = (self.ttft?, self.output_tokens.checked_sub(1).filter(|rest| *rest > 0)?);
        Some(self.e2el().saturating_sub(ttft).div_f64(rest as f64))
    }
}

/// What a request must keep to count as goodput. What is not given always holds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// First token within.
    pub ttft: Option<Duration>,
    /// Each further token within, on average.
    pub tpot: Option<Duration>,
    /// All within.
    pub e2el: Option<Duration>,
}

impl Limits {
    /// Nothing is asked for.
    pub fn is_empty(&self) -> bool {
        *self == Limits::default()
    }

    /// Several of `ttft:MS`, `tpot:MS`, `e2el:MS` as one.
    ///
    /// # Errors
    /// `InvalidArgument` where one is given twice.
    pub fn all(parts: &[Limits]) -> Result<Limits> {
        let mut all = Limits::default();
        for part in parts {
            for (name, into, from) in [
                ("ttft", &mut all.ttft, part.ttft),
                ("tpot", &mut all.tpot, part.tpot),
                ("e2el", &mut all.e2el, part.e2el),
            ] {
                if from.is_some() && into.is_some() {
                    return Err(Error::invalid("goodput", name, "given twice"));
                }
                *into = from.or(*into);
            }
        }
        Ok(all)
    }

    /// Whether a request came whole and within the limits.
    pub fn hold(&self, record: &Record) -> bool {
        // Without a second token there is no time of one to exceed.
        let within = |limit: Option<Duration>, took: Option<Duration>, missing: bool| match (limit, took) {
            (Some(limit), Some(took)) => took <= limit,
            (Some(_), None) => missing,
            (None, _) => true,
        };
        record.outcome == Outcome::Done
            && within(self.ttft, record.ttft, false)
            && within(self.tpot, record.tpot(), true)
            && within(self.e2el, Some(record.e2el()), false)
    }

    /// As it is given: `ttft:200 tpot:50`, in milliseconds.
    pub fn describe(&self) -> String {
        let part = |name, limit: Option<Duration>| limit.map(|d| format!("{name}:{}", d.as_secs_f64() * 1e3));
        let parts = [part("ttft", self.ttft), part("tpot", self.tpot), part("e2el", self.e2el)];
        parts.into_iter().flatten().collect::<Vec<_>>().join(" ")
    }
}

impl FromStr for Limits {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |rule| Error::invalid("goodput", format!("{text:?}"), rule);
        let (name, ms) = text.split_once(':').ok_or_else(|| wrong("must be ttft:MS, tpot:MS or e2el:MS"))?;
        let limit = match ms.parse::<f64>() {
            Ok(ms) if ms > 0.0 && ms <= 1e9 => Some(Duration::from_secs_f64(ms * 1e-3)),
            _ => return Err(wrong("the milliseconds must be above 0 and at most 1e9")),
        };
        match name {
            "ttft" => Ok(Limits { ttft: limit, ..Limits::default() }),
            "tpot" => Ok(Limits { tpot: limit, ..Limits::default() }),
            "e2el" => Ok(Limits { e2el: limit, ..Limits::default() }),
            _ => Err(wrong("must be ttft:MS, tpot:MS or e2el:MS")),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Sent at `sent`, first token after `ttft`, then one after each of `gaps`; milliseconds.
    pub(in crate::bench) fn record(tenant: usize, sent: u64, ttft: u64, gaps: &[u64]) -> Record {
        let ms = Duration::from_millis;
        Record {
            tenant: Tenant(tenant),
            due: ms(sent),
            sent: ms(sent),
            ended: ms(sent + ttft + gaps.iter().sum::<u64>()),
            ttft: Some(ms(ttft)),
            gaps: gaps.iter().copied().map(ms).collect(),
            queued: Some(Duration::ZERO),
            prompt_tokens: 10,
            cached_tokens: 0,
            output_tokens: gaps.len() + 1,
            wanted: Some(gaps.len() + 1),
            outcome: Outcome::Done,
        }
    }

    #[test]
    fn times_are_those_of_vllm() {
        let r = record(0, 1000, 50, &[10, 30]);
        assert_eq!((r.e2el().as_millis(), r.tpot().unwrap().as_millis()), (90, 20));
        assert_eq!(record(0, 0, 50, &[]).tpot(), None);
    }

    #[test]
    fn a_late_sending_counts_against_the_limits() {
        // Due at 1000, sent at 1200, first token at 1250, second at 1260.
        let late = Record { due: Duration::from_millis(1000), ..record(0, 1200, 50, &[10]) };
        let late = Record { ttft: late.ttft.map(|ttft| ttft + late.send_delay()), ..late };
        assert_eq!((late.e2el().as_millis(), late.tpot().unwrap().as_millis()), (260, 10));
        assert!("e2el:260".parse::<Limits>().unwrap().hold(&late));
        assert!(!"e2el:259".parse::<Limits>().unwrap().hold(&late));
        // The server knows nothing of the delay.
        let queued = Record { queued: Some(Duration::from_millis(5)), ..late.clone() };
        assert_eq!(queued.scheduled(), Some(Duration::from_millis(1205)));
        assert_eq!(Record { queued: None, ..late }.scheduled(), Some(Duration::from_millis(1250)));
    }

    #[test]
    fn limits_judge_whole_requests() {
        let limits = Limits::all(&["ttft:50".parse().unwrap(), "tpot:20".parse().unwrap()]).unwrap();
        assert_eq!(limits.describe(), "ttft:50 tpot:20");
        assert!(limits.hold(&record(0, 0, 50, &[10, 30])));
        assert!(limits.hold(&record(0, 0, 50, &[])));
        assert!(!limits.hold(&record(0, 0, 51, &[10, 30])));
        assert!(!limits.hold(&record(0, 0, 50, &[10, 31])));
        assert!(!limits.hold(&Record { outcome: Outcome::Interrupted, ..record(0, 0, 1, &[]) }));
        assert!(!limits.hold(&Record { ttft: None, ..record(0, 0, 1, &[]) }));
    }

    #[test]
    fn errors_name_the_value() {
        for text in ["ttft", "ttft:0", "ttft:x", "itl:5"] {
            assert!(text.parse::<Limits>().unwrap_err().to_string().contains(text));
        }
        let twice = ["ttft:5".parse().unwrap(), "ttft:6".parse().unwrap()];
        assert!(Limits::all(&twice).unwrap_err().to_string().contains("ttft"));
    }
}
