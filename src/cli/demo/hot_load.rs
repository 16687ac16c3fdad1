//! An adapter comes, is replaced and goes, while others are served.
use super::{HOT_LOAD, load::Load, pairs, shorten};
use crate::cli::{Failure, Terminal};
use crate::rpc::proto::adapter_service_client::AdapterServiceClient;
use crate::rpc::proto::inference_service_client::InferenceServiceClient;
use crate::rpc::proto::{self, generate_request::Input};
use crate::rpc::upload::parts;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tonic::Code;
use tonic::transport::Channel;

/// The id that comes and goes.
const ID: &str = "stars";

/// The load runs at least so long before and after: enough to notice a pause.
const SETTLE: Duration = Duration::from_millis(400);

/// Plays it, shows a line for each step, and returns the same as JSON.
pub(super) async fn run(channel: &Channel, terminal: &Terminal) -> Result<Value, Failure> {
    terminal.line(terminal.bold("Now an adapter comes, is replaced and goes, while other requests keep running"));
    let load = Load::start(channel)?;
    tokio::time::sleep(SETTLE).await;
    let mut steps = Vec::new();
    for (folder, verb) in [("gen-1", "upload"), ("gen-2", "replace")] {
        steps.push(publish(channel, folder, verb, terminal).await?);
    }
    let mut client = AdapterServiceClient::new(channel.clone());
    let unload = proto::UnloadAdapterRequest { adapter_id: ID.into(), delete: true, ..Default::default() };
    client.unload_adapter(unload).await?;
    let after = ask(channel, "anything").await;
    let gone = matches!(&after, Err(status) if status.code() == Code::NotFound);
    let answer = if gone { "NOT_FOUND, as it should be" } else { "an answer, though it should be gone" };
    terminal.line(format!("  {:<8} {ID}; the next request for it gets {answer}", "unload"));
    tokio::time::sleep(SETTLE).await;

    let tally = load.finish().await?;
    let verdict = match tally.failed {
        0 => terminal.good("none failed"),
        n => terminal.bad(&format!("{n} failed")),
    };
    terminal.line(format!("  meanwhile {} requests of other tasks ran: {verdict}", tally.answered + tally.failed));
    if let Some(reason) = tally.reason {
        return Err(Failure::local(format!("{} background requests failed: {reason}", tally.failed)));
    }
    if !gone {
        return Err(Failure::local("an unloaded adapter answered"));
    }
    Ok(json!({ "steps": steps, "background_requests": tally.answered, "background_failures": tally.failed }))
}

/// Uploads one generation and asks it.
async fn publish(channel: &Channel, folder: &str, verb: &str, terminal: &Terminal) -> Result<Value, Failure> {
    let dir = HOT_LOAD.get_dir(folder).ok_or_else(|| Failure::local(format!("hot-load/{folder} is not embedded")))?;
    let file = |f: &include_dir::File<'_>| Some((f.path().file_name()?.to_str()?.to_owned(), f.contents().to_vec()));
    let header = proto::UploadHeader { adapter_id: ID.into(), replace: true, pinned: false };
    let messages: Vec<_> = parts(header, dir.files().filter_map(file).collect()).collect();
    let started = Instant::now();
    let mut client = AdapterServiceClient::new(channel.clone());
    let adapter = client.upload_adapter(tokio_stream::iter(messages)).await?.into_inner().adapter;
    let ms = started.elapsed().as_secs_f64() * 1e3;
    let adapter = adapter.ok_or_else(|| Failure::local("the server's answer holds no adapter"))?;
    let (method, generation) = (adapter.method.to_ascii_lowercase().replace('_', " "), adapter.generation);
    terminal.line(format!("  {verb:<8} {ID} ({method}): generation {generation} READY after {ms:.0} ms"));

    let example = pairs(dir)?.into_iter().next();
    let (input, target) = example.ok_or_else(|| Failure::local(format!("hot-load/{folder} has no example")))?;
    let response = ask(channel, &input).await?;
    let answer = super::burst::text(&response).trim().to_owned();
    let by = response.adapter.map_or(0, |a| a.generation);
    let mark = if answer == target { terminal.good("✓") } else { terminal.dim(&format!("(expected {target})")) };
    let shown = shorten(&input, terminal.width().saturating_sub(50).max(20));
    terminal.line(format!("  {:<8} \"{shown}\" -> {} {mark} (generation {by})", "ask", shorten(&answer, 24)));
    Ok(json!({
        "step": verb, "generation": generation, "ready_ms": ms, "input": input, "output": answer, "expected": target,
        "answered_by_generation": by,
    }))
}

async fn ask(channel: &Channel, input: &str) -> Result<proto::GenerateResponse, tonic::Status> {
    let message = proto::GenerateRequest {
        adapter_id: ID.into(),
        input: Some(Input::Prompt(input.into())),
        ..Default::default()
    };
    Ok(InferenceServiceClient::new(channel.clone()).generate(message).await?.into_inner())
}
