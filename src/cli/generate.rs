//! `prefixd generate`.
use super::client::{Connection, Stack, prompt};
use super::{Failure, Terminal, json};
use crate::rpc::proto::{self, generate_request::Input};
use clap::Args;

/// Generate text.
#[derive(Debug, Args)]
pub(super) struct Generate {
    /// The input; `-` reads stdin.
    prompt: String,
    #[command(flatten)]
    connection: Connection,
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
    /// The prompt is a user's message: word it by the base model's chat template.
    #[arg(long, conflicts_with = "skip_template")]
    chat: bool,
    /// A system message before it.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Show the text as it comes.
    #[arg(long)]
    stream: bool,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    stopping: Stopping,
    /// Log-probability of each new token, and of this many most likely ones.
    #[arg(long, value_name = "K")]
    logprobs: Option<u32>,
    /// Log-probability of each input token.
    #[arg(long)]
    input_logprobs: bool,
    /// Ids of the new tokens.
    #[arg(long)]
    token_ids: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling (default: the task card's, else greedy)")]
struct Sampling {
    /// 0 is greedy.
    #[arg(long, allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Keep the k most likely tokens.
    #[arg(long)]
    top_k: Option<u32>,
    /// Keep the smallest set whose probability reaches this.
    #[arg(long, allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Drop tokens below this share of the best one's probability.
    #[arg(long, allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Above 1: avoid tokens seen before.
    #[arg(long, allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Above 0: avoid tokens already in the output.
    #[arg(long, allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Above 0: avoid tokens by how often they are in the output.
    #[arg(long, allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// The same seed gives the same text.
    #[arg(long)]
    seed: Option<u64>,
    /// Number of independent answers.
    #[arg(long, short)]
    n: Option<u32>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Stopping (default: the task card's)")]
struct Stopping {
    /// At most so many new tokens.
    #[arg(long)]
    max_new_tokens: Option<u32>,
    /// No end before so many.
    #[arg(long)]
    min_new_tokens: Option<u32>,
    /// Stop at this text; may be given more than once.
    #[arg(long = "stop", value_name = "TEXT")]
    stop_sequences: Vec<String>,
    /// Go on after an end-of-sequence token.
    #[arg(long)]
    ignore_eos: bool,
    /// Keep the stop sequence in the text.
    #[arg(long)]
    include_stop: bool,
}

impl Generate {
    pub async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let mut client = self.connection.inference().await?;
        let request = self.connection.request(self.message()?)?;
        let response = if self.stream {
            let stream = client.generate_stream(request).await?.into_inner();
            streamed(stream, self.sampling.n.unwrap_or(1), terminal).await?
        } else {
            let response = client.generate(request).await?.into_inner();
            show_choices(&response, terminal);
            response
        };
        terminal.json(&json::generated(&response));
        if self.logprobs.is_some() || self.input_logprobs {
            show_logprobs(&response, terminal);
        }
        if self.token_ids {
            response.choices.iter().for_each(|c| terminal.line(format!("token ids: {:?}", c.token_ids)));
        }
        show_summary(&response, terminal);
        Ok(())
    }

    fn input(&self) -> Result<Input, Failure> {
        let text = prompt(&self.prompt)?;
        if !self.chat {
            return Ok(Input::Prompt(text));
        }
        let message = |role: &str, content: String| proto::ChatMessage { role: role.into(), content };
        let system = self.system.iter().map(|text| message("system", text.clone()));
        let messages = system.chain([message("user", text)]).collect();
        Ok(Input::Messages(proto::Messages { messages, add_generation_prompt: None }))
    }

    fn message(&self) -> Result<proto::GenerateRequest, Failure> {
        let (s, t) = (&self.sampling, &self.stopping);
        Ok(proto::GenerateRequest {
            adapter_id: self.adapter.clone().unwrap_or_default(),
            input: Some(self.input()?),
            sampling: Some(proto::Sampling {
                temperature: s.temperature,
                top_k: s.top_k,
                top_p: s.top_p,
                min_p: s.min_p,
                repetition_penalty: s.repetition_penalty,
                presence_penalty: s.presence_penalty,
                frequency_penalty: s.frequency_penalty,
                seed: s.seed,
                n: s.n,
            }),
            stopping: Some(proto::Stopping {
                max_new_tokens: t.max_new_tokens,
                min_new_tokens: t.min_new_tokens,
                stop_sequences: t.stop_sequences.clone(),
                ignore_eos: t.ignore_eos,
                include_stop_sequence: t.include_stop,
            }),
            output: Some(proto::Output {
                logprobs: self.logprobs,
                input_logprobs: self.input_logprobs,
                token_ids: self.token_ids,
            }),
            adapter_generation: self.generation,
            skip_template: self.skip_template,
            prefix_adapter_ids: self.stack.prefix_adapters.clone(),
            task_id: self.stack.task,
        })
    }
}

/// Shows the pieces and puts them together into the answer that the unary call gives. Several answers would tear
/// each other to pieces, so each is shown when it ends.
async fn streamed(
    mut stream: tonic::Streaming<proto::GenerateStreamResponse>,
    n: u32,
    terminal: &Terminal,
) -> Result<proto::GenerateResponse, Failure> {
    let mut whole = proto::GenerateResponse::default();
    while let Some(message) = stream.message().await? {
        whole.request_id = message.request_id;
        whole.adapter = message.adapter.or(whole.adapter.take());
        whole.prefix_adapters.extend(message.prefix_adapters);
        whole.input_logprobs.extend(message.input_logprobs);
        if let Some(usage) = message.usage {
            let generated = whole.usage.as_ref().map_or(0, |u| u.generated_tokens) + usage.generated_tokens;
            whole.usage = Some(proto::Usage { generated_tokens: generated, ..whole.usage.take().unwrap_or(usage) });
        }
        // The slowest choice ends last.
        whole.timings = message.timings.or(whole.timings.take());
        let Some(new) = message.choice else { continue };
        let index = new.index as usize;
        if n == 1 {
            terminal.piece(&new.text);
        }
        while whole.choices.len() <= index {
            let index = whole.choices.len() as u32;
            whole.choices.push(proto::Choice { index, ..Default::default() });
        }
        let choice = &mut whole.choices[index];
        choice.text.push_str(&new.text);
        choice.token_ids.extend(new.token_ids);
        choice.logprobs.extend(new.logprobs);
        if new.finish_reason != 0 {
            choice.finish_reason = new.finish_reason;
            choice.stop_sequence = new.stop_sequence;
            terminal.line(if n == 1 { String::new() } else { format!("[{index}] {}", choice.text) });
        }
    }
    Ok(whole)
}

fn show_choices(response: &proto::GenerateResponse, terminal: &Terminal) {
    match response.choices.as_slice() {
        [only] => terminal.line(&only.text),
        many => many.iter().for_each(|c| terminal.line(format!("[{}] {}", c.index, c.text))),
    }
}

fn show_logprobs(response: &proto::GenerateResponse, terminal: &Terminal) {
    let row = |t: &proto::TokenLogprob| {
        let top: Vec<_> = t.top.iter().map(|t| format!("{:?} {:.3}", t.text, t.logprob)).collect();
        terminal.line(format!("{:>9.4}  {:<20} {}", t.logprob, format!("{:?}", t.text), top.join("  ")));
    };
    response.input_logprobs.iter().for_each(row);
    for choice in &response.choices {
        choice.logprobs.iter().for_each(row);
    }
}

fn show_summary(response: &proto::GenerateResponse, terminal: &Terminal) {
    let (Some(u), Some(t)) = (&response.usage, &response.timings) else { return };
    let reasons: Vec<_> = response.choices.iter().map(json::finish_reason).collect();
    terminal.note(format!(
        "{} · prompt {} ({} cached) + prefix {} -> {} tokens · first after {:.1} ms, all after {:.1} ms · batch of {} sequences, {} adapters",
        reasons.join(", "),
        u.prompt_tokens, u.cached_tokens, u.prefix_tokens, u.generated_tokens,
        t.ttft_ms, t.e2el_ms, t.batch_max_sequences, t.batch_max_adapters,
    ));
}
