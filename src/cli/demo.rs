//! `prefixd demo`: the real server, driven through the real client.
//!
//! First one burst: requests of every shipped task and of the bare base, all at once, in shared batches. Then,
//! under a running load, an adapter comes, is replaced, and goes. At the end a new one is trained.
mod burst;
mod hot_load;
mod live;
mod load;

use super::client::connect;
use super::serve::Loading;
use super::{Failure, Terminal};
use crate::config::Config;
use crate::rpc::proto::{self, generate_request::Input};
use crate::server::{Server, adapter_folder};
use clap::Args;
use include_dir::{Dir, include_dir};
use serde_json::json;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// The adapter that comes and goes, in two generations.
static HOT_LOAD: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/models/demo/hot-load");

/// Data and card of the task that is trained.
static LIVE: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/models/demo/live");

/// The shipped tasks in the order of the table.
const TASKS: [&str; 8] = ["sentiment", "topic", "describe", "slots", "answer", "agenda", "formal", "booking"];

/// Longer than any answer here takes, even on one slow core: a demo must not hang.
const PATIENCE: Duration = Duration::from_secs(120);

/// Show it: a real server on a free port, many tasks in one batch, adapters in and out under load.
#[derive(Debug, Args)]
pub(super) struct Demo {
    /// Requests of each task in the burst.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=20))]
    requests: u8,
}

/// One input and what a right answer is.
#[derive(Clone, Debug)]
struct Example {
    /// None: the bare base, of which nobody expects a thing.
    adapter: Option<&'static str>,
    input: String,
    target: Option<String>,
}

impl Demo {
    pub async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let started = Instant::now();
        let mut loading = Loading::new(terminal);
        let server = Server::start(Config::default(), |step| loading.step(step)).await?;
        loading.done();
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await;
        let listener = listener.map_err(|e| Failure::local(format!("a free port: {e}")))?;
        let address = listener.local_addr().map_err(|e| Failure::local(format!("listener: {e}")))?;
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(server.serve(listener, async {
            // Told, or the demo is gone: both end the server.
            let _ = stopped.await;
        }));

        terminal.line(format!("One frozen base model serves on {address}.\n"));
        let shown = tokio::time::timeout(PATIENCE, self.show(address, terminal)).await;
        drop(stop);
        let drained = serving.await.map_err(|e| Failure::local(format!("server: {e}")))?;
        let report = shown.map_err(|_| Failure::local(format!("no end after {} s", PATIENCE.as_secs())))??;
        drained?;
        next_steps(started, terminal);
        terminal.json(&report);
        Ok(())
    }

    async fn show(&self, address: SocketAddr, terminal: &Terminal) -> Result<serde_json::Value, Failure> {
        let channel = connect(&address.to_string()).await?;
        let burst = burst::run(&channel, self.requests.into(), terminal).await?;
        let hot_load = hot_load::run(&channel, terminal).await?;
        let live = live::run(&channel, terminal).await?;
        Ok(json!({ "address": address.to_string(), "burst": burst, "hot_load": hot_load, "training": live }))
    }
}

/// The first `count` examples that lie beside a shipped adapter.
fn examples(adapter: &'static str, count: usize) -> Result<Vec<Example>, Failure> {
    let folder = adapter_folder(adapter).ok_or_else(|| Failure::local(format!("adapter {adapter} is not shipped")))?;
    let found = pairs(folder)?.into_iter().take(count);
    Ok(found.map(|(input, target)| Example { adapter: Some(adapter), input, target: Some(target) }).collect())
}

/// Inputs and targets of an adapter folder's `examples.jsonl`.
fn pairs(folder: &Dir<'_>) -> Result<Vec<(String, String)>, Failure> {
    let place = folder.path().join("examples.jsonl");
    let broken = || Failure::local(format!("embedded {} is missing or broken", place.display()));
    let text = folder.get_file(&place).and_then(|file| file.contents_utf8()).ok_or_else(broken)?;
    let pair = |line: &str| {
        let v: serde_json::Value = serde_json::from_str(line).ok()?;
        Some((v["input"].as_str()?.to_owned(), v["target"].as_str()?.to_owned()))
    };
    text.lines().filter(|line| !line.is_empty()).map(pair).collect::<Option<_>>().ok_or_else(broken)
}

impl Example {
    /// The request. The bare base gets a short limit: it does not know when to stop.
    fn request(&self) -> proto::GenerateRequest {
        let limit = proto::Stopping { max_new_tokens: Some(16), ..Default::default() };
        proto::GenerateRequest {
            adapter_id: self.adapter.unwrap_or_default().to_owned(),
            input: Some(Input::Prompt(self.input.clone())),
            stopping: self.adapter.is_none().then_some(limit),
            ..Default::default()
        }
    }

    /// Whether `answer` is the target, spaces around it aside. `None`: nobody expects a thing.
    fn is_right(&self, answer: &str) -> Option<bool> {
        self.target.as_ref().map(|target| target.trim() == answer.trim())
    }
}

/// `text` in one line of at most `width` characters.
fn shorten(text: &str, width: usize) -> String {
    let line = text.trim().replace(['\n', '\r', '\t'], " ");
    match line.char_indices().nth(width) {
        None => line,
        Some(_) => format!("{}…", line.chars().take(width.saturating_sub(1)).collect::<String>()),
    }
}

fn next_steps(started: Instant, terminal: &Terminal) {
    terminal.line(format!("\nAll of it in {:.1} s. What to try next:", started.elapsed().as_secs_f64()));
    let input = examples("sentiment", 1).ok().and_then(|e| e.into_iter().next()).map(|e| e.input);
    let input = input.unwrap_or_else(|| "the soup was lovely".to_owned());
    for (command, why) in [
        ("prefixd serve".to_owned(), "the same server, on 127.0.0.1:50051"),
        (format!("prefixd generate --stream --adapter sentiment '{input}'"), "ask a task"),
        ("prefixd train examples.jsonl --adapter my-task".to_owned(), "train a task: lines of {\"input\", \"target\"}"),
        ("prefixd adapters upload DIR --id my-task".to_owned(), "serve an adapter made with PEFT"),
    ] {
        terminal.line(format!("  {command}\n      {}", terminal.dim(why)));
    }
}
