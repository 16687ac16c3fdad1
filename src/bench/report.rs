//! What a bench came to: for people, for programs, and as a page.
mod chart;
mod html;
mod json;
mod plots;
mod table;

use super::measure::Summary;
use super::{Load, Occupancy, Plan, Point, Requests, Sweep, Synthetic};
use crate::rpc::proto;
use crate::tokenizer::chat::date::now;

/// What a reader must know to believe the figures, and the plan cannot tell.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// The command that was given.
    pub command: String,
    /// Which server: an address, or that it ran in this process.
    pub server: String,
    /// The machine that the load came from.
    pub host: String,
}

/// The figures of all runs, and what they are about.
#[derive(Clone, Debug)]
pub struct Report {
    /// Given by the caller.
    pub setup: Setup,
    /// In UTC.
    pub date: String,
    /// prefixd's version, as the server tells it.
    pub version: String,
    /// The base model.
    pub model: proto::ModelInfo,
    /// The server's limits.
    pub limits: proto::Limits,
    /// Where every draw came from.
    pub seed: u64,
    /// What requests said, in a line.
    pub requests: String,
    /// How they spread over adapters.
    pub popularity: String,
    /// When they were sent.
    pub load: Load,
    /// What counted as goodput; empty: nothing was asked for.
    pub goodput: String,
    /// What changed from run to run.
    pub sweep: Option<Sweep>,
    /// The runs.
    pub points: Vec<Point>,
    /// Somebody ended it early.
    pub interrupted: bool,
}

impl Report {
    pub(super) fn new(plan: &Plan, facts: proto::GetServerInfoResponse, points: Vec<Point>, interrupted: bool) -> Self {
        let (requests, usual) = match &plan.requests {
            Requests::Synthetic { adapters, recipe, synthetic } => {
                let made = match (&plan.sweep, adapters) {
                    (Some(Sweep::Adapters(_)), _) | (None | Some(Sweep::Rate { .. }), 1..) => {
                        format!("{} of {} virtual tokens", recipe.method.as_str(), recipe.prefix_len)
                    }
                    _ => "bare base".to_owned(),
                };
                let Synthetic { prompt_len, output_len } = synthetic;
                (format!("random: prompt {prompt_len}, output {output_len} tokens; {made}"), "uniform")
            }
            Requests::Tasks(tasks) => (format!("{} lines of a tasks file", tasks.lines.len()), "order of the file"),
        };
        Report {
            setup: plan.setup.clone(),
            date: now("%Y-%m-%d %H:%M UTC").unwrap_or_default(),
            version: facts.version,
            model: facts.model.unwrap_or_default(),
            limits: facts.limits.unwrap_or_default(),
            seed: plan.seed,
            requests,
            popularity: plan.popularity.map_or_else(|| usual.to_owned(), |p| p.to_string()),
            load: plan.load,
            goodput: plan.goodput.describe(),
            sweep: plan.sweep.clone(),
            points,
            interrupted,
        }
    }

    /// The run that is shown in detail: the only one, the largest of a sweep over adapters, the highest rate that
    /// held. None where it was stopped before the first request.
    pub fn shown(&self) -> Option<&Point> {
        let swept = |a: &&Point, b: &&Point| a.swept.unwrap_or(0.0).total_cmp(&b.swept.unwrap_or(0.0));
        match self.sweep {
            Some(Sweep::Rate { .. }) => self.highest_rate().or(self.points.first()),
            _ => self.points.iter().max_by(swept),
        }
    }

    /// The run at the highest rate that held.
    pub fn highest_rate(&self) -> Option<&Point> {
        let rates = matches!(self.sweep, Some(Sweep::Rate { .. }));
        self.points
            .iter()
            .filter(|p| rates && p.metrics.holds())
            .max_by(|a, b| a.swept.unwrap_or(0.0).total_cmp(&b.swept.unwrap_or(0.0)))
    }

    /// The runs in the order of what was swept.
    fn in_order(&self) -> Vec<&Point> {
        let mut points: Vec<&Point> = self.points.iter().collect();
        points.sort_by(|a, b| a.swept.unwrap_or(0.0).total_cmp(&b.swept.unwrap_or(0.0)));
        points
    }

    /// What a sweep over rates found, in a line.
    fn verdict(&self) -> Option<String> {
        let Some(Sweep::Rate { from, .. }) = self.sweep else { return None };
        let percent = super::HOLDS * 100.0;
        Some(match self.highest_rate().and_then(|p| p.swept) {
            Some(rate) => format!(
                "{} requests/s is the highest rate tried at which {percent:.0} % of the requests keep {}",
                number(rate),
                self.goodput
            ),
            None => format!(
                "not even at {} requests/s do {percent:.0} % of the requests keep {}",
                number(from),
                self.goodput
            ),
        })
    }
}

/// Rows of the table of latencies.
fn latencies(point: &Point) -> [(&'static str, &'static str, Summary); 5] {
    let m = &point.metrics;
    [
        ("ttft", "time to the first token", m.ttft),
        ("tpot", "time per output token after it", m.tpot),
        ("itl", "from a token to the next", m.itl),
        ("e2el", "end to end", m.e2el),
        ("queued", "of ttft, before the first scheduling", m.queued),
    ]
}

/// Rows of the table of figures: name, value with its unit.
fn figures(point: &Point) -> Vec<(&'static str, String)> {
    let (m, s, Occupancy { running, adapters, kv_use }) = (&point.metrics, &point.server, point.occupancy);
    let mut rows = vec![
        ("request_throughput", format!("{} requests/s", number(m.request_throughput))),
        ("output_throughput", format!("{} tokens/s", number(m.output_throughput))),
        ("total_token_throughput", format!("{} tokens/s", number(m.total_token_throughput))),
    ];
    if let (Some(goodput), Some(share)) = (m.request_goodput, m.good_share) {
        rows.push((
            "request_goodput",
            format!("{} requests/s, {} % of those due", number(goodput), number(share * 100.0)),
        ));
    }
    rows.push(("fairness (Jain)", format!("{:.3} over {} tenants", point.fairness.jain, point.fairness.tenants)));
    rows.push(("ttft of tenants", format!("slowest mean / fastest mean = {}", number(point.fairness.ttft_ratio))));
    rows.push((
        "prompts from cache",
        format!("{} of {} tokens, {} %", m.cached_tokens, m.input_tokens, number(m.cached_share() * 100.0)),
    ));
    if let Some(rate) = s.prefix_hit_rate() {
        let (misses, evictions) = (s.prefix_misses, s.prefix_evictions);
        rows.push(("prefix page hits", format!("{:.1} %; {misses} compiled again, {evictions} evicted", rate * 100.0)));
    }
    let (mean, peak) = (number(kv_use.mean * 100.0), number(kv_use.peak * 100.0));
    rows.push(("KV use", format!("mean {mean} %, peak {peak} % of {} pages", s.kv_pages_total)));
    rows.push(("batch", format!("mean {} sequences of {} adapters", number(running.mean), number(adapters.mean))));
    rows.push(("", format!("peak {} sequences, {} adapters", number(running.peak), number(adapters.peak))));
    rows.push(("tokens a step", number(s.tokens_a_step())));
    if s.preemptions > 0 {
        rows.push(("preemptions", s.preemptions.to_string()));
    }
    if let Load::Rate { .. } = point.load {
        rows.push(("latest sending", format!("{} ms after its time, part of ttft and e2el", number(m.max_send_delay))));
    }
    rows
}

/// Who was served, in a line.
fn tally(point: &Point) -> String {
    let m = &point.metrics;
    let mut line = format!("{} requests in {} s: {} completed", m.sent, number(m.duration), m.completed);
    match m.failures() {
        0 => line += ", none failed",
        n => {
            let by: Vec<_> = m.failed.iter().map(|(status, n)| format!("{n} {status}")).collect();
            line += &format!(", {n} failed ({})", by.join(", "));
        }
    }
    if m.interrupted > 0 {
        line += &format!(", {} interrupted", m.interrupted);
    }
    if m.unsent > 0 {
        line += &format!("; {} MORE WERE DUE, BUT THE GENERATOR FELL BEHIND", m.unsent);
    }
    line += &format!("; {} input and {} output tokens", m.input_tokens, m.output_tokens);
    if point.wrong_length > 0 {
        line += &format!("; {} ANSWERS HAVE ANOTHER LENGTH THAN WAS DRAWN", point.wrong_length);
    }
    line
}

/// The table of a sweep: names of columns, and a row a run.
fn sweep_rows(report: &Report) -> (Vec<&'static str>, Vec<Vec<String>>) {
    let rates = matches!(report.sweep, Some(Sweep::Rate { .. }));
    let good = !report.goodput.is_empty();
    let mut names = vec![if rates { "offered\nreq/s" } else { "adapters" }, "done", "failed", "req/s"];
    if good {
        names.extend(["good\nreq/s", "good\n%"]);
    }
    names.extend(["tok/s", "ttft\np50", "ttft\np99", "tpot\np50", "e2el\np99"]);
    names.extend(["Jain", "hits\n%", "cached\n%", "KV\n%"]);
    let row = |p: &&Point| {
        let m = &p.metrics;
        let mut row = vec![
            p.swept.map_or_else(String::new, |x| if rates { number(x) } else { format!("{x:.0}") }),
            m.completed.to_string(),
            m.failures().to_string(),
            number(m.request_throughput),
        ];
        if good {
            row.push(number(m.request_goodput.unwrap_or(0.0)));
            row.push(number(m.good_share.unwrap_or(0.0) * 100.0));
        }
        row.extend([
            number(m.output_throughput),
            number(m.ttft.median),
            number(m.ttft.p99),
            number(m.tpot.median),
            number(m.e2el.p99),
            format!("{:.3}", p.fairness.jain),
            p.server.prefix_hit_rate().map_or_else(|| "-".into(), |rate| number(rate * 100.0)),
            number(m.cached_share() * 100.0),
            number(p.occupancy.kv_use.peak * 100.0),
        ]);
        row
    };
    (names, report.in_order().iter().map(row).collect())
}

/// Three digits that matter, no more than two after the point.
fn number(x: f64) -> String {
    match x.abs() {
        _ if x == x.trunc() && x.abs() < 1e6 => format!("{x:.0}"),
        size if size >= 100.0 => format!("{x:.0}"),
        size if size >= 10.0 => format!("{x:.1}"),
        _ => format!("{x:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::point::tests::{plan, point};
    use super::super::record::tests::record;
    use super::super::{RateSearch, Record};
    use super::*;
    use std::time::Duration;

    /// A sweep over rates from 2 on, of requests that last no time of their own but wait for a server and a generator
    /// that take `server` and `generator` a second, one after the other.
    fn swept(server: f64, generator: f64) -> Report {
        let plan = plan("a", Some(Sweep::Rate { from: 2.0, to: None }));
        let records = |rate: f64| -> Vec<Record> {
            let (mut may_send, mut may_serve) = (0.0, 0.0);
            let request = |i: u32| {
                let due = f64::from(i) / rate;
                let sent = f64::max(due, may_send);
                let ended = f64::max(sent, may_serve) + 1.0 / server;
                (may_send, may_serve) = (sent + 1.0 / generator, ended);
                let [due, sent, ended] = [due, sent, ended].map(Duration::from_secs_f64);
                Record { due, sent, ended, ttft: Some(ended - due), ..record(0, 0, 0, &[]) }
            };
            (0..400).map(request).collect()
        };
        let (mut search, mut points) = (RateSearch::new(2.0, None), Vec::new());
        while let Some(rate) = search.next_rate() {
            points.push(point(&plan, Some(rate), records(rate)));
            search.tell(points.last().is_some_and(|p| p.metrics.holds()));
        }
        Report::new(&plan, proto::GetServerInfoResponse::default(), points, false)
    }

    #[test]
    fn a_sweep_finds_the_rate_that_server_and_generator_sustain() {
        for (server, generator) in [(11.0, f64::INFINITY), (f64::INFINITY, 11.0)] {
            let report = swept(server, generator);
            let tried: Vec<_> = report.points.iter().filter_map(|p| p.swept).collect();
            // Doubles until one fails, then bisects.
            assert_eq!(tried, [2.0, 4.0, 8.0, 16.0, 12.0, 10.0, 11.0], "{server} {generator}");
            let held: Vec<_> = report.points.iter().map(|p| p.metrics.holds()).collect();
            assert_eq!(held, [true, true, true, false, false, true, true]);
            let shown = [report.highest_rate(), report.shown()].map(|p| p.and_then(|p| p.swept));
            assert_eq!(shown, [Some(11.0); 2]);
            let text = report.text(120);
            assert!(text.contains("11 requests/s is the highest rate tried at which 90 %"), "{text}");
        }
    }

    #[test]
    fn a_first_rate_that_fails_ends_the_sweep() {
        let report = swept(1.0, f64::INFINITY);
        assert_eq!(report.points.len(), 1);
        assert!(report.highest_rate().is_none());
        assert!(report.text(120).contains("not even at 2 requests/s do 90 %"), "{}", report.text(120));
    }

    #[test]
    fn prompts_from_the_cache_and_unsent_requests_show() {
        let plan = plan("a", None);
        let mut point = point(&plan, None, vec![Record { cached_tokens: 5, ..record(0, 0, 50, &[10]) }]);
        assert!(!tally(&point).contains("FELL BEHIND"));
        point.metrics.unsent = 3;
        let mut report = Report::new(&plan, proto::GetServerInfoResponse::default(), vec![point], false);
        for text in [Some(report.text(120)), report.html().ok()] {
            let text = text.unwrap_or_default();
            assert!(text.contains("5 of 10 tokens, 50 %") && text.contains("3 MORE WERE DUE"), "{text}");
        }
        report.sweep = Some(Sweep::Adapters(vec![1]));
        let (names, rows) = sweep_rows(&report);
        assert_eq!((names.len(), names.iter().position(|name| *name == "cached\n%")), (rows[0].len(), Some(13)));
        assert_eq!(rows[0][13], "50");
    }
}
