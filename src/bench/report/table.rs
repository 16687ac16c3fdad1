//! The report for people in a terminal.
use super::{Report, figures, latencies, number, sweep_rows, tally};
use crate::bench::Point;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

impl Report {
    /// Tables of at most `width` columns.
    pub fn text(&self, width: usize) -> String {
        let mut out = Vec::new();
        if self.sweep.is_some() && !self.points.is_empty() {
            out.push(self.sweep_table(width));
            out.extend(self.verdict());
        }
        match self.shown() {
            None => out.push("stopped before the first request".to_owned()),
            Some(point) => {
                if let (Some(_), Some(swept)) = (&self.sweep, point.swept) {
                    out.push(format!("\nIn detail, at {}", number(swept)));
                }
                out.push(tally(point));
                out.push(detail(point, width));
            }
        }
        if self.interrupted {
            out.push("Ended early: this is what there is.".to_owned());
        }
        out.join("\n")
    }

    fn sweep_table(&self, width: usize) -> String {
        let (names, rows) = sweep_rows(self);
        let mut table = plain(width);
        table.set_header(names);
        rows.into_iter().for_each(|row| {
            table.add_row(row);
        });
        // Figures do not wrap: a narrow terminal shows a long line rather than half a number.
        table.set_content_arrangement(ContentArrangement::Disabled);
        table.column_iter_mut().for_each(|column| {
            column.set_padding((0, 1)).set_cell_alignment(CellAlignment::Right);
        });
        format!("{}\ntimes in ms", table.trim_fmt())
    }
}

fn detail(point: &Point, width: usize) -> String {
    let mut times = plain(width);
    times.set_header(["ms", "mean", "median", "p90", "p99", "max", ""]);
    for (name, meaning, s) in latencies(point) {
        let [mean, median, p90, p99, max] = [s.mean, s.median, s.p90, s.p99, s.max].map(number);
        times.add_row([name, &mean, &median, &p90, &p99, &max, meaning]);
    }
    for column in times.column_iter_mut().skip(1).take(5) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut rest = plain(width);
    figures(point).into_iter().for_each(|(name, value)| {
        rest.add_row([name.to_owned(), value]);
    });
    format!("{}\n{}", times.trim_fmt(), rest.trim_fmt())
}

fn plain(width: usize) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_width(width.try_into().unwrap_or(u16::MAX));
    // Rows stand close: rules between them would double the height.
    table.remove_style(comfy_table::TableComponent::HorizontalLines);
    table.remove_style(comfy_table::TableComponent::MiddleIntersections);
    table.remove_style(comfy_table::TableComponent::LeftBorderIntersections);
    table.remove_style(comfy_table::TableComponent::RightBorderIntersections);
    table
}
