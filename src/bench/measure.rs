//! Figures of a run in vLLM's words and definitions (`vllm bench serve`), but that times of an open loop count from when
//! a request was due (see [`super::record`]).
use super::record::{Limits, Outcome, Record};
use std::collections::BTreeMap;
use std::time::Duration;

/// Mean, deviation and percentiles of times in milliseconds; all 0 where there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct Summary {
    pub count: usize,
    pub mean: f64,
    pub std: f64,
    pub median: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Summary {
    /// Of `values`, which get sorted.
    pub fn of(values: &mut [f64]) -> Self {
        values.sort_by(f64::total_cmp);
        let (Some(max), n) = (values.last().copied(), values.len() as f64) else { return Summary::default() };
        let mean = values.iter().sum::<f64>() / n;
        Summary {
            count: values.len(),
            mean,
            std: (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt(),
            median: percentile(values, 0.5),
            p90: percentile(values, 0.9),
            p99: percentile(values, 0.99),
            max,
        }
    }
}

/// Of sorted values, linear between neighbours, as numpy has it. 0 where there are none.
pub(super) fn percentile(sorted: &[f64], share: f64) -> f64 {
    let place = share * sorted.len().saturating_sub(1) as f64;
    let (low, part) = (place.floor() as usize, place.fract());
    match (sorted.get(low), sorted.get(low + 1)) {
        (Some(a), Some(b)) => a + (b - a) * part,
        (Some(a), None) => *a,
        _ => 0.0,
    }
}

/// Times of whole requests, sorted, in milliseconds: what the distributions are drawn from.
#[derive(Clone, Debug, Default)]
pub struct Latencies {
    pub(super) ttft: Vec<f64>,
    pub(super) tpot: Vec<f64>,
    pub(super) itl: Vec<f64>,
    pub(super) e2el: Vec<f64>,
}

impl Latencies {
    pub(super) fn of(records: &[Record]) -> Self {
        let done = || records.iter().filter(|r| r.outcome == Outcome::Done);
        let sorted = |mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values
        };
        Latencies {
            ttft: sorted(done().filter_map(|r| r.ttft).map(ms).collect()),
            tpot: sorted(done().filter_map(Record::tpot).map(ms).collect()),
            itl: sorted(done().flat_map(|r| &r.gaps).copied().map(ms).collect()),
            e2el: sorted(done().map(Record::e2el).map(ms).collect()),
        }
    }
}

/// In milliseconds.
pub(super) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The figures of a run.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Requests sent: the sum of the next three.
    pub sent: usize,
    /// Whole answers.
    pub completed: usize,
    /// Failed requests, by status.
    pub failed: BTreeMap<&'static str, usize>,
    /// Under way when the run was ended early.
    pub interrupted: usize,
    /// Not among them: requests that were due, but that the generator could not send in time.
    pub unsent: usize,
    /// Seconds from the first sending to the last end.
    pub duration: f64,
    /// Seconds from the first sending to the last.
    pub sending: f64,
    /// Input tokens of whole answers, prefixes aside.
    pub input_tokens: usize,
    /// Of those, found in the server's cache.
    pub cached_tokens: usize,
    /// Output tokens of whole answers.
    pub output_tokens: usize,
    /// Whole answers a second.
    pub request_throughput: f64,
    /// Output tokens a second.
    pub output_throughput: f64,
    /// Input and output tokens a second.
    pub total_token_throughput: f64,
    /// Whole answers within the limits a second; none without limits.
    pub request_goodput: Option<f64>,
    /// Of the requests that were due, sent or not, those within the limits; none without limits.
    pub good_share: Option<f64>,
    /// From when a request was due to its first token.
    pub ttft: Summary,
    /// Of each output token but the first.
    pub tpot: Summary,
    /// From a token to the next.
    pub itl: Summary,
    /// From when a request was due to its end.
    pub e2el: Summary,
    /// From arrival to the first scheduling, as the server says.
    pub queued: Summary,
    /// How late the generator was with a sending, at worst; milliseconds, a part of ttft and e2el. Far below them, or
    /// the generator is the bottleneck.
    pub max_send_delay: f64,
}

impl Metrics {
    /// Of all requests of a run: those sent, and how many were due but not sent.
    pub fn of(records: &[Record], unsent: usize, limits: &Limits) -> Self {
        let mut m = Metrics { sent: records.len(), unsent, ..Metrics::default() };
        for record in records {
            match record.outcome {
                Outcome::Done => {
                    m.completed += 1;
                    m.input_tokens += record.prompt_tokens;
                    m.cached_tokens += record.cached_tokens;
                    m.output_tokens += record.output_tokens;
                }
                Outcome::Failed(status) => *m.failed.entry(status).or_default() += 1,
                Outcome::Interrupted => m.interrupted += 1,
            }
        }
        let first = records.iter().map(|r| r.sent).min().unwrap_or_default();
        let until = |time: Option<Duration>| time.unwrap_or_default().saturating_sub(first).as_secs_f64();
        m.duration = until(records.iter().map(|r| r.ended).max());
        m.sending = until(records.iter().map(|r| r.sent).max());
        let a_second = |n: usize| if m.duration > 0.0 { n as f64 / m.duration } else { 0.0 };
        m.request_throughput = a_second(m.completed);
        m.output_throughput = a_second(m.output_tokens);
        m.total_token_throughput = a_second(m.input_tokens + m.output_tokens);
        if !limits.is_empty() {
            let good = records.iter().filter(|r| limits.hold(r)).count();
            m.request_goodput = Some(a_second(good));
            m.good_share = Some(good as f64 / (m.sent + unsent).max(1) as f64);
        }
        let mut times = Latencies::of(records);
        m.ttft = Summary::of(&mut times.ttft);
        m.tpot = Summary::of(&mut times.tpot);
        m.itl = Summary::of(&mut times.itl);
        m.e2el = Summary::of(&mut times.e2el);
        let done = records.iter().filter(|r| r.outcome == Outcome::Done);
        m.queued = Summary::of(&mut done.filter_map(|r| r.queued).map(ms).collect::<Vec<_>>());
        m.max_send_delay = records.iter().map(|r| ms(r.send_delay())).fold(0.0, f64::max);
        m
    }

    /// Of the input tokens of whole answers, those found in the server's cache.
    pub fn cached_share(&self) -> f64 {
        self.cached_tokens as f64 / self.input_tokens.max(1) as f64
    }

    /// Whether so many of the requests that were due were within the limits that the load counts as sustained.
    pub fn holds(&self) -> bool {
        self.good_share.is_some_and(|share| share >= super::HOLDS)
    }

    /// Failed requests of any status.
    pub fn failures(&self) -> usize {
        self.failed.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::record;
    use super::*;

    #[test]
    fn percentiles_are_those_of_numpy() {
        let sorted: Vec<f64> = (1..=10).map(f64::from).collect();
        // numpy.percentile(range(1, 11), [50, 90, 99])
        for (share, want) in [(0.5, 5.5), (0.9, 9.1), (0.99, 9.91), (0.0, 1.0), (1.0, 10.0)] {
            assert!((percentile(&sorted, share) - want).abs() < 1e-12, "{share}");
        }
        assert_eq!(percentile(&[], 0.5), 0.0);
        let s = Summary::of(&mut [3.0, 1.0, 2.0]);
        assert_eq!((s.count, s.mean, s.median, s.max), (3, 2.0, 2.0, 3.0));
        assert!((s.std - (2.0f64 / 3.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn every_request_is_counted_once() {
        let mut records = vec![record(0, 0, 50, &[10, 30]), record(1, 1000, 100, &[100])];
        records.push(Record { outcome: Outcome::Failed("RESOURCE_EXHAUSTED"), ..record(0, 500, 1, &[]) });
        records.push(Record { outcome: Outcome::Interrupted, ..record(0, 900, 1, &[]) });
        let limits = Limits { ttft: Some(Duration::from_millis(60)), ..Limits::default() };
        let m = Metrics::of(&records, 0, &limits);
        assert_eq!((m.sent, m.completed, m.failures(), m.interrupted), (4, 2, 1, 1));
        assert_eq!(m.failed["RESOURCE_EXHAUSTED"], 1);
        assert_eq!((m.input_tokens, m.output_tokens), (20, 5));
        assert!((m.duration - 1.2).abs() < 1e-9 && (m.sending - 1.0).abs() < 1e-9);
        assert!((m.output_throughput - 5.0 / 1.2).abs() < 1e-9);
        assert_eq!((m.good_share, m.itl.count, m.tpot.count), (Some(0.25), 3, 2));
        assert!((m.request_goodput.unwrap_or(0.0) - 1.0 / 1.2).abs() < 1e-9);
    }

    #[test]
    fn what_was_due_and_not_sent_was_not_within_the_limits() {
        let limits = Limits { e2el: Some(Duration::from_secs(60)), ..Limits::default() };
        let sent: Vec<_> = (0..9).map(|i| record(0, i, 50, &[10])).collect();
        let share = |unsent| Metrics::of(&sent, unsent, &limits).good_share;
        assert_eq!((share(0), share(1), share(9)), (Some(1.0), Some(0.9), Some(0.5)));
        assert!(Metrics::of(&sent, 1, &limits).holds() && !Metrics::of(&sent, 2, &limits).holds());
        assert!(!Metrics::of(&sent, 0, &Limits::default()).holds(), "nothing was asked for");
    }

    #[test]
    fn the_cached_share_is_one_of_input_tokens() {
        let cached = Record { cached_tokens: 5, ..record(0, 0, 50, &[]) };
        let m = Metrics::of(&[cached, record(0, 0, 50, &[])], 0, &Limits::default());
        assert_eq!((m.cached_tokens, m.cached_share()), (5, 0.25));
        assert_eq!(Metrics::default().cached_share(), 0.0);
    }

    #[test]
    fn nothing_sent_is_no_division_by_zero() {
        let m = Metrics::of(&[], 0, &Limits::default());
        assert_eq!((m.request_throughput, m.e2el.mean, m.good_share), (0.0, 0.0, None));
    }
}
