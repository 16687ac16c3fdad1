//! Which charts a page has, and what is in them.
use super::chart::{Axis, COLOURS, Chart, Mark, Scale, Series};
use super::{Report, number};
use crate::bench::measure::percentile;
use crate::bench::{Point, Sweep};
use plotters::style::RGBColor;

/// Runs that are told apart in one chart, at most.
const LINES: usize = COLOURS.len();

/// Points of a curve: as fine as the eye sees.
const CURVE: usize = 240;

/// Sorted times of a run.
type Times = fn(&Point) -> &[f64];

/// A chart with its words.
pub(super) struct Plot {
    /// The element's id in the page.
    pub id: &'static str,
    pub title: String,
    /// How to read it.
    pub note: String,
    pub chart: Chart,
}

/// All of a report, in the order of the page.
pub(super) fn all(report: &Report) -> Vec<Plot> {
    let Some(shown) = report.shown() else { return Vec::new() };
    let mut plots = swept(report);
    plots.extend(distributions(report, shown));
    plots.extend(timeline(shown));
    plots.push(tenants(shown));
    plots
}

fn series(name: &str, colour: usize, points: Vec<(f64, f64)>, mark: Mark) -> Series {
    Series { name: name.to_owned(), colour: COLOURS[colour % COLOURS.len()], points, mark }
}

fn highest<'a>(series: impl IntoIterator<Item = &'a Series>) -> f64 {
    series.into_iter().flat_map(|s| &s.points).map(|(_, y)| *y).fold(0.0, f64::max)
}

/// Zeros aside: they stand for nothing measured.
fn lowest<'a>(series: impl IntoIterator<Item = &'a Series>) -> f64 {
    let values = series.into_iter().flat_map(|s| &s.points).map(|(_, y)| *y);
    values.filter(|y| *y > 0.0).fold(f64::INFINITY, f64::min)
}

/// Throughput and latency over what was swept.
fn swept(report: &Report) -> Vec<Plot> {
    let Some(sweep) = &report.sweep else { return Vec::new() };
    let points = report.in_order();
    let rates = matches!(sweep, Sweep::Rate { .. });
    let place = |i: usize, p: &Point| if rates { p.swept.unwrap_or(0.0) } else { i as f64 };
    let of = |value: &dyn Fn(&Point) -> f64| -> Vec<(f64, f64)> {
        points.iter().enumerate().map(|(i, p)| (place(i, p), value(p))).collect()
    };
    let x = || match rates {
        true => Axis::to("offered rate (requests/s)", points.iter().filter_map(|p| p.swept).fold(0.0, f64::max)),
        false => Axis::named("adapters", points.iter().map(|p| format!("{:.0}", p.swept.unwrap_or(0.0))).collect()),
    };
    let throughput = match rates {
        true => {
            let mut lines = vec![
                series("offered", 0, of(&|p| p.swept.unwrap_or(0.0)), Mark::Reference),
                series("request_throughput", 0, of(&|p| p.metrics.request_throughput), Mark::Dotted),
            ];
            lines.push(series("request_goodput", 2, of(&|p| p.metrics.request_goodput.unwrap_or(0.0)), Mark::Dotted));
            let y = Axis::to("requests/s", highest(&lines));
            let note = "Where the lines leave the dashed one, the server no longer keeps up. The end of each run, in \
                        which nothing more is sent, counts in the rates.";
            Plot {
                id: "throughput",
                title: "Throughput over offered rate".into(),
                note: note.into(),
                chart: Chart { x: x(), y, series: lines },
            }
        }
        false => {
            let lines = vec![
                series("output_throughput", 0, of(&|p| p.metrics.output_throughput), Mark::Dotted),
                series("total_token_throughput", 1, of(&|p| p.metrics.total_token_throughput), Mark::Dotted),
            ];
            let y = Axis::to("tokens/s", highest(&lines));
            Plot {
                id: "throughput",
                title: "Throughput over number of adapters".into(),
                note: "Flat is what one wants: more tasks for the same work.".into(),
                chart: Chart { x: x(), y, series: lines },
            }
        }
    };
    let lines = vec![
        series("ttft p99", 1, of(&|p| p.metrics.ttft.p99), Mark::Dotted),
        series("ttft median", 0, of(&|p| p.metrics.ttft.median), Mark::Dotted),
        series("tpot median", 2, of(&|p| p.metrics.tpot.median), Mark::Dotted),
    ];
    let over = if rates { "offered rate" } else { "number of adapters" };
    let latency = Plot {
        id: "latency",
        title: format!("Latency over {over}"),
        note: String::new(),
        chart: Chart { x: x(), y: Axis::between("ms", lowest(&lines), highest(&lines)), series: lines },
    };
    vec![throughput, latency]
}

/// How latencies spread: of one run, or of several beside each other.
fn distributions(report: &Report, shown: &Point) -> Vec<Plot> {
    let points = report.in_order();
    // Evenly picked, both ends among them.
    let n = points.len().min(LINES);
    let picked: Vec<&Point> = (0..n).map(|i| points[i * (points.len() - 1) / (n - 1).max(1)]).collect();
    let rates = matches!(report.sweep, Some(Sweep::Rate { .. }));
    let label = |p: &Point| match (p.swept, rates) {
        (Some(rate), true) => format!("{}/s", number(rate)),
        (Some(1.0), false) => "1 adapter".to_owned(),
        (Some(n), false) => format!("{n:.0} adapters"),
        (None, _) => String::new(),
    };
    let plot = |id, title: &str, of: &[(&str, Times)]| {
        let lines: Vec<(String, &[f64])> = match report.sweep {
            None => of.iter().map(|(name, values)| ((*name).to_owned(), values(shown))).collect(),
            Some(_) => picked.iter().map(|p| (label(p), of[0].1(p))).collect(),
        };
        cdf(id, title, lines)
    };
    let (ttft, tpot): (Times, Times) = (|p| &p.latencies.ttft, |p| &p.latencies.tpot);
    let (itl, e2el): (Times, Times) = (|p| &p.latencies.itl, |p| &p.latencies.e2el);
    let per_token = match report.sweep {
        Some(_) => "Time per output token",
        None => "Time per output token, gaps between tokens",
    };
    vec![
        plot("ttft", "Time to the first token", &[("ttft", ttft)]),
        plot("tpot", per_token, &[("tpot", tpot), ("itl", itl)]),
        plot("e2el", "End to end", &[("e2el", e2el)]),
    ]
}

/// Shares of sorted values up to a time.
fn cdf(id: &'static str, title: &str, lines: Vec<(String, &[f64])>) -> Plot {
    let last = |values: &[f64]| values.last().copied().unwrap_or(0.0);
    let p99 = |values: &[f64]| percentile(values, 0.99);
    let most = lines.iter().map(|(_, values)| last(values)).fold(0.0, f64::max);
    // One straggler must not press all the rest against the axis.
    let cut = (1.5 * lines.iter().map(|(_, values)| p99(values)).fold(0.0, f64::max)).min(most);
    let curve = |values: &[f64]| {
        let n = values.len();
        let mut points = vec![(0.0, 0.0)];
        points.extend(values.first().map(|first| (*first, 0.0)));
        let picks = (0..n.min(CURVE)).map(|i| if n <= CURVE { i } else { i * (n - 1) / (CURVE - 1) });
        let shares = picks.map(|i| (values[i], 100.0 * (i + 1) as f64 / n as f64));
        points.extend(shares.take_while(|(x, _)| *x <= cut));
        let end = points.last().map(|(_, share)| (cut, *share)).filter(|_| n > 0);
        points.extend(end);
        points
    };
    let note = if most > cut * 1.001 {
        format!("Share of requests that took no longer. The slowest took {} ms, beyond the edge.", number(most))
    } else {
        "Share of requests that took no longer.".to_owned()
    };
    let note = if lines.iter().any(|(name, _)| name == "itl") {
        note.replace("Share of requests", "Share of requests (tokens, for itl)")
    } else {
        note
    };
    let series =
        lines.iter().enumerate().map(|(i, (name, values))| series(name, i, curve(values), Mark::Line)).collect();
    let y = Axis { label: "share (%)".into(), low: 0.0, high: 102.0, scale: Scale::Linear };
    // By medians: a linear axis serves one run well, whatever its tail.
    let least = |share| lines.iter().map(|(_, values)| percentile(values, share)).fold(f64::INFINITY, f64::min);
    let mut x = Axis::between("ms", least(0.5), cut);
    if x.scale == Scale::Log {
        x.low = least(0.01).max(1e-3).log10().floor();
    }
    Plot { id, title: title.to_owned(), note, chart: Chart { x, y, series } }
}

/// What the server did while the run went on.
fn timeline(shown: &Point) -> Vec<Plot> {
    let of = |value: &dyn Fn(&crate::bench::Sample) -> f64| -> Vec<(f64, f64)> {
        shown.timeline.iter().map(|s| (s.at.as_secs_f64(), value(s))).collect()
    };
    let end = shown.timeline.last().map_or(0.0, |s| s.at.as_secs_f64());
    let x = || Axis { high: if end > 0.0 { end } else { 1.0 }, ..Axis::to("seconds since the first request", end) };
    let batch = vec![
        series("waiting", 1, of(&|s| f64::from(s.waiting)), Mark::Line),
        series("running", 0, of(&|s| f64::from(s.running)), Mark::Line),
        series("adapters in the batch", 2, of(&|s| f64::from(s.adapters)), Mark::Line),
    ];
    let pool = vec![series("KV pages in use", 0, of(&|s| 100.0 * s.kv_use), Mark::Line)];
    let most = highest(&pool);
    vec![
        Plot {
            id: "batch",
            title: "Composition of the batch".into(),
            note: "Sequences that run and wait, and how many different adapters the running ones have.".into(),
            chart: Chart { x: x(), y: Axis::to("sequences, adapters", highest(&batch)), series: batch },
        },
        Plot {
            id: "kv",
            title: "Use of the KV pool".into(),
            note: "Pages held by adapters' prefixes and by sequences; cached blocks count as free.".into(),
            chart: Chart { x: x(), y: Axis::to("of the pool (%)", most), series: pool },
        },
    ]
}

/// Each tenant's ttft, sorted.
fn tenants(shown: &Point) -> Plot {
    let mut times: Vec<(f64, f64, f64)> = shown.of_tenants.iter().filter_map(|t| t.ttft).collect();
    times.sort_by(|a, b| a.0.total_cmp(&b.0));
    let at = |i: usize| i as f64 + 1.0;
    let strokes = times.iter().enumerate().flat_map(|(i, (_, p50, p99))| [(at(i), *p50), (at(i), *p99)]).collect();
    let of = |value: fn(&(f64, f64, f64)) -> f64| times.iter().enumerate().map(|(i, t)| (at(i), value(t))).collect();
    let lines = vec![
        Series { colour: RGBColor(0xA9, 0xBF, 0xD8), ..series("median to p99", 0, strokes, Mark::Strokes) },
        series("median", 0, of(|t| t.1), Mark::Dots),
        series("mean", 1, of(|t| t.0), Mark::Dots),
    ];
    let n = times.len() as f64;
    let x = Axis { label: "tenant, by mean ttft".into(), low: 0.5, high: n.max(1.0) + 0.5, scale: Scale::Linear };
    Plot {
        id: "tenants",
        title: "Latency of each tenant".into(),
        note: format!("ttft of the {n} tenants that sent something, from the fastest to the slowest."),
        chart: Chart { x, y: Axis::to("ttft (ms)", highest(&lines)), series: lines },
    }
}
