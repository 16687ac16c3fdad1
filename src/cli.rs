//! The commands. `serve` is the server, `demo` shows what it does, the rest are clients of a running one.
//!
//! Exit codes: 0 done, 1 failed, 2 asked wrongly.
mod adapters;
mod bench;
mod client;
mod demo;
mod failure;
mod generate;
mod info;
mod json;
mod score;
mod serve;
mod terminal;
mod train;

use clap::{Parser, Subcommand, ValueEnum};

pub use failure::{Code, Failure};
pub use terminal::Terminal;

/// Serve many tasks from one frozen language model.
#[derive(Debug, Parser)]
#[command(name = "prefixd", version, about, max_term_width = 100)]
pub struct Cli {
    /// What goes to stdout, and errors to stderr: text for people, or one JSON object.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "FORM")]
    pub output: Output,
    #[command(subcommand)]
    command: Command,
}

/// The form of the answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// One stable object.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model and its adapters over gRPC.
    Serve(Box<serve::Serve>),
    /// Show it: a real server on a free port, many tasks in one batch, adapters in and out under load.
    Demo(demo::Demo),
    /// Generate text.
    Generate(Box<generate::Generate>),
    /// Log-probabilities of continuations of a prompt.
    Score(score::Score),
    /// Choose among an adapter's labels.
    Classify(score::Classify),
    /// Show how a text is tokenised.
    Tokenize(info::Tokenize),
    /// List, load, upload, unload and convert adapters.
    #[command(subcommand)]
    Adapters(adapters::Adapters),
    /// Train an adapter on the server, and put it in service.
    Train(Box<train::Train>),
    /// List, watch and cancel training jobs.
    #[command(subcommand)]
    Jobs(train::Jobs),
    /// Run a dataset through an adapter and the bare base, and compare answers with targets.
    Eval(train::Eval),
    /// Measure a server under load: throughput, latencies, fairness, over adapters and rates.
    Bench(Box<bench::Bench>),
    /// The model, the limits and the version of a server.
    Info(info::Info),
    /// What a server is doing now.
    Stats(info::Stats),
}

impl Cli {
    /// The log lines that the command writes where `PREFIXD_LOG` does not say.
    pub fn default_log(&self) -> &'static str {
        match self.command {
            Command::Serve(_) => "info",
            _ => "warn",
        }
    }

    /// Runs the command to its end.
    ///
    /// # Errors
    /// Why it failed; see [`Failure`].
    pub async fn run(self) -> Result<(), Failure> {
        let terminal = Terminal::new(self.output);
        match self.command {
            Command::Serve(serve) => serve.run(&terminal).await,
            Command::Demo(demo) => demo.run(&terminal).await,
            Command::Generate(generate) => generate.run(&terminal).await,
            Command::Score(score) => score.run(&terminal).await,
            Command::Classify(classify) => classify.run(&terminal).await,
            Command::Tokenize(tokenize) => tokenize.run(&terminal).await,
            Command::Adapters(adapters) => adapters.run(&terminal).await,
            Command::Train(train) => train.run(&terminal).await,
            Command::Jobs(jobs) => jobs.run(&terminal).await,
            Command::Eval(eval) => eval.run(&terminal).await,
            Command::Bench(bench) => bench.run(&terminal).await,
            Command::Info(info) => info.run(&terminal).await,
            Command::Stats(stats) => stats.run(&terminal).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
