//! `prefixd eval`.
use super::dataset;
use crate::cli::client::Connection;
use crate::cli::{Failure, Terminal};
use crate::rpc::proto;
use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json as object};

/// Answers that are shown.
const SHOWN: usize = 5;

/// Run a dataset through an adapter and through the bare base, and compare the answers with the targets.
#[derive(Debug, Args)]
pub(in crate::cli) struct Eval {
    /// JSON lines with `input` and `target` (or `targets`): a file, or the name of a dataset that the server has.
    data: String,
    /// The adapter; none: the bare base alone.
    #[arg(long, value_name = "ID")]
    adapter: Option<String>,
    /// Which task of a multitask adapter, counted from 0.
    #[arg(long, requires = "adapter", value_name = "N")]
    task: Option<u32>,
    /// Only the first so many examples.
    #[arg(long, value_name = "N")]
    limit: Option<u32>,
    /// Do not run the bare base beside it.
    #[arg(long)]
    skip_base: bool,
    /// Have it write also where it has labels to choose from.
    #[arg(long)]
    generate: bool,
    /// What the model writes, around `{{ target }}`, where its likelihood is measured.
    #[arg(long, value_name = "TEXT")]
    target_template: Option<String>,
    #[command(flatten)]
    connection: Connection,
}

impl Eval {
    pub async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let mut client = self.connection.training().await?;
        let adapter_id = self.adapter.unwrap_or_default();
        let name = if adapter_id.is_empty() { "base.eval".to_owned() } else { format!("{adapter_id}.eval") };
        let message = proto::EvaluateRequest {
            data: Some(dataset(&mut client, &self.data, &name).await?),
            adapter_id: adapter_id.clone(),
            task_id: self.task,
            max_examples: self.limit.unwrap_or(0),
            skip_base: self.skip_base,
            generate: self.generate,
            target_template: self.target_template.map(|t| unescaped(&t)),
        };
        let bar = terminal.bar();
        bar.set_length(0);
        bar.set_message("evaluating");
        let measured = client.evaluate(self.connection.request(message)?).await;
        bar.finish_and_clear();
        let measured = measured?.into_inner();
        terminal.json(&json(&measured));
        let side = if adapter_id.is_empty() { "bare base" } else { &adapter_id };
        terminal.line(format!("{} examples{}", measured.examples, left_out(&measured)));
        terminal.line(table(&measured, side).to_string());
        for answer in measured.answers.iter().take(SHOWN) {
            let mark = if answer.prediction.trim() == answer.target.trim() {
                terminal.good("✓")
            } else {
                terminal.bad("✗")
            };
            let target = if answer.prediction.trim() == answer.target.trim() {
                String::new()
            } else {
                terminal.dim(&format!("  (target: {})", answer.target.trim()))
            };
            terminal.line(format!("  {mark} {}{target}", answer.prediction.trim()));
        }
        Ok(())
    }
}

fn table(measured: &proto::EvaluateResponse, side: &str) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let base = measured.base_scores.as_ref();
    let mut header = vec![String::new(), side.to_owned()];
    header.extend(base.map(|_| "bare base".to_owned()));
    table.set_header(header);
    let scores = measured.scores.unwrap_or_default();
    for (name, value) in figures(&scores) {
        let mut row = vec![name.to_owned(), value.clone()];
        if let Some(base) = base {
            let other = figures(base).into_iter().find(|(other, _)| *other == name).map(|(_, v)| v);
            row.push(other.unwrap_or_default());
        }
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn figures(s: &proto::EvaluationScores) -> Vec<(&'static str, String)> {
    let percent = |v: f64| format!("{:.1} %", 100.0 * v);
    let plain = |v: f64| format!("{v:.2}");
    let name = if s.macro_f1.is_some() { "accuracy" } else { "exact match" };
    let mut all = vec![(name, percent(s.exact_match))];
    all.extend(s.macro_f1.map(|v| ("macro F1", percent(v))));
    all.extend(s.bleu.map(|v| ("BLEU", plain(v))));
    all.extend(s.rouge1.map(|v| ("ROUGE-1", percent(v))));
    all.extend(s.rouge2.map(|v| ("ROUGE-2", percent(v))));
    all.extend(s.rouge_l.map(|v| ("ROUGE-L", percent(v))));
    all.extend(s.perplexity.map(|v| ("perplexity", plain(v))));
    all
}

/// One line on what the adapter changed.
pub(super) fn change(measured: &proto::EvaluateResponse, adapter: &str, on: &str) -> String {
    let scores = measured.scores.unwrap_or_default();
    let what = if scores.macro_f1.is_some() { "accuracy" } else { "exact match" };
    let (n, right) = (measured.examples, 100.0 * scores.exact_match);
    let base = match &measured.base_scores {
        Some(base) => format!("bare base {:.1} % -> ", 100.0 * base.exact_match),
        None => String::new(),
    };
    format!("  {what} on {n} {on} examples: {base}{adapter} {right:.1} %{}", left_out(measured))
}

fn left_out(measured: &proto::EvaluateResponse) -> String {
    match measured.too_long {
        0 => String::new(),
        n => format!(" ({n} more do not fit into the context)"),
    }
}

/// A template from the command line, where a line's end is written `\n`.
pub(super) fn unescaped(template: &str) -> String {
    template.replace("\\n", "\n")
}

pub(super) fn json(r: &proto::EvaluateResponse) -> Value {
    let scores = |s: &proto::EvaluationScores| {
        object!({ "exact_match": s.exact_match, "macro_f1": s.macro_f1, "bleu": s.bleu, "rouge1": s.rouge1,
            "rouge2": s.rouge2, "rouge_l": s.rouge_l, "perplexity": s.perplexity })
    };
    let answer = |a: &proto::EvaluatedExample| object!({ "index": a.index, "prediction": a.prediction, "base_prediction": a.base_prediction, "target": a.target });
    object!({
        "request_id": r.request_id,
        "examples": r.examples,
        "too_long": r.too_long,
        "scores": r.scores.as_ref().map(scores),
        "base_scores": r.base_scores.as_ref().map(scores),
        "answers": r.answers.iter().map(answer).collect::<Vec<_>>(),
    })
}
