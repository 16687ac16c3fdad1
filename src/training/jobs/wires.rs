//! What joins the jobs to the thread that trains and to the store.
use crate::adapter::AdapterId;
use crate::adapter::peft::SavedAdapter;
use crate::error::{Error, Result};
use crate::training::trainer::{Event, Order};
use std::sync::mpsc::{Receiver, Sender};

/// A finished adapter on its way into the store.
pub struct Trained {
    /// Its name.
    pub adapter_id: AdapterId,
    /// PEFT's files.
    pub files: SavedAdapter,
    /// Text of the `task.toml`; empty: none.
    pub card: String,
    /// Put it in service.
    pub load: bool,
    /// Keep it in the KV pool.
    pub pinned: bool,
}

/// Where a finished adapter is.
#[derive(Debug)]
pub enum Published {
    /// In service, as this generation.
    Serving(u64),
    /// In the store, as was asked for.
    Stored,
    /// In the store alone, as there was no room to serve it.
    Waiting(Error),
}

/// Puts a finished adapter into the store and, if asked, in service. Blocks.
pub type Publish = Box<dyn Fn(Trained) -> Result<Published> + Send>;

/// What joins the jobs to the thread that trains and to the store.
pub struct Wires {
    /// To the trainer.
    pub orders: Sender<Order>,
    /// What the trainer speaks into.
    pub clerk: Sender<Event>,
    /// The other end of it.
    pub events: Receiver<Event>,
    /// Has the trainer look at its orders.
    pub wake: Box<dyn Fn() + Send + Sync>,
    /// Puts results into the store.
    pub publish: Publish,
}
