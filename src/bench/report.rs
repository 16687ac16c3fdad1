//! What a bench came to: for people, for programs, and as a page.
mod chart;
mod html;
mod json;
mod plots;
mod table;

use super::measure::Summary;
use super::{Load, Plan, Point, Requests, Sweep, Synthetic};
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
        let held = |p: &&Point| p.metrics.good_share.is_some_and(|share| share >= super::HOLDS);
        let rates = matches!(self.sweep, Some(Sweep::Rate { .. }));
        self.points
            .iter()
            .filter(|p| rates && held(p))
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
    let (m, s) = (&point.metrics, &point.server);
    let (kv_mean, kv_most) = point.over_time(|sample| sample.kv_use * 100.0);
    let (running, most_running) = point.over_time(|sample| f64::from(sample.running));
    let (adapters, most_adapters) = point.over_time(|sample| f64::from(sample.adapters));
    let mut rows = vec![
        ("request_throughput", format!("{} requests/s", number(m.request_throughput))),
        ("output_throughput", format!("{} tokens/s", number(m.output_throughput))),
        ("total_token_throughput", format!("{} tokens/s", number(m.total_token_throughput))),
    ];
    if let (Some(goodput), Some(share)) = (m.request_goodput, m.good_share) {
        rows.push((
            "request_goodput",
            format!("{} requests/s, {} % of those sent", number(goodput), number(share * 100.0)),
        ));
    }
    rows.push(("fairness (Jain)", format!("{:.3} over {} tenants", point.fairness.jain, point.fairness.tenants)));
    rows.push(("ttft of tenants", format!("slowest mean / fastest mean = {}", number(point.fairness.ttft_ratio))));
    if let Some(rate) = s.prefix_hit_rate() {
        let (misses, evictions) = (s.prefix_misses, s.prefix_evictions);
        rows.push(("prefix page hits", format!("{:.1} %; {misses} compiled again, {evictions} evicted", rate * 100.0)));
    }
    rows.push((
        "KV use",
        format!("mean {} %, peak {} % of {} pages", number(kv_mean), number(kv_most), s.kv_pages_total),
    ));
    rows.push(("batch", format!("mean {} sequences of {} adapters", number(running), number(adapters))));
    rows.push(("", format!("peak {} sequences, {} adapters", number(most_running), number(most_adapters))));
    rows.push(("tokens a step", number(s.tokens_a_step())));
    if s.preemptions > 0 {
        rows.push(("preemptions", s.preemptions.to_string()));
    }
    if let Load::Rate { .. } = point.load {
        rows.push(("latest sending", format!("{} ms after its time", number(m.max_send_delay))));
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
    names.extend(["tok/s", "ttft\np50", "ttft\np99", "tpot\np50", "e2el\np99", "Jain", "hits\n%", "KV\n%"]);
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
            number(p.over_time(|sample| sample.kv_use * 100.0).1),
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
