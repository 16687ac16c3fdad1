//! A bench while it runs.
use crate::bench::Progress;
use crate::cli::Terminal;
use indicatif::{ProgressBar, ProgressStyle};

/// Shows how far it has got: a bar on a terminal, a line a run elsewhere.
pub(super) struct Shown<'a> {
    terminal: &'a Terminal,
    pub bar: ProgressBar,
}

impl<'a> Shown<'a> {
    pub fn new(terminal: &'a Terminal) -> Self {
        let bar = terminal.bar();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix}{msg} {wide_bar} {pos}/{len}") {
            bar.set_style(style);
        }
        Shown { terminal, bar }
    }

    pub fn step(&mut self, progress: &Progress) {
        match progress {
            Progress::Adapters { done, total } => {
                self.at(*done as u64, Some(*total as u64), "uploading adapters".into())
            }
            Progress::Point(name) => self.bar.set_prefix(format!("{name}: ")),
            Progress::WarmUp { done, total } => self.at(*done, Some(*total), "warming up".into()),
            Progress::Running { done, total, failed, tokens, elapsed } => {
                let seconds = elapsed.as_secs_f64().max(1e-3);
                let failures = if *failed > 0 { format!(", {failed} failed") } else { String::new() };
                let message = format!("{:.0} tokens/s, {seconds:.0} s{failures}", *tokens as f64 / seconds);
                self.at(*done, *total, message);
            }
            Progress::Measured(point) => {
                let m = &point.metrics;
                let good = m.good_share.map(|share| format!(", {:.0} % within limits", share * 100.0));
                let line = format!(
                    "  {:<8} {:.1} requests/s, {:.0} tokens/s, ttft median {:.1} ms{}, {} failed",
                    point
                        .swept
                        .map(|x| format!("{x:.4}").trim_end_matches('0').trim_end_matches('.').to_owned())
                        .unwrap_or_default(),
                    m.request_throughput,
                    m.output_throughput,
                    m.ttft.median,
                    good.unwrap_or_default(),
                    m.failures(),
                );
                self.bar.suspend(|| self.terminal.note(line));
            }
            Progress::Removing => self.at(0, Some(1), "removing adapters".into()),
        }
    }

    fn at(&self, done: u64, total: Option<u64>, message: String) {
        self.bar.set_length(total.unwrap_or(done));
        self.bar.set_position(done);
        self.bar.set_message(message);
    }
}
