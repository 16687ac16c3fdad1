//! Continuous batching: one thread owns the model and the KV pool; everyone else holds an [`EngineHandle`].
//!
//! A step is four calls: schedule, build the ragged batch, run the model, sample. `scheduler` holds no tensor.
mod batcher;
mod capacity;
mod fair_queue;
mod guest;
pub mod loader;
mod readout;
pub mod request;
mod residency;
mod runner;
mod sampler;
mod scheduler;
mod sequence;
mod shared;
mod stats;
mod stop;
mod worker;

use crate::adapter::{Digest, Prefix};
use crate::config::EngineConfig;
use crate::error::{Error, Kind, Result};
use crate::model::Model;
use crate::model::background::Background;
use request::{Event, Request};
use shared::Shared;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use worker::Command;

pub use stats::Stats;

/// Messages that may wait for the engine thread between two steps. Requests beyond it are refused with a
/// retry hint; `max_queue` bounds those already taken in.
const COMMANDS: usize = 4096;

/// A cheap handle on the engine thread.
#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

/// Work that shares the engine's thread.
pub struct Guest {
    /// What it is.
    pub work: Box<dyn Background>,
    /// Of the thread's time while requests run, 0 to 1. It takes everything when there are none.
    pub share: f64,
    /// Bytes of a GPU that it may take, which the KV pool leaves free.
    pub device_bytes: usize,
}

/// The running engine: keep it to stop it.
pub struct Engine {
    handle: EngineHandle,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Engine {
    /// Starts the engine thread over `model`.
    ///
    /// # Errors
    /// `Internal` when the KV pool cannot be had, `InvalidArgument` when it would not hold one page.
    pub fn start(model: Model, config: &EngineConfig) -> Result<Self> {
        Self::start_with(model, config, None)
    }

    /// The same with work that runs between steps: while requests run, no more than a share of the time.
    pub fn start_with(model: Model, config: &EngineConfig, background: Option<Guest>) -> Result<Self> {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let worker = worker::Worker::new(model, config, inbox, background)?;
        let handle = EngineHandle { commands, shared: worker.shared() };
        let thread = std::thread::Builder::new().name("prefixd-engine".into()).spawn(move || worker.run());
        let thread = thread.map_err(|e| Error::internal(format!("engine thread: {e}")))?;
        Ok(Engine { handle, thread: Some(thread) })
    }

    /// A handle to submit with.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }
}

impl Drop for Engine {
    /// Stops after the step at hand; requests still running get [`Kind::Unavailable`].
    fn drop(&mut self) {
        self.handle.shared.stop();
        self.handle.wake();
        if let Some(thread) = self.thread.take() {
            // The thread has no panic of ours to report that the log did not get.
            let _ = thread.join();
        }
    }
}

impl EngineHandle {
    /// Hands a request in. Its events come on the returned channel, which has room for all of them: a
    /// client that never reads holds up nobody. Dropping the receiver cancels the request.
    ///
    /// # Errors
    /// `ResourceExhausted` when the queue is full or the KV pool could never hold it, `InvalidArgument` when it is
    /// longer than the context, `Unavailable` when the engine has stopped.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<Event>> {
        self.shared.admit(&request)?;
        // Scored, every token, the end.
        let (events, receiver) = mpsc::channel(request.stopping.max_new_tokens + 3);
        self.send(Command::Submit(Box::new(request), events))?;
        Ok(receiver)
    }

    /// Compiles `prefix` into KV pages now; returns once it is resident. `pinned` keeps it there for good.
    ///
    /// # Errors
    /// `ResourceExhausted` when it can never fit or the GPU has no memory left, `Internal` when the model fails on it.
    pub async fn prepare(&self, prefix: Arc<Prefix>, pinned: bool) -> Result<()> {
        let (done, ready) = oneshot::channel();
        self.send(Command::Prepare { prefix, pinned, done })?;
        ready.await.map_err(|_| stopped())?
    }

    /// The prefix is out of service: unpins it and gives its pages back once the last request is done.
    pub fn forget(&self, digest: Digest) {
        // A stopped engine has no pages to give back; a full channel leaves the prefix to eviction by age.
        let _ = self.commands.try_send(Command::Forget(digest));
    }

    /// Has the engine look whether its guest has work.
    pub fn wake(&self) {
        // A full inbox is as good a wake-up as this message.
        let _ = self.commands.try_send(Command::Wake);
    }

    /// Whether the prefix's pages are in the pool now.
    pub fn is_resident(&self, digest: Digest) -> bool {
        self.shared.is_resident(digest)
    }

    /// Figures as of the last step.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Waits for the engine to end, also by itself: its GPU was lost, or its thread panicked.
    pub async fn ended(&self) {
        self.commands.closed().await;
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.commands.is_closed()
    }

    /// Tokens in the longest sequence, prefix included.
    pub fn max_model_len(&self) -> usize {
        self.shared.max_model_len
    }

    /// Tokens that the KV pool holds.
    pub fn kv_tokens(&self) -> usize {
        self.shared.kv_tokens
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands.try_send(command).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => {
                Error::exhausted("the engine's inbox is full", Some(Duration::from_millis(100)))
            }
            mpsc::error::TrySendError::Closed(_) => stopped(),
        })
    }
}

fn stopped() -> Error {
    Error::new(Kind::Unavailable, "the engine has stopped")
}
