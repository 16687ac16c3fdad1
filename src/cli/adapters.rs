//! `prefixd adapters list|get|load|upload|unload|convert`.
mod convert;

use super::client::Connection;
use super::{Failure, Terminal, json};
use crate::rpc::proto;
use crate::rpc::upload::parts;
use clap::{Args, Subcommand};
use comfy_table::{ContentArrangement, Table, presets};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Files that an upload may hold.
const FILES: [&str; 5] =
    ["adapter_config.json", "adapter_model.safetensors", "task.toml", "README.md", "examples.jsonl"];

/// List, load, upload, unload and convert adapters.
#[derive(Debug, Subcommand)]
pub(super) enum Adapters {
    /// All adapters that the server knows.
    List {
        #[command(flatten)]
        connection: Connection,
    },
    /// One adapter.
    Get {
        /// Its id.
        id: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Load from the server's store, or load again.
    Load {
        /// Its id.
        id: String,
        /// Keep its pages in the KV pool for good.
        #[arg(long)]
        pinned: bool,
        #[command(flatten)]
        connection: Connection,
    },
    /// Upload a folder and put it in service.
    Upload(Upload),
    /// Take out of service; requests that run on it finish.
    Unload {
        /// Its id.
        id: String,
        /// Only if this generation serves.
        #[arg(long)]
        generation: Option<u64>,
        /// Also remove it from the server's store.
        #[arg(long)]
        delete: bool,
        #[command(flatten)]
        connection: Connection,
    },
    /// Make a folder as PEFT writes it of another layout; no server is asked.
    ///
    /// Reads a PEFT folder (also one with adapter_model.bin), a prefix encoder's checkpoint (ChatGLM, P-tuning v2:
    /// prefix_encoder.embedding.weight, with or without its projection) and the decoder.pt of TGIS and caikit.
    /// .bin, .pt and .pth files are pickles: they are parsed without running what they ask to run. The server itself
    /// never reads them. What cannot be placed is refused by name.
    Convert(convert::Convert),
}

/// Upload a folder and put it in service.
#[derive(Debug, Args)]
pub(super) struct Upload {
    /// A folder as PEFT saves it, or one with a task.toml.
    dir: PathBuf,
    /// The id to publish it under; the folder's name, if not given.
    #[arg(long)]
    id: Option<String>,
    /// Replace an adapter of that id.
    #[arg(long)]
    replace: bool,
    /// Keep its pages in the KV pool for good.
    #[arg(long)]
    pinned: bool,
    #[command(flatten)]
    connection: Connection,
}

impl Adapters {
    pub async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        match self {
            Adapters::List { connection } => list(&connection, terminal).await,
            Adapters::Get { id, connection } => {
                let request = connection.request(proto::GetAdapterRequest { adapter_id: id })?;
                let response = connection.adapters().await?.get_adapter(request).await?.into_inner();
                show(response.adapter, terminal)
            }
            Adapters::Load { id, pinned, connection } => {
                let request = connection.request(proto::LoadAdapterRequest { adapter_id: id, pinned })?;
                let response = connection.adapters().await?.load_adapter(request).await?.into_inner();
                show(response.adapter, terminal)
            }
            Adapters::Upload(upload) => upload.run(terminal).await,
            Adapters::Convert(convert) => convert.run(terminal),
            Adapters::Unload { id, generation, delete, connection } => {
                let message = proto::UnloadAdapterRequest { adapter_id: id, generation, delete };
                let request = connection.request(message)?;
                let response = connection.adapters().await?.unload_adapter(request).await?.into_inner();
                show(response.adapter, terminal)
            }
        }
    }
}

impl Upload {
    async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let name = self.dir.canonicalize().ok().and_then(|d| Some(d.file_name()?.to_str()?.to_owned()));
        let adapter_id = match self.id.or(name) {
            Some(id) => id,
            None => return Err(Failure::usage(format!("{}: no such folder", self.dir.display()))),
        };
        let files = read_folder(&self.dir)?;
        let header = proto::UploadHeader { adapter_id, replace: self.replace, pinned: self.pinned };
        let request = self.connection.request(tokio_stream::iter(parts(header, files)))?;
        let response = self.connection.adapters().await?.upload_adapter(request).await?.into_inner();
        show(response.adapter, terminal)
    }
}

/// What an adapter folder holds; other files stay at home.
fn read_folder(dir: &Path) -> Result<Vec<(String, Vec<u8>)>, Failure> {
    let mut files = Vec::new();
    for name in FILES {
        let path = dir.join(name);
        match std::fs::read(&path) {
            Ok(data) => files.push((name.to_owned(), data)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Failure::usage(format!("{}: {e}", path.display()))),
        }
    }
    if files.is_empty() {
        return Err(Failure::usage(format!("{}: holds none of {}", dir.display(), FILES.join(", "))));
    }
    Ok(files)
}

async fn list(connection: &Connection, terminal: &Terminal) -> Result<(), Failure> {
    let mut client = connection.adapters().await?;
    let (mut adapters, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = connection.request(proto::ListAdaptersRequest { page_size: 1000, page_token })?;
        let page = client.list_adapters(request).await?.into_inner();
        adapters.extend(page.adapters);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    terminal.json(&json!({ "adapters": adapters.iter().map(json::adapter).collect::<Vec<_>>() }));
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_width(terminal.width().try_into().unwrap_or(u16::MAX));
    table.set_header(["ID", "STATE", "GEN", "METHOD", "PREFIX", "IN POOL", "DESCRIPTION"]);
    for a in &adapters {
        let pool = match (a.resident, a.pinned) {
            (true, true) => "pinned",
            (true, false) => "yes",
            (false, _) => "no",
        };
        let about = if a.error.is_empty() { &a.description } else { &a.error };
        let method = a.method.to_ascii_lowercase();
        table.add_row([
            &a.adapter_id,
            json::state(a),
            &a.generation.to_string(),
            &method,
            &a.prefix_tokens.to_string(),
            pool,
            about,
        ]);
    }
    terminal.line(table.trim_fmt());
    Ok(())
}

fn show(adapter: Option<proto::Adapter>, terminal: &Terminal) -> Result<(), Failure> {
    let adapter = adapter.ok_or_else(|| Failure::local("the server's answer holds no adapter"))?;
    terminal.json(&json::adapter(&adapter));
    terminal.line(format!("{} {} generation {}", adapter.adapter_id, json::state(&adapter), adapter.generation));
    if !adapter.method.is_empty() {
        let (method, virtual_tokens) = (adapter.method.to_ascii_lowercase(), adapter.num_virtual_tokens);
        let (prefix, resident) = (adapter.prefix_tokens, if adapter.resident { "in" } else { "not in" });
        terminal
            .line(format!("  {method}, {virtual_tokens} virtual tokens, prefix of {prefix}, {resident} the KV pool"));
    }
    for (name, text) in [("", &adapter.description), ("error: ", &adapter.error), ("digest ", &adapter.digest)] {
        if !text.is_empty() {
            terminal.line(format!("  {name}{text}"));
        }
    }
    if !adapter.labels.is_empty() {
        terminal.line(format!("  labels {}", adapter.labels.join(", ")));
    }
    Ok(())
}
