//! `prefixd train`, `prefixd jobs` and `prefixd eval`.
pub(super) mod curve;
mod evaluate;
mod jobs;
mod settings;
pub(super) mod watch;

pub(super) use evaluate::Eval;
pub(super) use jobs::Jobs;

use super::client::Connection;
use super::{Failure, Terminal};
use crate::rpc::proto::training_service_client::TrainingServiceClient;
use crate::rpc::proto::{self, dataset::Source, upload_dataset_request::Part};
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};
use tonic::transport::Channel;

/// Bytes of a file in one message of an upload.
const CHUNK: usize = 1 << 20;

/// Examples that the line at the end is about, where no evaluation data was given.
const COMPARED: u32 = 50;

/// Train an adapter on the server, and put it in service.
#[derive(Debug, Args)]
pub(super) struct Train {
    /// JSON lines with `input` and `target`, or `messages`: a file, or the name of a dataset that the server has.
    data: String,
    /// The adapter to make.
    #[arg(long, value_name = "ID")]
    adapter: String,
    /// Data to evaluate on, likewise.
    #[arg(long, value_name = "FILE|NAME")]
    eval: Option<String>,
    /// The adapter's task card: template, labels, stop sequences.
    #[arg(long, value_name = "task.toml")]
    card: Option<PathBuf>,
    /// Replace the adapter if it exists.
    #[arg(long)]
    replace: bool,
    /// Only put it into the store.
    #[arg(long)]
    no_load: bool,
    /// Keep its prefix in the KV pool for good.
    #[arg(long, conflicts_with = "no_load")]
    pinned: bool,
    /// Return at once; `prefixd jobs watch` shows the rest.
    #[arg(long)]
    detach: bool,
    /// Do not compare the adapter with the bare base at the end.
    #[arg(long)]
    skip_eval: bool,
    /// Where the loss curve goes [default: ID-loss.svg].
    #[arg(long, value_name = "FILE.svg", value_parser = svg)]
    curve: Option<PathBuf>,
    #[command(flatten)]
    settings: settings::Settings,
    #[command(flatten)]
    connection: Connection,
}

impl Train {
    pub async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let mut client = self.connection.training().await?;
        let task_card = match &self.card {
            None => String::new(),
            Some(path) => read(path)?,
        };
        let data = dataset(&mut client, &self.data, &format!("{}.train", self.adapter)).await?;
        let evaluation_data = match &self.eval {
            None => None,
            Some(eval) => Some(dataset(&mut client, eval, &format!("{}.eval", self.adapter)).await?),
        };
        let settings: proto::TrainingSettings = self.settings.into();
        // What is measured at the end is what was trained.
        let template = settings.target_template.clone();
        let message = proto::CreateTrainingJobRequest {
            adapter_id: self.adapter.clone(),
            settings: Some(settings),
            data: Some(data.clone()),
            evaluation_data: evaluation_data.clone(),
            task_card,
            load: !self.no_load,
            pinned: self.pinned,
            replace: self.replace,
        };
        let job = client.create_training_job(self.connection.request(message)?).await?.into_inner().job;
        let job = job.ok_or_else(|| Failure::local("the server's answer holds no job"))?;
        terminal.line(watch::summary(&job));
        if self.detach {
            terminal.json(&json!({ "job_id": job.job_id }));
            return Ok(());
        }
        let path = self.curve.unwrap_or_else(|| PathBuf::from(format!("{}-loss.svg", self.adapter)));
        let watched = watch::follow(&mut client, &job.job_id, terminal).await?;
        watched.draw(&path, terminal)?;
        let ended = watched.ended()?;
        if !ended.error.is_empty() {
            terminal.line(format!("  {}", ended.error));
        }
        let mut report = json!({ "job": watch::json(&ended), "curve": path });
        if ended.generation > 0 && !self.skip_eval {
            let message = proto::EvaluateRequest {
                adapter_id: self.adapter.clone(),
                max_examples: if evaluation_data.is_some() { 0 } else { COMPARED },
                data: Some(evaluation_data.clone().unwrap_or(data)),
                target_template: template,
                ..Default::default()
            };
            let on = if evaluation_data.is_some() { "evaluation" } else { "training" };
            match client.evaluate(message).await {
                Ok(measured) => {
                    let measured = measured.into_inner();
                    terminal.line(evaluate::change(&measured, &self.adapter, on));
                    report["evaluation"] = evaluate::json(&measured);
                }
                // The adapter is trained and serves all the same.
                Err(status) => {
                    terminal.line(format!("  not compared with the bare base: {}", status.message()));
                    report["evaluation_error"] = status.message().into();
                }
            }
        }
        terminal.json(&report);
        Ok(())
    }
}

impl Connection {
    pub async fn training(&self) -> Result<TrainingServiceClient<Channel>, Failure> {
        let channel = super::client::connect(&self.server).await?;
        Ok(TrainingServiceClient::new(channel).max_decoding_message_size(usize::MAX))
    }
}

/// A file goes to the server under `name`; anything else is the name of a dataset that is there.
async fn dataset(
    client: &mut TrainingServiceClient<Channel>,
    given: &str,
    name: &str,
) -> Result<proto::Dataset, Failure> {
    let path = Path::new(given);
    let dataset_id = if path.is_file() {
        let text = read(path)?.into_bytes();
        let first = proto::UploadDatasetRequest { part: Some(Part::DatasetId(name.to_owned())) };
        let rest: Vec<_> =
            text.chunks(CHUNK).map(|c| proto::UploadDatasetRequest { part: Some(Part::Chunk(c.to_vec())) }).collect();
        client.upload_dataset(tokio_stream::iter(std::iter::once(first).chain(rest))).await?.into_inner().dataset_id
    } else if given.contains('/') || given.ends_with(".jsonl") {
        return Err(Failure::usage(format!("{given}: no such file")));
    } else {
        given.to_owned()
    };
    Ok(proto::Dataset { source: Some(Source::DatasetId(dataset_id)) })
}

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))
}

/// The name of a picture.
fn svg(name: &str) -> std::result::Result<PathBuf, String> {
    let path = PathBuf::from(name);
    if path.extension().is_some_and(|ending| ending == "svg") { Ok(path) } else { Err("must end with .svg".into()) }
}
