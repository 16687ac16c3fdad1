//! A new task is trained, on the weights that serve, and comes into service.
use super::{Example, LIVE, pairs, shorten};
use crate::cli::train::watch;
use crate::cli::{Failure, Terminal};
use crate::rpc::proto::inference_service_client::InferenceServiceClient;
use crate::rpc::proto::training_service_client::TrainingServiceClient;
use crate::rpc::proto::{self, dataset::Source};
use serde_json::{Value, json};
use std::time::Instant;
use tonic::transport::Channel;

/// The adapter that is made.
const ID: &str = "date-iso";

/// Held-out inputs that are asked before and after; so many are shown.
const ASKED: usize = 40;
const SHOWN: usize = 3;

/// Trains it, shows its bar and its curve, and asks before and after.
pub(super) async fn run(channel: &Channel, terminal: &Terminal) -> Result<Value, Failure> {
    terminal.line(terminal.bold("\nNow a new task is trained, on the very weights that serve"));
    let mut client = TrainingServiceClient::new(channel.clone());
    let held_out: Vec<_> = pairs(&LIVE)?.into_iter().take(ASKED).collect();
    let before = ask(channel, None, &held_out).await?;
    let started = Instant::now();
    let job = client.create_training_job(request()?).await?.into_inner().job;
    let job = job.ok_or_else(|| Failure::local("the server's answer holds no job"))?;
    terminal.line(format!("  {}", watch::summary(&job)));
    let watched = watch::follow(&mut client, &job.job_id, terminal).await?;
    let seconds = started.elapsed().as_secs_f64();
    let curve = std::env::temp_dir().join("prefixd-demo-loss.svg");
    watched.draw(&curve, terminal)?;
    let ended = watched.ended()?;
    terminal.line(format!("  trained, stored and in service as generation {} after {seconds:.1} s", ended.generation));
    let after = ask(channel, Some(ID), &held_out).await?;
    let right =
        |answers: &[String]| answers.iter().zip(&held_out).filter(|(a, (_, target))| a.trim() == target).count();
    for ((input, target), (before, after)) in held_out.iter().zip(before.iter().zip(&after)).take(SHOWN) {
        let mark = if after.trim() == target { terminal.good("✓") } else { terminal.bad("✗") };
        let (input, before, after) = (shorten(input, 28), shorten(before, 22), shorten(after, 16));
        terminal.line(format!("  \"{input}\": before \"{before}\", after {after} {mark}"));
    }
    let (was, is, n) = (right(&before), right(&after), held_out.len());
    terminal.line(format!("  right on {n} held-out dates: bare base {was}, with the new adapter {is}"));
    Ok(json!({ "adapter": ID, "seconds": seconds, "steps": ended.step, "generation": ended.generation,
        "held_out": n, "right_before": was, "right_after": is, "curve": curve }))
}

fn request() -> Result<proto::CreateTrainingJobRequest, Failure> {
    let broken = |name: &str| Failure::local(format!("embedded live/{name} is missing or broken"));
    let text = |name: &str| LIVE.get_file(name).and_then(|f| f.contents_utf8()).ok_or_else(|| broken(name));
    let mut examples = Vec::new();
    for line in text("train.jsonl")?.lines() {
        let v: Value = serde_json::from_str(line).map_err(|_| broken("train.jsonl"))?;
        let (Some(input), Some(target)) = (v["input"].as_str(), v["target"].as_str()) else {
            return Err(broken("train.jsonl"));
        };
        examples.push(proto::TrainingExample {
            input: input.to_owned(),
            targets: vec![target.to_owned()],
            ..Default::default()
        });
    }
    let settings = proto::TrainingSettings {
        max_steps: Some(60),
        batch_size: Some(8),
        warmup_steps: Some(3),
        schedule: proto::LearningRateSchedule::Cosine.into(),
        target_template: Some(" {{ target }}\n".into()),
        ..Default::default()
    };
    Ok(proto::CreateTrainingJobRequest {
        adapter_id: ID.into(),
        settings: Some(settings),
        data: Some(proto::Dataset { source: Some(Source::Inline(proto::ExampleList { examples })) }),
        task_card: text("task.toml")?.to_owned(),
        load: true,
        ..Default::default()
    })
}

/// What the adapter, or the bare base, answers.
async fn ask(
    channel: &Channel,
    adapter: Option<&'static str>,
    held_out: &[(String, String)],
) -> Result<Vec<String>, Failure> {
    let mut tasks = tokio::task::JoinSet::new();
    for (i, (input, _)) in held_out.iter().enumerate() {
        let request = Example { adapter, input: input.clone(), target: None }.request();
        let mut client = InferenceServiceClient::new(channel.clone());
        tasks.spawn(async move { (i, client.generate(request).await) });
    }
    let mut answers = vec![String::new(); held_out.len()];
    while let Some(done) = tasks.join_next().await {
        let (i, response) = done.map_err(|e| Failure::local(e.to_string()))?;
        answers[i] = super::burst::text(&response?.into_inner()).trim().to_owned();
    }
    Ok(answers)
}
