//! `prefixd score` and `prefixd classify`.
use super::client::{Connection, Stack, prompt};
use super::{Failure, Terminal, json};
use crate::rpc::proto::{self, classify_request, continuation::Content, score_request};
use clap::Args;

/// Log-probabilities of continuations of a prompt.
#[derive(Debug, Args)]
pub(super) struct Score {
    /// The prompt; `-` reads stdin.
    prompt: String,
    /// What may follow it.
    #[arg(required = true)]
    continuations: Vec<String>,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    task: Task,
}

/// Choose among an adapter's labels.
#[derive(Debug, Args)]
pub(super) struct Classify {
    /// The text; `-` reads stdin.
    prompt: String,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    task: Task,
    /// A label to choose from, instead of the task card's; may be given more than once.
    #[arg(long = "label", value_name = "LABEL")]
    labels: Vec<String>,
}

#[derive(Debug, Args)]
struct Task {
    /// Which task; none: the bare base model.
    #[arg(long, value_name = "ID")]
    adapter: Option<String>,
    /// Only this generation of the adapter will do.
    #[arg(long, requires = "adapter")]
    generation: Option<u64>,
    /// Use the prompt as it is, without the adapter's template.
    #[arg(long)]
    skip_template: bool,
    #[command(flatten)]
    stack: Stack,
}

impl Score {
    pub async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let content = |text: &String| proto::Continuation { content: Some(Content::Text(text.clone())) };
        let message = proto::ScoreRequest {
            adapter_id: self.task.adapter.unwrap_or_default(),
            input: Some(score_request::Input::Prompt(prompt(&self.prompt)?)),
            continuations: self.continuations.iter().map(content).collect(),
            adapter_generation: self.task.generation,
            skip_template: self.task.skip_template,
            prefix_adapter_ids: self.task.stack.prefix_adapters,
            task_id: self.task.stack.task,
        };
        let request = self.connection.request(message)?;
        let response = self.connection.inference().await?.score(request).await?.into_inner();
        terminal.json(&json::scored(&response));
        terminal.line(terminal.dim("  logprob  perplexity  tokens  continuation"));
        for (score, text) in response.scores.iter().zip(&self.continuations) {
            let (logprob, perplexity, tokens) = (score.logprob, score.perplexity, score.tokens.len());
            terminal.line(format!("{logprob:>9.4}  {perplexity:>10.3}  {tokens:>6}  {text}"));
        }
        Ok(())
    }
}

impl Classify {
    pub async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let message = proto::ClassifyRequest {
            adapter_id: self.task.adapter.unwrap_or_default(),
            input: Some(classify_request::Input::Prompt(prompt(&self.prompt)?)),
            labels: self.labels,
            adapter_generation: self.task.generation,
            skip_template: self.task.skip_template,
            prefix_adapter_ids: self.task.stack.prefix_adapters,
            task_id: self.task.stack.task,
        };
        let request = self.connection.request(message)?;
        let response = self.connection.inference().await?.classify(request).await?.into_inner();
        terminal.json(&json::classified(&response));
        for score in &response.scores {
            terminal.line(format!("{:>7.2} %  {}", score.probability * 100.0, score.label));
        }
        Ok(())
    }
}
