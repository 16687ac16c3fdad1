//! One burst: every task at once.
use super::{Example, TASKS, examples, shorten};
use crate::cli::{Failure, Terminal};
use crate::rpc::proto::adapter_service_client::AdapterServiceClient;
use crate::rpc::proto::inference_service_client::InferenceServiceClient;
use crate::rpc::proto::{self, ListAdaptersRequest};
use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table, Width, presets};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::time::Instant;
use tonic::transport::Channel;

/// What all columns but input and output take at most, with a space and a border each: those two share the rest.
const OTHER_COLUMNS: usize = 13 + 15 + 7 + 8 + 7 + 9;

struct Answer {
    example: Example,
    response: proto::GenerateResponse,
}

/// Sends it, shows a line for each task, and returns the same as JSON.
pub(super) async fn run(channel: &Channel, requests: usize, terminal: &Terminal) -> Result<Value, Failure> {
    let methods = methods(channel).await?;
    let mut sent = Vec::new();
    for task in TASKS.into_iter().filter(|task| methods.contains_key(*task)) {
        sent.extend(examples(task, requests)?);
    }
    // The bare base gets the first task's inputs: what an adapter adds is the difference.
    let bare = examples(TASKS[0], requests)?;
    sent.extend(bare.into_iter().map(|e| Example { adapter: None, target: None, ..e }));

    let count = sent.len();
    let started = Instant::now();
    let calls = sent.into_iter().map(|example| {
        let mut client = InferenceServiceClient::new(channel.clone());
        tokio::spawn(async move {
            let response = client.generate(example.request()).await?.into_inner();
            Ok::<_, tonic::Status>(Answer { example, response })
        })
    });
    // All are on their way before the first is waited for.
    let calls: Vec<_> = calls.collect();
    let mut answers = Vec::with_capacity(count);
    for call in calls {
        answers.push(call.await.map_err(|e| Failure::local(format!("burst: {e}")))??);
    }
    let seconds = started.elapsed().as_secs_f64();

    let rows = rows(&answers, &methods);
    terminal.line(terminal.bold(&format!(
        "{count} requests of {} tasks and of the bare base at once: one batch, one model",
        rows.len().saturating_sub(1)
    )));
    terminal.line(table(&rows, terminal));
    let tokens: u32 = answers.iter().filter_map(|a| a.response.usage.as_ref()).map(|u| u.generated_tokens).sum();
    terminal.line(format!(
        "{tokens} tokens in {seconds:.2} s, {:.0} tokens/s over all. `right`: answers equal to the expected text; each row shows the\nfirst. \
         ttft and tok/s include the wait in the crowd.\n",
        f64::from(tokens) / seconds
    ));
    Ok(json!({ "requests": count, "seconds": seconds, "generated_tokens": tokens,
        "tasks": rows.iter().map(Row::to_json).collect::<Vec<_>>() }))
}

/// One task of the burst: its first request shown, all of them counted.
struct Row {
    task: &'static str,
    method: String,
    input: String,
    output: String,
    right: Option<(usize, usize)>,
    ttft_ms: f64,
    tokens_per_second: f64,
    sequences: u32,
    adapters: u32,
}

fn rows(answers: &[Answer], methods: &HashMap<String, String>) -> Vec<Row> {
    let of = |adapter: Option<&'static str>| -> Option<Row> {
        let mine: Vec<_> = answers.iter().filter(|a| a.example.adapter == adapter).collect();
        let first = mine.first()?;
        let timings = first.response.timings.as_ref()?;
        let tokens = first.response.usage.as_ref()?.generated_tokens;
        let verdicts: Vec<bool> = mine.iter().filter_map(|a| a.example.is_right(text(&a.response))).collect();
        Some(Row {
            task: adapter.unwrap_or("(bare base)"),
            method: adapter.and_then(|id| methods.get(id)).map_or("-", String::as_str).to_owned(),
            input: first.example.input.clone(),
            output: text(&first.response).trim().to_owned(),
            right: (!verdicts.is_empty()).then(|| (verdicts.iter().filter(|v| **v).count(), verdicts.len())),
            ttft_ms: timings.ttft_ms,
            tokens_per_second: f64::from(tokens) / (timings.e2el_ms / 1e3).max(1e-6),
            sequences: mine.iter().filter_map(|a| a.response.timings.as_ref()).map(|t| t.batch_max_sequences).max()?,
            adapters: mine.iter().filter_map(|a| a.response.timings.as_ref()).map(|t| t.batch_max_adapters).max()?,
        })
    };
    TASKS.into_iter().map(Some).chain([None]).filter_map(of).collect()
}

fn table(rows: &[Row], terminal: &Terminal) -> String {
    // Outputs are what one came to see: they get more room than inputs, which are cut to three lines.
    let free = terminal.width().saturating_sub(OTHER_COLUMNS).max(30);
    let (input, output) = (free * 2 / 5, free - free * 2 / 5 - 2);
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_width(terminal.width().try_into().unwrap_or(u16::MAX));
    table.set_header(["task", "method", "input", "output", "right", "ttft", "tok/s", "shared\na batch"]);
    for row in rows {
        table.add_row([
            row.task.to_owned(),
            row.method.clone(),
            shorten(&row.input, input * 3 - 10),
            shorten(&row.output, output * 4 - 10),
            row.right.map_or_else(|| "-".to_owned(), |(right, of)| format!("{right}/{of}")),
            format!("{:.0} ms", row.ttft_ms),
            format!("{:.0}", row.tokens_per_second),
            format!("{} seqs\n{} tasks", row.sequences, row.adapters),
        ]);
    }
    let fixed = |n: usize| ColumnConstraint::Absolute(Width::Fixed(n.try_into().unwrap_or(u16::MAX)));
    for (index, column) in table.column_iter_mut().enumerate() {
        let constraint = match index {
            2 => fixed(input),
            3 => fixed(output),
            _ => ColumnConstraint::ContentWidth,
        };
        column.set_constraint(constraint).set_padding((0, 1));
        if (4..=6).contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

impl Row {
    fn to_json(&self) -> Value {
        json!({
            "task": self.task,
            "method": self.method,
            "input": self.input,
            "output": self.output,
            "right": self.right.map(|(right, _)| right),
            "checked": self.right.map(|(_, of)| of),
            "ttft_ms": self.ttft_ms,
            "tokens_per_second": self.tokens_per_second,
            "batch_max_sequences": self.sequences,
            "batch_max_adapters": self.adapters,
        })
    }
}

pub(super) fn text(response: &proto::GenerateResponse) -> &str {
    response.choices.first().map_or("", |c| c.text.as_str())
}

/// The method of each adapter that serves.
async fn methods(channel: &Channel) -> Result<HashMap<String, String>, Failure> {
    let mut client = AdapterServiceClient::new(channel.clone());
    let page = client.list_adapters(ListAdaptersRequest { page_size: 1000, ..Default::default() }).await?;
    let ready = page.into_inner().adapters.into_iter().filter(|a| a.state() == proto::AdapterState::Ready);
    Ok(ready.map(|a| (a.adapter_id, a.method.to_ascii_lowercase().replace('_', " "))).collect())
}
