//! What runs in the next step. Pure bookkeeping over tokens, pages and queues: no tensor in sight.
//!
//! A step takes, under one token budget: a row for every decoding sequence, then chunks of prompts at work, then
//! chunks of prefixes being compiled, then new sequences by [`FairQueue`]. When pages run out, prefixes that nobody
//! uses leave first, then the youngest sequence is preempted: its pages go back and it will be computed again.
mod entry;
mod plan;
mod step;

pub use entry::Entry;
pub use step::{Chunk, Counters, NewSequence, Pooling, PrefixChunk, SchedulerConfig, SequenceId, Step};

use super::fair_queue::FairQueue;
use super::residency::Residency;
use crate::adapter::{Digest, Prefix};
use crate::error::{Error, Result};
use crate::kv::block_allocator::BlockAllocator;
use crate::kv::{PAGE_TOKENS, pages_for};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// The state of all sequences, pages and prefixes.
pub struct Scheduler {
    config: SchedulerConfig,
    pages: BlockAllocator,
    prefixes: Residency,
    /// Prefixes at work, oldest first.
    compiling: Vec<Digest>,
    /// Prefixes asked for by [`Scheduler::prepare`].
    wanted: VecDeque<Arc<Prefix>>,
    queue: FairQueue<SequenceId>,
    sequences: HashMap<SequenceId, Entry>,
    /// In the order of their admission.
    running: Vec<SequenceId>,
    next_id: u64,
    counters: Counters,
}

impl Scheduler {
    /// An empty one.
    pub fn new(config: SchedulerConfig) -> Self {
        Scheduler {
            pages: BlockAllocator::new(config.pages),
            prefixes: Residency::default(),
            compiling: Vec::new(),
            wanted: VecDeque::new(),
            queue: FairQueue::new(),
            sequences: HashMap::new(),
            running: Vec::new(),
            next_id: 0,
            counters: Counters::default(),
            config,
        }
    }

    /// Takes a sequence in.
    ///
    /// # Errors
    /// `ResourceExhausted` when the queue is full, or when it could not run even alone.
    pub fn submit(&mut self, new: NewSequence) -> Result<SequenceId> {
        let retry = Some(Duration::from_millis(500));
        let waiting = self.queue.len();
        if waiting >= self.config.max_queue {
            return Err(Error::exhausted(format!("{waiting} sequences wait already, the limit"), retry));
        }
        let mine = self.queue.len_of(&new.tenant);
        if mine >= self.config.max_queue_per_tenant {
            let text = format!("{mine} sequences of adapter `{}` wait already, the limit for one adapter", new.tenant);
            return Err(Error::exhausted(text, retry));
        }
        let prefix = new.prefix.as_ref();
        let need = pages_for(new.input.len() + new.max_new_tokens) + prefix.map_or(0, |p| pages_for(p.len()));
        let pinned = self.prefixes.pinned_pages_besides(prefix.map(|p| p.digest));
        if need + pinned > self.config.pages {
            let total = self.config.pages;
            return Err(Error::exhausted(
                format!("the request needs {need} KV pages, the pool has {total} and {pinned} are pinned"),
                None,
            ));
        }
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.queue.push(&new.tenant, id);
        self.sequences.insert(id, Entry::new(new));
        Ok(id)
    }

    /// Compiles a prefix as soon as there is room, before new sequences.
    ///
    /// # Errors
    /// `ResourceExhausted` when it can never fit, or when `pinned` would take more than half of the pool.
    pub fn prepare(&mut self, prefix: Arc<Prefix>, pinned: bool) -> Result<()> {
        let (need, total) = (pages_for(prefix.len()), self.config.pages);
        let others = self.prefixes.pinned_pages_besides(Some(prefix.digest));
        if need + others > total {
            let text = format!("the prefix needs {need} KV pages, the pool has {total} and {others} are pinned");
            return Err(Error::exhausted(text, None));
        }
        if pinned {
            if need + others > total / 2 {
                let text = format!("pinning it would pin {} of {total} KV pages, at most half may be", need + others);
                return Err(Error::exhausted(text, None));
            }
            self.prefixes.pin(&prefix, need);
        }
        self.prefixes.recall(&prefix.digest);
        if self.prefixes.get(&prefix.digest).is_none() && self.wanted.iter().all(|w| w.digest != prefix.digest) {
            self.wanted.push_back(prefix);
        }
        Ok(())
    }

    /// A prefix is out of service: unpins it and gives its pages back if nobody uses them.
    pub fn forget(&mut self, digest: &Digest) {
        self.wanted.retain(|w| w.digest != *digest);
        if self.prefixes.forget(digest, &mut self.pages) {
            self.compiling.retain(|d| d != digest);
        }
    }

    /// Whether all positions of a prefix are in the pool.
    pub fn is_ready(&self, digest: &Digest) -> bool {
        self.prefixes.get(digest).is_some_and(|r| r.ready())
    }

    /// The prefixes in the pool.
    pub fn prefixes(&self) -> &Residency {
        &self.prefixes
    }

    /// A sequence's state.
    pub fn get(&self, id: SequenceId) -> Option<&Entry> {
        self.sequences.get(&id)
    }

    /// Sequences running, and waiting.
    pub fn load(&self) -> (usize, usize) {
        (self.running.len(), self.queue.len())
    }

    /// Whether a step could have something to do.
    pub fn has_work(&self) -> bool {
        !self.sequences.is_empty() || !self.wanted.is_empty() || !self.compiling.is_empty()
    }

    /// Pages in all, and pages that are free or hold only what can go.
    pub fn page_counts(&self) -> (usize, usize) {
        (self.pages.total(), self.pages.available())
    }

    /// Counters from the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The step ran, or was launched: its K and V are in the pool for whatever runs after it.
    pub fn complete(&mut self, step: &Step) {
        for chunk in &step.prefixes {
            if let Some(resident) = self.prefixes.get_mut(&chunk.digest) {
                resident.computed = chunk.rows.end;
            }
            if self.is_ready(&chunk.digest) {
                self.compiling.retain(|d| *d != chunk.digest);
            }
        }
        for chunk in &step.sequences {
            let Some(e) = self.sequences.get_mut(&chunk.id) else { continue };
            e.computed = chunk.rows.end;
            self.seal(chunk.id);
        }
    }

    /// A launched step chooses the sequence's next token, in `place` of the tokens on the device. The sequence goes on before it is
    /// known, and until the next step its row may be read from there.
    pub fn chosen(&mut self, id: SequenceId, place: u32) {
        self.sequences.get_mut(&id).into_iter().for_each(|e| e.chosen(place));
    }

    /// A token was sampled for a sequence, or read: the first one that was [`Self::chosen`] and not known.
    pub fn push_token(&mut self, id: SequenceId, token: u32) {
        self.sequences.get_mut(&id).into_iter().for_each(|e| e.push(token));
        self.seal(id);
    }

    /// Lets others find a sequence's full blocks whose tokens are known.
    fn seal(&mut self, id: SequenceId) {
        let Some(e) = self.sequences.get_mut(&id) else { return };
        if self.config.prefix_caching && !e.whole() {
            let full = e.computed.min(e.tokens.len()) / PAGE_TOKENS;
            e.extend_hashes(full);
            (e.sealed..full).for_each(|b| self.pages.seal(e.pages[b], e.hashes[b]));
            e.sealed = e.sealed.max(full);
        }
    }

    /// A sequence ended, for whatever reason: its pages are back.
    pub fn finish(&mut self, id: SequenceId) {
        self.release(id);
        if let Some(e) = self.sequences.remove(&id) {
            self.queue.end(&e.tenant, id);
        }
    }

    /// A prefix could not be compiled: its pages are back. The sequences that wait for it, to be ended by the caller.
    pub fn fail_prefix(&mut self, digest: &Digest) -> Vec<SequenceId> {
        self.compiling.retain(|d| d != digest);
        self.prefixes.evict(digest, &mut self.pages);
        let on_it = |e: &Entry| e.prefix.as_ref().is_some_and(|p| p.digest == *digest);
        self.sequences.iter().filter(|(_, e)| on_it(e)).map(|(id, _)| *id).collect()
    }

    /// Takes a sequence out of the batch: its pages and its hold on the prefix.
    fn release(&mut self, id: SequenceId) {
        let Some(e) = self.sequences.get_mut(&id).filter(|e| e.running) else { return };
        e.running = false;
        e.computed = 0;
        // The last first: of a chain of cached blocks the tail is recycled before the head.
        std::mem::take(&mut e.pages).into_iter().rev().for_each(|page| self.pages.release(page));
        if let Some(prefix) = &e.prefix {
            self.prefixes.release(&prefix.digest, &mut self.pages);
        }
        self.running.retain(|r| *r != id);
    }
}

#[cfg(test)]
mod tests;
