//! `prefixd jobs`.
use super::watch;
use crate::cli::client::Connection;
use crate::cli::{Failure, Terminal};
use crate::rpc::proto;
use clap::{Args, Subcommand};
use serde_json::json;
use std::path::PathBuf;

/// List, watch and cancel training jobs.
#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Jobs {
    /// All jobs that the server remembers.
    List(List),
    /// Follow a job to its end.
    Watch(Watch),
    /// End a job without a result.
    Cancel(Cancel),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct List {
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Watch {
    /// The job.
    job: String,
    /// Draw its loss curve.
    #[arg(long, value_name = "FILE.svg")]
    curve: Option<PathBuf>,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Cancel {
    /// The job.
    job: String,
    #[command(flatten)]
    connection: Connection,
}

impl Jobs {
    pub async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        match self {
            Jobs::List(list) => list.run(terminal).await,
            Jobs::Watch(watch) => watch.run(terminal).await,
            Jobs::Cancel(cancel) => cancel.run(terminal).await,
        }
    }
}

impl List {
    async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let mut client = self.connection.training().await?;
        let (mut all, mut page_token) = (Vec::new(), String::new());
        loop {
            let message = proto::ListTrainingJobsRequest { page_size: 0, page_token };
            let page = client.list_training_jobs(self.connection.request(message)?).await?.into_inner();
            all.extend(page.jobs);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        for job in &all {
            let (steps, total) = (job.step, job.total_steps);
            let loss = job.last_step.as_ref().map_or(String::new(), |s| format!("  loss {:.4}", s.loss));
            let error = if job.error.is_empty() { String::new() } else { format!("  {}", job.error) };
            let line = format!(
                "{}  {:<10} {:<24} {steps:>6}/{total}{loss}{error}",
                job.job_id,
                watch::state(job),
                job.adapter_id
            );
            terminal.line(line);
        }
        terminal.json(&json!({ "jobs": all.iter().map(watch::json).collect::<Vec<_>>() }));
        Ok(())
    }
}

impl Watch {
    async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let mut client = self.connection.training().await?;
        let watched = watch::follow(&mut client, &self.job, terminal).await?;
        if let Some(path) = &self.curve {
            watched.draw(path, terminal)?;
        }
        let job = watched.ended()?;
        terminal.line(watch::summary(&job));
        terminal.json(&json!({ "job": watch::json(&job) }));
        Ok(())
    }
}

impl Cancel {
    async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let mut client = self.connection.training().await?;
        let message = proto::CancelTrainingJobRequest { job_id: self.job };
        let job = client.cancel_training_job(self.connection.request(message)?).await?.into_inner().job;
        let job = job.ok_or_else(|| Failure::local("the server's answer holds no job"))?;
        terminal.line(format!("{} is {}", job.job_id, watch::state(&job)));
        terminal.json(&json!({ "job": watch::json(&job) }));
        Ok(())
    }
}
