//! `prefixd serve`.
use super::{Failure, Terminal, json};
use crate::config::{Config, Device, DtypeChoice, KvCacheDtype, Quantize};
use crate::error::Error;
use crate::server::{Progress, Server, terminated};
use clap::Args;
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::json;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use tokio::net::TcpListener;

/// Serve a model and its adapters over gRPC.
#[derive(Debug, Args)]
pub(super) struct Serve {
    /// A TOML file with settings; the command line wins over it.
    #[arg(long, value_name = "FILE", env = "PREFIXD_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// The settings that were given; the rest comes from the file, the environment and the defaults.
#[derive(Debug, Args, Serialize)]
struct Settings {
    /// Where gRPC listens [default: 127.0.0.1:50051]; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<SocketAddr>,
    /// Where Prometheus' /metrics listens [default: nowhere].
    #[arg(long, value_name = "ADDRESS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics_listen: Option<SocketAddr>,
    #[command(flatten)]
    #[serde(flatten)]
    hosted: Hosted,
    /// Follow changes in the adapter store's folder.
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    watch: bool,
    #[command(flatten)]
    training: Training,
    /// Seconds that running requests get to finish after SIGTERM [default: 30].
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    drain_seconds: Option<u64>,
}

/// What is served, and with which means: also for commands that start a server of their own.
#[derive(Debug, Args, Serialize)]
pub(super) struct Hosted {
    /// A Hugging Face folder, a GGUF file, a hub id, or `embedded` [default].
    #[arg(long, value_name = "DIR|FILE|HUB_ID")]
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    /// The adapter store: a folder of adapter folders [default: the shipped adapters].
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    adapters: Option<PathBuf>,
    /// auto, cpu or cuda:N.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<Device>,
    /// Type of the weights [default: the checkpoint's; bf16 for GGUF blocks].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    dtype: Option<DtypeChoice>,
    /// Round the weights to 8-bit integers [default: none]: half the memory of bf16, and faster.
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    quantize: Option<Quantize>,
    #[command(flatten)]
    engine: Engine,
}

#[derive(Debug, Args, Serialize)]
#[command(next_help_heading = "Training")]
struct Training {
    /// Of the time while requests run, so much may go to training [default: 0.3]; it takes everything when idle.
    #[arg(long = "training-share", value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    share: Option<f64>,
    /// Where training jobs are kept [default: .training in the adapter store].
    #[arg(long = "training-dir", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    dir: Option<PathBuf>,
    /// Folder of datasets, NAME.jsonl [default: datasets in the training folder].
    #[arg(long = "data", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<PathBuf>,
}

#[derive(Debug, Args, Serialize)]
#[command(next_help_heading = "Engine")]
struct Engine {
    /// Sequences in one batch.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_sequences: Option<usize>,
    /// Rows (prompt and decode tokens) in one step.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_batch_tokens: Option<usize>,
    /// Requests that may wait.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_queue: Option<usize>,
    /// Longest sequence, prefix included.
    #[arg(long, value_name = "TOKENS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_model_len: Option<usize>,
    /// Tokens that the KV pool holds.
    #[arg(long, value_name = "TOKENS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_tokens: Option<usize>,
    /// Memory of the KV pool, where --kv-tokens does not say.
    #[arg(long, value_name = "MIB")]
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_memory_mib: Option<usize>,
    /// Type that K and V are held in [default: auto, which is f32 on the CPU and the weights' on a GPU].
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_cache_dtype: Option<KvCacheDtype>,
    /// Of a GPU's memory, what weights, activations and the KV pool may take together [default: 0.9].
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_memory_utilization: Option<f64>,
    /// Launch a GPU's kernels one by one, without CUDA graphs.
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    enforce_eager: bool,
    /// CPU threads of the model; 0: one a core.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<usize>,
}

impl Serve {
    pub async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let config = read(self.config.as_deref(), &self.settings)?;
        // Before the model: a port that is taken is told at once.
        let listener = TcpListener::bind(config.listen).await;
        let listener = listener.map_err(|e| Failure::usage(format!("`listen` is {}: {e}", config.listen)))?;
        let address = listener.local_addr().map_err(|e| Failure::local(format!("listener: {e}")))?;

        let mut loading = Loading::new(terminal);
        let server = tokio::select! {
            server = Server::start(config, |step| loading.step(step)) => server?,
            // Nobody is served yet: nothing to drain.
            () = terminated() => return Ok(()),
        };
        loading.done();
        announce(&server, address, terminal);
        let shutdown = async {
            terminated().await;
            // Whoever asks twice does not want to wait.
            tokio::spawn(async {
                terminated().await;
                std::process::exit(130);
            });
        };
        Ok(server.serve(listener, shutdown).await?)
    }
}

impl Hosted {
    /// The settings of a server that a command starts for itself.
    pub fn config(&self) -> Result<Config, Failure> {
        read(None, self)
    }
}

/// File, environment and `given`, whole and checked.
fn read(file: Option<&Path>, given: &impl Serialize) -> Result<Config, Failure> {
    let mut given = serde_json::to_value(given).map_err(|e| Failure::local(e.to_string()))?;
    // An empty group must not hide one that the file fills.
    if let Some(settings) = given.as_object_mut() {
        settings.retain(|_, group| !group.as_object().is_some_and(serde_json::Map::is_empty));
    }
    Config::read(file, given).map_err(Failure::Usage)
}

/// Shows a start: a bar on a terminal, lines elsewhere.
pub(super) struct Loading<'a> {
    terminal: &'a Terminal,
    bar: ProgressBar,
}

impl<'a> Loading<'a> {
    pub fn new(terminal: &'a Terminal) -> Self {
        Loading { terminal, bar: terminal.bar() }
    }

    pub fn step(&mut self, step: Progress<'_>) {
        match step {
            Progress::Model(name) => self.say(format!("loading model {name}")),
            Progress::ModelReady(info) => {
                let millions = info.num_parameters as f64 / 1e6;
                self.say(format!("model {} ready: {}, {millions:.1} M parameters", info.name, info.family));
            }
            Progress::Adapter { id, done, total, error } => {
                self.bar.set_length(total as u64);
                self.bar.set_position(done as u64);
                self.bar.set_message(format!("adapter {id}"));
                match error {
                    Some(e) => self.warn(format!("adapter {id} failed: {e}")),
                    None if done == total => self.say(format!("{total} adapters done")),
                    None => {}
                }
            }
        }
    }

    pub fn done(self) {
        self.bar.finish_and_clear();
    }

    fn say(&self, text: String) {
        if self.terminal.shows_bars() {
            self.bar.set_message(text);
        } else {
            self.terminal.note(text);
        }
    }

    fn warn(&self, text: String) {
        self.bar.suspend(|| self.terminal.note(text));
    }
}

/// Where the server is, what it serves, and a call to paste.
fn announce(server: &Server, address: SocketAddr, terminal: &Terminal) {
    let (ready, failed) = (server.registry().list(), &server.loaded().failed);
    let ready: Vec<String> = ready.iter().filter(|s| s.serving.is_some()).map(|s| s.id.to_string()).collect();
    let refused =
        |(id, e): &(crate::adapter::AdapterId, Error)| json!({ "adapter_id": id.as_str(), "error": e.to_string() });
    let facts = server.facts();
    terminal.json(&json!({
        "address": address.to_string(),
        "server": json::facts(facts),
        "adapters": ready,
        "failed": failed.iter().map(refused).collect::<Vec<_>>(),
    }));

    let row = |name: &str, text: String| terminal.line(format!("  {} {text}", terminal.bold(&format!("{name:<9}"))));
    terminal.line(format!("prefixd {}", facts.version));
    row("address", address.to_string());
    if let Some(m) = &facts.model {
        let millions = m.num_parameters as f64 / 1e6;
        row(
            "model",
            format!(
                "{} · {} · {millions:.1} M parameters · {}, KV {} · {}",
                m.name, m.family, m.dtype, m.kv_cache_dtype, m.device
            ),
        );
    }
    if let Some(l) = &facts.limits {
        row(
            "limits",
            format!(
                "{} tokens a sequence · {} sequences a batch · {} in the queue · {} KV tokens",
                l.max_model_len, l.max_sequences, l.max_queue, l.kv_tokens
            ),
        );
    }
    let shown = 12.min(ready.len());
    let more = if ready.len() > shown { format!(" and {} more", ready.len() - shown) } else { String::new() };
    row(
        "adapters",
        match ready.len() {
            0 => "none".to_owned(),
            n => format!("{n}: {}{more}", ready[..shown].join(", ")),
        },
    );
    for (id, e) in failed {
        row("failed", format!("{id}: {e}"));
    }
    terminal.line("\ntry");
    let (adapter, prompt) = match ready.iter().find_map(|id| Some((id, example(server, id)?))) {
        Some((id, prompt)) => (Some(id.as_str()), prompt),
        None => (ready.first().map(String::as_str), "Once upon a time".to_owned()),
    };
    calls(address, adapter, &prompt).iter().for_each(|call| terminal.line(format!("  {call}")));
    terminal.line("");
}

/// The same call twice: with our own client, and with grpcurl.
pub(super) fn calls(address: SocketAddr, adapter: Option<&str>, prompt: &str) -> [String; 2] {
    let quoted = format!("'{}'", prompt.replace('\'', "'\\''"));
    let server = match address.to_string() {
        usual if usual == "127.0.0.1:50051" => String::new(),
        other => format!(" --server http://{other}"),
    };
    let flag = adapter.map(|id| format!(" --adapter {id}")).unwrap_or_default();
    let message = match adapter {
        Some(id) => json!({ "adapter_id": id, "prompt": prompt }),
        None => json!({ "prompt": prompt }),
    };
    let message = message.to_string().replace('\'', "'\\''");
    [
        format!("prefixd generate{server}{flag} {quoted}"),
        format!("grpcurl -plaintext -d '{message}' {address} prefixd.v1.InferenceService/Generate"),
    ]
}

/// The first example that lies beside an adapter.
fn example(server: &Server, id: &str) -> Option<String> {
    let id = crate::adapter::AdapterId::parse(id).ok()?;
    let text = std::fs::read_to_string(server.store().path(&id).join("examples.jsonl")).ok()?;
    let first: serde_json::Value = serde_json::from_str(text.lines().next()?).ok()?;
    Some(first["input"].as_str()?.to_owned())
}
