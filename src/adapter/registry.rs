//! The loaded adapters by id: which generation serves, which are on their way in or out.
//!
//! A new load of an id runs beside the one that serves and takes its place when it is ready; a failed one
//! changes nothing for requests. Whoever holds an `Arc<Adapter>` keeps that generation until done.
//!
//! ```text
//! begin_load -> LOADING -> publish -> READY -> unload -> UNLOADING -> (last request ends) gone
//!                      \-> fail ---> FAILED (an older READY keeps serving)
//! ```
mod stacks;
mod status;
mod ticket;

use super::{Adapter, AdapterId, Generation, Prefix};
use crate::error::{Error, Result};
use dashmap::DashMap;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::SystemTime;

pub use status::{Details, State, Status};
pub use ticket::Ticket;

/// The table. Share it by [`Arc`]; no call waits for a load or a request.
#[derive(Debug)]
pub struct Registry {
    entries: DashMap<AdapterId, Entry>,
    /// The newest generation given out.
    generation: AtomicU64,
    max_adapters: usize,
    /// Held while a new id is counted against `max_adapters`.
    admission: Mutex<()>,
    stacks: stacks::Stacks,
}

/// All generations of one id that are known. Never all empty while in the table.
#[derive(Debug, Default)]
struct Entry {
    loading: BTreeSet<Generation>,
    ready: Option<Ready>,
    /// The newest load that failed, dropped once a newer one is ready.
    failed: Option<(Generation, Error)>,
    /// Unloaded while requests still held them.
    leaving: Vec<Weak<Adapter>>,
}

#[derive(Debug)]
struct Ready {
    adapter: Arc<Adapter>,
    since: SystemTime,
}

impl Entry {
    fn prune(&mut self) {
        self.leaving.retain(|adapter| adapter.strong_count() > 0);
    }

    /// Whether nothing but (perhaps) a failure is left.
    fn is_idle(&self) -> bool {
        self.loading.is_empty() && self.ready.is_none() && self.leaving.is_empty()
    }
}

impl Registry {
    /// A table of at most `max_adapters` ids. Ids whose only load failed do not count.
    pub fn new(max_adapters: usize) -> Arc<Self> {
        Arc::new(Registry {
            entries: DashMap::new(),
            generation: AtomicU64::new(0),
            max_adapters,
            admission: Mutex::new(()),
            stacks: stacks::Stacks::default(),
        })
    }

    /// Starts a load of `id`: a new generation, LOADING until the ticket is used up. A generation that is
    /// READY goes on serving.
    ///
    /// # Errors
    /// `ResourceExhausted` naming the limit, for an id that is not yet in a full table.
    pub fn begin_load(self: &Arc<Self>, id: &AdapterId) -> Result<Ticket> {
        let _one = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        if self.entries.get(id).is_none_or(|entry| entry.is_idle()) {
            self.admit(id)?;
        }
        let generation = Generation(self.generation.fetch_add(1, Ordering::Relaxed) + 1);
        self.entries.entry(id.clone()).or_default().loading.insert(generation);
        tracing::info!(%id, generation = generation.0, "adapter loading");
        Ok(Ticket::new(self.clone(), id.clone(), generation))
    }

    /// Room for one more id; the oldest failure is forgotten where failures alone would fill the table.
    fn admit(&self, id: &AdapterId) -> Result<()> {
        let (mut busy, mut failures) = (0, Vec::new());
        for mut entry in self.entries.iter_mut() {
            entry.prune();
            match &entry.failed {
                _ if !entry.is_idle() => busy += 1,
                Some((generation, _)) => failures.push((*generation, entry.key().clone())),
                None => {}
            }
        }
        if busy >= self.max_adapters {
            let max = self.max_adapters;
            return Err(Error::exhausted(
                format!("adapter `{id}`: {busy} adapters are loaded, the limit is {max}; unload one first"),
                None,
            ));
        }
        self.entries.retain(|_, entry| !entry.is_idle() || entry.failed.is_some());
        if failures.len() >= self.max_adapters
            && let Some((_, oldest)) = failures.into_iter().filter(|(_, other)| other != id).min()
        {
            self.entries.remove_if(&oldest, |_, entry| entry.is_idle());
        }
        Ok(())
    }

    /// The generation that serves `id` now. Hold it until the request ends.
    ///
    /// # Errors
    /// `NotFound` naming ids that look alike; `Unavailable` while the first load runs;
    /// `FailedPrecondition` with the reason if the last load failed and none serves.
    pub fn resolve(&self, id: &AdapterId) -> Result<Arc<Adapter>> {
        if let Some(entry) = self.entries.get(id) {
            if let Some(ready) = &entry.ready {
                return Ok(ready.adapter.clone());
            }
            if !entry.loading.is_empty() {
                return Err(Error::unavailable(format!("adapter `{id}` is still loading")));
            }
            if let Some((generation, e)) = &entry.failed {
                let generation = generation.0;
                return Err(Error::precondition(format!(
                    "adapter `{id}` failed to load (generation {generation}): {e}"
                )));
            }
        }
        Err(self.unknown(id)) // after the guard: this walks the table
    }

    /// The prefixes one after the other ([`Prefix::stack`]). Equal lists share one copy while someone holds it.
    pub fn stack(&self, parts: &[Arc<Prefix>]) -> Result<Arc<Prefix>> {
        self.stacks.get(parts)
    }

    /// Stops serving `id`; requests that hold it run on. Without `generation`, loads of it still under way
    /// are given up too. The adapter returned counts as a user as long as the caller keeps it.
    ///
    /// # Errors
    /// `NotFound`, where a record of a failed load is then forgotten; `Unavailable` while the first load
    /// runs; `FailedPrecondition` naming both if another generation than `generation` serves.
    pub fn unload(&self, id: &AdapterId, generation: Option<Generation>) -> Result<Arc<Adapter>> {
        let adapter = match self.entries.get_mut(id) {
            None => None,
            Some(mut entry) => {
                entry.prune();
                match (&entry.ready, generation) {
                    (Some(ready), Some(asked)) if ready.adapter.generation != asked => {
                        let (serving, asked) = (ready.adapter.generation.0, asked.0);
                        return Err(Error::precondition(format!(
                            "adapter `{id}` serves generation {serving}, not {asked}; nothing was unloaded"
                        )));
                    }
                    (None, _) if !entry.loading.is_empty() => {
                        return Err(Error::unavailable(format!("adapter `{id}` is still loading")));
                    }
                    _ => {}
                }
                if generation.is_none() {
                    entry.loading.clear();
                }
                entry.failed = None;
                let adapter = entry.ready.take().map(|ready| ready.adapter);
                entry.leaving.extend(adapter.iter().map(Arc::downgrade));
                adapter
            }
        };
        if let Some(adapter) = adapter {
            tracing::info!(%id, generation = adapter.generation.0, "adapter unloaded");
            return Ok(adapter);
        }
        self.entries.remove_if(id, |_, entry| entry.is_idle() && entry.failed.is_none());
        Err(self.unknown(id))
    }

    /// What is known of `id`.
    ///
    /// # Errors
    /// `NotFound` naming ids that look alike.
    pub fn get(&self, id: &AdapterId) -> Result<Status> {
        let status = self.entries.get(id).and_then(|entry| Status::of(id, &entry));
        status.ok_or_else(|| self.unknown(id))
    }

    /// Every id, sorted.
    pub fn list(&self) -> Vec<Status> {
        self.entries.retain(|_, entry| {
            entry.prune();
            !entry.is_idle() || entry.failed.is_some()
        });
        let mut all: Vec<_> = self.entries.iter().filter_map(|e| Status::of(e.key(), e.value())).collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// "not loaded", with the five loaded ids that share the longest beginning with `id`.
    fn unknown(&self, id: &AdapterId) -> Error {
        let shared = |other: &AdapterId| {
            let pairs = id.as_str().bytes().zip(other.as_str().bytes());
            pairs.take_while(|(a, b)| a.eq_ignore_ascii_case(b)).count()
        };
        let ready = self.entries.iter().filter(|entry| entry.ready.is_some());
        let mut near: Vec<_> = ready.map(|entry| entry.key().clone()).collect();
        near.sort_by(|a, b| shared(b).cmp(&shared(a)).then_with(|| a.cmp(b)));
        near.truncate(5);
        let near: Vec<_> = near.iter().map(|id| format!("`{id}`")).collect();
        Error::not_found(match near.is_empty() {
            true => format!("adapter `{id}` is not loaded; none is"),
            false => format!("adapter `{id}` is not loaded; loaded are {}", near.join(", ")),
        })
    }
}

#[cfg(test)]
mod tests;
