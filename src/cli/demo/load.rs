//! Requests that keep running while adapters come and go.
use super::{Example, TASKS, examples};
use crate::cli::Failure;
use crate::rpc::proto::inference_service_client::InferenceServiceClient;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

/// Clients, each with one request at a time.
const CLIENTS: usize = 6;

/// The running clients.
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Tally>>,
}

/// What they got.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    pub answered: usize,
    pub failed: usize,
    /// The first failure.
    pub reason: Option<String>,
}

impl Load {
    /// Starts clients that ask the tasks in turn.
    pub fn start(channel: &Channel) -> Result<Self, Failure> {
        let mut all = Vec::new();
        for task in TASKS {
            all.extend(examples(task, usize::MAX)?);
        }
        let all: Arc<[Example]> = all.into();
        let stop = Arc::new(AtomicBool::new(false));
        let client = |index: usize| {
            let (channel, all, stop) = (channel.clone(), Arc::clone(&all), Arc::clone(&stop));
            // Different strides meet in different mixes of tasks.
            tokio::spawn(ask(channel, all, stop, index))
        };
        let clients = (0..CLIENTS).map(client).collect();
        Ok(Load { stop, clients })
    }

    /// Lets each finish the request at hand, and adds up.
    pub async fn finish(self) -> Result<Tally, Failure> {
        self.stop.store(true, Ordering::Relaxed);
        let mut sum = Tally::default();
        for client in self.clients {
            let tally = client.await.map_err(|e| Failure::local(format!("background load: {e}")))?;
            sum.answered += tally.answered;
            sum.failed += tally.failed;
            sum.reason = sum.reason.or(tally.reason);
        }
        Ok(sum)
    }
}

async fn ask(channel: Channel, all: Arc<[Example]>, stop: Arc<AtomicBool>, index: usize) -> Tally {
    let mut client = InferenceServiceClient::new(channel);
    let mut tally = Tally::default();
    for turn in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let example = &all[(index * 7 + turn * (2 * index + 13)) % all.len()];
        match client.generate(example.request()).await {
            Ok(_) => tally.answered += 1,
            Err(status) => {
                tally.failed += 1;
                tally.reason.get_or_insert(status.to_string());
            }
        }
    }
    tally
}
