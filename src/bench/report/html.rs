//! The report as one page: no script, nothing to fetch.
use super::chart::{GRID, INK, Mark};
use super::plots::{self, Plot};
use super::{Report, figures, latencies, number, sweep_rows, tally};
use crate::bench::{Point, TenantFigures};
use crate::error::Result;
use plotters::style::RGBColor;
use std::fmt::Write;

/// Tenants in the table, at most: the slowest.
const TENANTS: usize = 50;

impl Report {
    /// The page.
    ///
    /// # Errors
    /// `Internal` when a chart cannot be drawn.
    pub fn html(&self) -> Result<String> {
        let mut body = self.header();
        if self.sweep.is_some() && !self.points.is_empty() {
            let (names, rows) = sweep_rows(self);
            body += &section("Sweep", &(table(&names, &rows) + "<p class=\"note\">Times in milliseconds.</p>"));
        }
        if let Some(point) = self.shown() {
            let title = match point.swept {
                Some(swept) => format!("In detail: at {}", number(swept)),
                None => "Figures".to_owned(),
            };
            body += &section(&title, &detail(point));
        }
        let plots = plots::all(self).iter().map(figure).collect::<Result<String>>()?;
        body += &format!("<section class=\"plots\">\n{plots}</section>\n");
        if let Some(point) = self.shown() {
            body += &slowest(point);
        }
        Ok(format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n\
             <title>prefixd bench: {}</title>\n<style>{}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
            escape(&self.model.name),
            style(),
        ))
    }

    fn header(&self) -> String {
        let (m, l) = (&self.model, &self.limits);
        let millions = m.num_parameters as f64 / 1e6;
        let load = match &self.sweep {
            Some(super::Sweep::Rate { .. }) => format!("sweep {}, cv {}", self.sweep_text(), self.load.cv()),
            Some(_) => format!("{}; sweep {}", self.load.describe(), self.sweep_text()),
            None => self.load.describe(),
        };
        let mut rows = vec![
            ("model", format!("{} · {} · {millions:.1} M parameters · {} · {}", m.name, m.family, m.dtype, m.device)),
            ("server", format!("prefixd {} · {}", self.version, self.setup.server)),
            (
                "limits",
                format!(
                    "{} sequences and {} rows a step · {} KV tokens · {} tokens a sequence",
                    l.max_sequences, l.max_batch_tokens, l.kv_tokens, l.max_model_len
                ),
            ),
            ("machine", self.setup.host.clone()),
            ("requests", format!("{} · popularity {}", self.requests, self.popularity)),
            ("load", load),
        ];
        if !self.goodput.is_empty() {
            rows.push(("goodput", format!("{} (ms)", self.goodput)));
        }
        rows.push(("seed", self.seed.to_string()));
        let facts: String =
            rows.iter().map(|(name, value)| format!("<dt>{name}</dt><dd>{}</dd>\n", escape(value))).collect();
        let mut lead = self.verdict().into_iter().collect::<Vec<_>>();
        if self.sweep.is_none() {
            lead.extend(self.shown().map(tally));
        }
        if self.interrupted {
            lead.push("Ended early: this is what there is.".to_owned());
        }
        let lead: String = lead.iter().map(|line| format!("<p class=\"lead\">{}</p>\n", escape(line))).collect();
        format!(
            "<header>\n<h1>prefixd bench</h1>\n<p class=\"note\">{}</p>\n{lead}{}<dl>\n{facts}</dl>\n\
             <pre>{}</pre>\n</header>\n",
            escape(&self.date),
            self.shown().filter(|_| self.sweep.is_none()).map(tiles).unwrap_or_default(),
            escape(&self.setup.command),
        )
    }

    fn sweep_text(&self) -> String {
        self.sweep.as_ref().map(ToString::to_string).unwrap_or_default()
    }
}

/// What one looks for first.
fn tiles(point: &Point) -> String {
    let m = &point.metrics;
    let tile = |value: String, unit: &str, name: &str| {
        format!("<div><b>{value}</b> <span>{unit}</span><small>{name}</small></div>\n")
    };
    let tiles = [
        tile(number(m.output_throughput), "tokens/s", "output_throughput"),
        tile(number(m.request_throughput), "requests/s", "request_throughput"),
        tile(number(m.ttft.median), "ms", "ttft, median"),
        tile(number(m.ttft.p99), "ms", "ttft, p99"),
        tile(number(m.tpot.median), "ms", "tpot, median"),
        tile(format!("{:.3}", point.fairness.jain), "", "fairness (Jain)"),
    ];
    format!("<div class=\"tiles\">\n{}</div>\n", tiles.concat())
}

fn detail(point: &Point) -> String {
    let times: Vec<Vec<String>> = latencies(point)
        .iter()
        .map(|(name, meaning, s)| {
            let values = [s.mean, s.median, s.p90, s.p99, s.max].map(number);
            std::iter::once(format!("{name}, ms: {meaning}")).chain(values).collect()
        })
        .collect();
    let figures: Vec<Vec<String>> = figures(point).into_iter().map(|(name, value)| vec![name.into(), value]).collect();
    // Of a single run it stands in the header.
    let tally = point.swept.map(|_| format!("<p>{}.</p>\n", escape(&tally(point)))).unwrap_or_default();
    format!(
        "{tally}<div class=\"pair\">{}{}</div>\n",
        table(&["", "mean", "median", "p90", "p99", "max"], &times),
        table(&["", ""], &figures).replace("<table>", "<table class=\"text\">"),
    )
}

fn slowest(point: &Point) -> String {
    let mut tenants: Vec<&TenantFigures> = point.of_tenants.iter().collect();
    let mean = |t: &TenantFigures| t.ttft.map_or(f64::INFINITY, |(mean, ..)| mean);
    tenants.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
    let or_dash = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
    let row = |t: &&TenantFigures| {
        vec![
            t.name.clone(),
            t.sent.to_string(),
            t.completed.to_string(),
            t.output_tokens.to_string(),
            or_dash(t.ttft.map(|(mean, ..)| mean)),
            or_dash(t.ttft.map(|(.., p99)| p99)),
            or_dash(t.e2el),
            number(t.service),
        ]
    };
    let rows: Vec<_> = tenants.iter().take(TENANTS).map(row).collect();
    let names = ["adapter", "sent", "done", "tokens", "ttft mean", "ttft p99", "e2el mean", "tokens/s of demand"];
    let shown = if tenants.len() > TENANTS {
        format!("the {TENANTS} slowest of {}", tenants.len())
    } else {
        format!("all {}", tenants.len())
    };
    format!(
        "<details>\n<summary>Tenants: {shown}</summary>\n{}<p class=\"note\">Times in milliseconds. Tokens/s of demand: \
         output tokens for each second that one of the tenant's requests was open; Jain's index is over these.</p>\n\
         </details>\n",
        table(&names, &rows)
    )
}

fn section(title: &str, content: &str) -> String {
    format!("<section>\n<h2>{}</h2>\n{content}</section>\n", escape(title))
}

/// A table that scrolls by itself where the page is narrow.
fn table(names: &[&str], rows: &[Vec<String>]) -> String {
    let mut out = String::from("<div class=\"scroll\"><table>\n");
    if names.iter().any(|name| !name.is_empty()) {
        let cells: String = names.iter().map(|name| format!("<th>{}</th>", escape(name))).collect();
        out += &format!("<thead><tr>{cells}</tr></thead>\n");
    }
    for row in rows {
        let cells: String = row.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
        // Writing to a String cannot fail.
        let _ = writeln!(out, "<tr>{cells}</tr>");
    }
    out + "</table></div>\n"
}

fn figure(plot: &Plot) -> Result<String> {
    let key = |series: &super::chart::Series| {
        let (class, colour) = match series.mark {
            Mark::Reference => ("dash", INK),
            Mark::Dots => ("dot", series.colour),
            _ => ("bar", series.colour),
        };
        format!("<li><i class=\"{class}\" style=\"--c:{}\"></i>{}</li>", hex(colour), escape(&series.name))
    };
    let keys: String = plot.chart.series.iter().map(key).collect();
    let svg =
        plot.chart.svg()?.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{}\" ", escape(&plot.title)), 1);
    Ok(format!(
        "<figure id=\"plot-{}\">\n<figcaption><h3>{}</h3><ul>{keys}</ul></figcaption>\n{svg}\n<p class=\"note\">{}</p>\n</figure>\n",
        plot.id,
        escape(&plot.title),
        escape(&plot.note),
    ))
}

fn hex(colour: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", colour.0, colour.1, colour.2)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Axes and grid of the charts take the theme's colours: a rule beats the attribute that it names.
fn style() -> String {
    STYLE.replace("INK", &hex(INK)).replace("GRID", &hex(GRID))
}

const STYLE: &str = include_str!("page.css");

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::bench::point::tests::{plan, point};
    use crate::bench::record::tests::record;
    use crate::bench::{Setup, Sweep};
    use crate::rpc::proto::{GetServerInfoResponse, ModelInfo};

    /// The page of a run, or of a sweep, where all that has a name has that one.
    fn page(name: &str, sweep: Option<Sweep>) -> String {
        let mut plan = plan(name, sweep);
        plan.setup = Setup { command: name.into(), server: name.into(), host: name.into() };
        let model = ModelInfo {
            name: name.into(),
            family: name.into(),
            dtype: name.into(),
            device: name.into(),
            ..ModelInfo::default()
        };
        let facts = GetServerInfoResponse { version: name.into(), model: Some(model), ..Default::default() };
        let rates = if plan.sweep.is_some() { vec![Some(2.0), Some(4.0)] } else { vec![None] };
        let records: Vec<_> = (0..9).map(|i| record(0, 10 * i, 50 + i, &[10, 30])).collect();
        let points = rates.into_iter().map(|rate| point(&plan, rate, records.clone())).collect();
        let report = Report { date: "today".into(), ..Report::new(&plan, facts, points, false) };
        report.html().unwrap()
    }

    #[test]
    fn hostile_names_are_text_wherever_they_stand() {
        let hostile = "\"'><script>alert('&amp;')</script><img src=x onerror=y>--></style>{}";
        for sweep in [None, Some(Sweep::Rate { from: 2.0, to: None })] {
            let (plain, named) = (page("harmless", sweep.clone()), page(hostile, sweep));
            // Title, model, family, dtype, device, version, server, machine, command and tenant.
            assert_eq!(plain.matches("harmless").count(), 10);
            assert!(plain.replace("harmless", &escape(hostile)) == named, "{named}");
            for markup in ["<script", "</script", "<img", "--><"] {
                assert!(!named.contains(markup), "{markup} in {named}");
            }
        }
    }

    #[test]
    fn names_cannot_become_markup() {
        let rows = [vec!["<script>\"&".to_owned()]];
        assert!(table(&["a"], &rows).contains("<td>&lt;script&gt;&quot;&amp;</td>"));
    }
}
