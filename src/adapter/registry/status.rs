//! What the registry tells about an id: a copy, so that looking at an adapter does not keep it loaded.
use super::Entry;
use crate::adapter::{Adapter, AdapterId, Digest, Generation, Method};
use std::sync::Arc;
use std::time::SystemTime;

/// Where an id stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// A load newer than what serves is under way; [`Status::serving`] tells if requests are served.
    Loading,
    /// Requests are served.
    Ready,
    /// The last load failed and nothing serves.
    Failed,
    /// Unloaded; requests that began before still run.
    Unloading,
}

/// One id.
#[derive(Clone, Debug)]
pub struct Status {
    /// The name requests use.
    pub id: AdapterId,
    /// Where it stands.
    pub state: State,
    /// The generation that `state` is about.
    pub generation: Generation,
    /// The adapter that requests get now, or, while UNLOADING, that they still hold.
    pub serving: Option<Details>,
    /// Why the newest load failed; also beside an older generation that serves.
    pub error: Option<String>,
    /// When what serves became ready.
    pub loaded_at: Option<SystemTime>,
    /// Holders (running requests) of every generation of `serving` or older that is still counted.
    pub users: usize,
}

/// Facts of one loaded generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Details {
    /// Which load.
    pub generation: Generation,
    /// The card's description.
    pub description: String,
    /// How it was made.
    pub method: Method,
    /// Key of its pages; `None` without a prefix.
    pub digest: Option<Digest>,
    /// Positions of its prefix.
    pub prefix_len: usize,
    /// PEFT's `num_virtual_tokens`.
    pub num_virtual_tokens: usize,
    /// Bytes of its prefix and virtual tokens on the host.
    pub bytes: usize,
}

impl From<&Adapter> for Details {
    fn from(adapter: &Adapter) -> Self {
        let prefix = adapter.prefix.as_deref();
        Details {
            generation: adapter.generation,
            description: adapter.card.description.clone(),
            method: adapter.method,
            digest: prefix.map(|p| p.digest),
            prefix_len: prefix.map_or(0, |p| p.len()),
            num_virtual_tokens: adapter.num_virtual_tokens,
            bytes: prefix.map_or(0, |p| p.bytes()) + adapter.soft.as_ref().map_or(0, |s| 4 * s.rows.len()),
        }
    }
}

impl Status {
    /// `None` for an entry in which nothing is left.
    pub(super) fn of(id: &AdapterId, entry: &Entry) -> Option<Status> {
        // Counted before any is upgraded below. The table's own hold on the ready one is not a user.
        let leaving_users: usize = entry.leaving.iter().map(|weak| weak.strong_count()).sum();
        let ready_users = entry.ready.as_ref().map_or(0, |r| Arc::strong_count(&r.adapter) - 1);
        let ready = entry.ready.as_ref().map(|r| Details::from(&*r.adapter));
        let leaving = || entry.leaving.iter().rev().find_map(|weak| weak.upgrade());
        let newest_load = entry.loading.last().copied();
        let (state, generation, serving) = match (newest_load, ready) {
            (Some(load), ready) if ready.as_ref().is_none_or(|r| r.generation < load) => (State::Loading, load, ready),
            (_, Some(ready)) => (State::Ready, ready.generation, Some(ready)),
            (_, None) => match (&entry.failed, leaving()) {
                (Some((failed, _)), _) => (State::Failed, *failed, None),
                (None, Some(adapter)) => (State::Unloading, adapter.generation, Some(Details::from(&*adapter))),
                (None, None) => return None,
            },
        };
        Some(Status {
            id: id.clone(),
            state,
            generation,
            serving,
            error: entry.failed.as_ref().map(|(_, e)| e.to_string()),
            loaded_at: entry.ready.as_ref().map(|r| r.since),
            users: ready_users + leaving_users,
        })
    }
}
