//! `prefixd info`, `prefixd stats` and `prefixd tokenize`.
use super::client::{Connection, Stack, prompt};
use super::{Failure, Terminal, json};
use crate::rpc::proto;
use clap::Args;
use serde_json::Value;

/// The model, the limits and the version of a server.
#[derive(Debug, Args)]
pub(super) struct Info {
    #[command(flatten)]
    connection: Connection,
}

/// What a server is doing now.
#[derive(Debug, Args)]
pub(super) struct Stats {
    #[command(flatten)]
    connection: Connection,
}

/// Show how a text is tokenised.
#[derive(Debug, Args)]
pub(super) struct Tokenize {
    /// The text; `-` reads stdin.
    prompt: String,
    #[command(flatten)]
    connection: Connection,
    /// Which task's template to apply.
    #[arg(long, value_name = "ID")]
    adapter: Option<String>,
    /// Use the prompt as it is, without the adapter's template.
    #[arg(long)]
    skip_template: bool,
    #[command(flatten)]
    stack: Stack,
}

impl Info {
    pub async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let request = self.connection.request(proto::GetServerInfoRequest {})?;
        let facts = json::facts(self.connection.facts().await?.get_server_info(request).await?.get_ref());
        terminal.json(&facts);
        terminal.line(format!("version {}", text(&facts["version"])));
        for group in ["model", "limits"] {
            terminal.line(terminal.bold(group));
            rows(&facts[group], terminal);
        }
        Ok(())
    }
}

impl Stats {
    pub async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let request = self.connection.request(proto::GetStatsRequest {})?;
        let stats = json::stats(self.connection.facts().await?.get_stats(request).await?.get_ref());
        terminal.json(&stats);
        rows(&stats, terminal);
        Ok(())
    }
}

impl Tokenize {
    pub async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let message = proto::TokenizeRequest {
            adapter_id: self.adapter.unwrap_or_default(),
            prompt: prompt(&self.prompt)?,
            skip_template: self.skip_template,
            prefix_adapter_ids: self.stack.prefix_adapters,
            task_id: self.stack.task,
            messages: None,
        };
        let request = self.connection.request(message)?;
        let response = self.connection.inference().await?.tokenize(request).await?.into_inner();
        terminal.json(&json::tokenized(&response));
        for (id, token) in response.token_ids.iter().zip(&response.tokens) {
            terminal.line(format!("{id:>7}  {token:?}"));
        }
        let (tokens, prefix) = (response.token_ids.len(), response.prefix_tokens);
        terminal.note(format!("{tokens} tokens after a prefix of {prefix}"));
        Ok(())
    }
}

fn rows(object: &Value, terminal: &Terminal) {
    for (name, value) in object.as_object().into_iter().flatten() {
        terminal.line(format!("  {name:<22} {}", text(value)));
    }
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
