//! Training, wired: the trainer on the engine's thread, the jobs' journal, the way of a result into the store.
use crate::config::{Config, TrainingConfig};
use crate::engine::Guest;
use crate::engine::loader::AdapterLoader;
use crate::error::{Context, Kind, Result};
use crate::model::Model;
use crate::rpc::datasets::Datasets;
use crate::rpc::drain::Drain;
use crate::rpc::evaluate::Evaluator;
use crate::rpc::inference::Inference;
use crate::rpc::training::Training;
use crate::training::jobs::{Base, Jobs, Limits, Published, Trained, Wires};
use crate::training::journal::Journal;
use crate::training::trainer::{Bounds, Event, Order, Trainer};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// The ends of the trainer's channels, and the base it trains on.
pub(super) struct Bench {
    base: Base,
    orders: Sender<Order>,
    events: (Sender<Event>, Receiver<Event>),
}

/// A trainer for the engine's thread.
pub(super) fn bench(model: &Model, config: &TrainingConfig) -> (Bench, Guest) {
    let (orders, inbox) = channel();
    let events = channel();
    let bounds = Bounds {
        batch_rows: config.batch_rows,
        activation_bytes: config.activation_mib.saturating_mul(1 << 20),
        checkpoint_every: Duration::from_secs(config.checkpoint_seconds),
    };
    // What is kept, a layer of the largest batch, and the inputs of all layers, which are no more than that.
    let device_bytes = bounds.activation_bytes.saturating_add(config.batch_mib.saturating_mul(2 << 20));
    let trainer = Trainer::new(inbox, events.0.clone(), bounds);
    let base = Base::of(model);
    (Bench { base, orders, events }, Guest { work: Box::new(trainer), share: config.share, device_bytes })
}

/// The service. Its folder is a hidden one of the adapter store, unless the settings name another: jobs live as long as the
/// adapters do. A server whose journal another one has serves all the same, and says so to who wants to train. Blocks.
pub(super) fn service(
    bench: Bench,
    config: &Config,
    loader: AdapterLoader,
    inference: Inference,
    drain: Drain,
) -> Result<Training> {
    let dir = config.training.dir.clone().unwrap_or_else(|| loader.store().dir().join(".training"));
    let journal = open(&dir);
    let t = &config.training;
    let bytes = |mib: usize| mib.saturating_mul(1 << 20);
    let limits = Limits {
        running: t.max_running,
        queued: t.max_queued,
        kept: t.kept_jobs,
        examples: t.max_examples,
        batch_bytes: bytes(t.batch_mib),
        activation_bytes: bytes(t.activation_mib),
        weight_bytes: bytes(t.weights_mib),
    };
    let engine = inference.engine.clone();
    let jobs = journal.and_then(|journal| {
        let wires = Wires {
            orders: bench.orders,
            clerk: bench.events.0,
            events: bench.events.1,
            wake: Box::new(move || engine.wake()),
            publish: publish(loader.clone()),
        };
        Jobs::start(bench.base, limits, journal, wires)
    });
    if let Err(e) = &jobs {
        tracing::warn!("no training here: {e}");
    }
    let data = t.data.clone().unwrap_or_else(|| dir.join("datasets"));
    let datasets = Datasets::new(data, t.max_data_bytes, t.max_examples);
    let evaluator = Evaluator { inference, registry: loader.registry().clone() };
    Ok(Training { jobs, datasets, loader, evaluator, drain })
}

fn open(dir: &Path) -> Result<Journal> {
    std::fs::create_dir_all(dir).or_kind(Kind::FailedPrecondition, dir.display())?;
    Journal::open(&dir.join("jobs.sqlite"))
}

/// Puts results into the store through the loader, from the jobs' own thread.
fn publish(loader: AdapterLoader) -> crate::training::jobs::Publish {
    let runtime = tokio::runtime::Handle::current();
    Box::new(move |trained: Trained| {
        let Trained { adapter_id, files, card, load, pinned } = trained;
        let files = files.files()?;
        let staged = || -> Result<_> {
            let mut staging = loader.store().stage(&adapter_id)?;
            for (name, bytes) in &files {
                staging.append(name, bytes)?;
            }
            if !card.is_empty() {
                staging.append("task.toml", card.as_bytes())?;
            }
            Ok(staging)
        };
        if !load {
            return staged()?.publish().map(|()| Published::Stored);
        }
        match runtime.block_on(loader.publish(&adapter_id, staged()?, pinned)) {
            Ok(adapter) => Ok(Published::Serving(adapter.generation.0)),
            // The KV pool or the registry is full. So may be the disk: then this fails too.
            Err(e) if e.kind() == Kind::ResourceExhausted => staged()?.publish().map(|()| Published::Waiting(e)),
            Err(e) => Err(e),
        }
    })
}
