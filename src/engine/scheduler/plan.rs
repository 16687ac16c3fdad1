//! How a step is planned: who goes on, who starts, who makes room.
use super::{Chunk, PrefixChunk, Scheduler, SequenceId, Step};
use crate::adapter::{Digest, Prefix};
use crate::kv::{PAGE_TOKENS, PageId, pages_for};
use std::sync::Arc;

/// Work of a generated token relative to a prompt token (the paper's weights 1 and 2).
const DECODE_COST: u64 = 2;

/// Where the pages of a prefix may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    /// Free and cached pages.
    Free,
    /// Those, and the pages of prefixes that nobody uses.
    Evict,
}

impl Scheduler {
    /// Plans the next step. What it plans must be run, then [`Scheduler::complete`]d or failed.
    pub fn schedule(&mut self) -> Step {
        let mut step = Step::default();
        let mut budget = self.config.max_batch_tokens;
        let decoding = |s: &Self, id: &SequenceId| {
            let e = &s.sequences[id];
            e.goal() - e.computed == 1
        };
        let (decode, prefill): (Vec<_>, Vec<_>) = self.running.clone().into_iter().partition(|id| decoding(self, id));
        for id in decode.into_iter().chain(prefill) {
            self.continue_sequence(id, &mut budget, &mut step);
        }
        for digest in self.compiling.clone() {
            self.continue_prefix(digest, &mut budget, &mut step);
        }
        while let Some(prefix) = self.wanted.front().cloned() {
            if !self.bring(&prefix, Room::Evict, &mut budget, &mut step) {
                // Pins that came after it was asked for may have taken its room for good.
                if !self.alone() {
                    break;
                }
                step.unfit.push(prefix.digest);
            }
            self.wanted.pop_front();
        }
        self.admit(&mut budget, &mut step);
        step
    }

    /// Rows of a running sequence; preempts younger ones, or itself, if pages run out.
    fn continue_sequence(&mut self, id: SequenceId, budget: &mut usize, step: &mut Step) {
        loop {
            // It may have been preempted for an older one.
            let Some(e) = self.sequences.get(&id).filter(|e| e.running) else { return };
            let end = e.goal().min(e.computed + *budget);
            if end == e.computed || e.whole() && end < e.goal() {
                return;
            }
            if self.grow(id, end, step) {
                return self.run(id, end, budget, step);
            }
            // One whose last token is under way gives its pages back with the next step.
            let ends = |v: &SequenceId| self.sequences[v].goal() == self.sequences[v].computed;
            if self.running.iter().any(|v| *v != id && ends(v)) {
                return;
            }
            let planned = |v: &SequenceId| step.sequences.iter().any(|c| c.id == *v);
            let victim = self.running.iter().rev().find(|v| **v != id && !planned(v)).copied();
            if let Some(victim) = victim {
                self.preempt(victim, step);
            } else if let Some(digest) = self.compiling.pop() {
                self.abandon(digest, step);
            } else {
                self.preempt(id, step);
                if self.running.is_empty() {
                    step.stuck.push(id);
                }
                return;
            }
        }
    }

    fn continue_prefix(&mut self, digest: Digest, budget: &mut usize, step: &mut Step) {
        let Some(resident) = self.prefixes.get(&digest) else { return };
        let rows = resident.computed..resident.prefix.len().min(resident.computed + *budget);
        if !rows.is_empty() {
            *budget -= rows.len();
            step.prefixes.push(PrefixChunk { digest, rows });
        }
    }

    /// Makes a prefix resident or puts it to work; `false` if there is no room now.
    fn bring(&mut self, prefix: &Arc<Prefix>, room: Room, budget: &mut usize, step: &mut Step) -> bool {
        if self.prefixes.get(&prefix.digest).is_some() {
            return true;
        }
        let need = pages_for(prefix.len());
        let evictable = if room == Room::Evict { self.prefixes.evictable_pages() } else { 0 };
        if self.pages.available() + evictable < need {
            return false;
        }
        let pages: Vec<PageId> = (0..need).map_while(|_| self.allocate(step)).collect();
        self.prefixes.insert(prefix.clone(), pages);
        if prefix.kv.is_some() {
            step.copies.push(prefix.digest);
        }
        if !prefix.rows.is_empty() {
            self.compiling.push(prefix.digest);
            self.continue_prefix(prefix.digest, budget, step);
        }
        true
    }

    /// A prefix at work gives its pages back; whoever wants it will start it again.
    fn abandon(&mut self, digest: Digest, step: &mut Step) {
        step.prefixes.retain(|c| c.digest != digest);
        step.copies.retain(|d| *d != digest);
        if let Some(resident) = self.prefixes.get(&digest) {
            // It was asked for, so it stays asked for.
            self.wanted.push_back(resident.prefix.clone());
        }
        self.prefixes.evict(&digest, &mut self.pages);
    }

    /// New sequences, the least served tenant first.
    fn admit(&mut self, budget: &mut usize, step: &mut Step) {
        while *budget > 0 && self.running.len() < self.config.max_sequences {
            let mut progress = false;
            let mut room = Room::Evict;
            for (tenant, id) in self.queue.heads() {
                let prefix = self.sequences[&id].prefix.clone();
                if let Some(prefix) = &prefix {
                    let hit = self.is_ready(&prefix.digest);
                    self.count_prefix(id, hit);
                    // No room for the least served one: whoever came after it would only take more of it.
                    if !self.bring(prefix, room, budget, step) && room == Room::Evict {
                        return self.give_up_if_alone(id, step);
                    }
                    if !self.is_ready(&prefix.digest) {
                        // Later ones may get ready in what is free, not at the cost of those before them.
                        room = Room::Free;
                        continue;
                    }
                }
                let e = &self.sequences[&id];
                // What must run whole waits for a step that has room for it; an empty one always has.
                let short = e.whole() && e.goal() > *budget && *budget < self.config.max_batch_tokens;
                if *budget == 0 || short {
                    return;
                }
                if !self.start(id, step) {
                    return self.give_up_if_alone(id, step);
                }
                self.queue.pop(&tenant);
                let e = &self.sequences[&id];
                let end = if e.whole() { e.goal() } else { e.goal().min(e.computed + *budget) };
                if self.grow(id, end, step) {
                    self.run(id, end, budget, step);
                }
                // Counters have changed: ask again who is next.
                progress = true;
                break;
            }
            if !progress {
                return;
            }
        }
    }

    /// Nobody holds pages that will come back.
    fn alone(&self) -> bool {
        self.running.is_empty() && self.compiling.is_empty()
    }

    fn give_up_if_alone(&self, id: SequenceId, step: &mut Step) {
        if self.alone() {
            step.stuck.push(id);
        }
    }

    /// Finds cached blocks and checks that the rest of the prompt fits; `false` if it does not now.
    fn start(&mut self, id: SequenceId, step: &mut Step) -> bool {
        let digest = self.sequences[&id].prefix.as_ref().map(|p| p.digest);
        // In use from here on: making room must not evict it.
        if let Some(digest) = &digest {
            self.prefixes.retain(digest);
        }
        let Some(e) = self.sequences.get_mut(&id) else { return false };
        let mut found = Vec::new();
        if self.config.prefix_caching && !e.whole() {
            // The last token is always computed: its logits are wanted. So are those that are scored.
            let last = e.goal().saturating_sub(1).min(e.score_from.map_or(usize::MAX, |from| from - 1));
            e.extend_hashes(last / PAGE_TOKENS);
            found = e.hashes[..last / PAGE_TOKENS].iter().map_while(|h| self.pages.find(h)).collect();
        }
        let need = pages_for(e.len()) - found.len();
        if self.pages.available() + self.prefixes.evictable_pages() < need {
            found.into_iter().for_each(|page| self.pages.release(page));
            if let Some(digest) = &digest {
                self.prefixes.release(digest, &mut self.pages);
            }
            return false;
        }
        (e.computed, e.sealed) = (found.len() * PAGE_TOKENS, found.len());
        e.pages = found;
        e.running = true;
        if e.charged == 0 {
            e.cached = e.computed;
            e.charged = e.computed;
            self.counters.cached_tokens += e.computed as u64;
        }
        self.running.push(id);
        step.admitted.push(id);
        true
    }

    /// Pages for own tokens up to `end`; `false` if there are not enough.
    fn grow(&mut self, id: SequenceId, end: usize, step: &mut Step) -> bool {
        while self.sequences[&id].pages.len() < pages_for(end) {
            let Some(page) = self.allocate(step) else { return false };
            if let Some(e) = self.sequences.get_mut(&id) {
                e.pages.push(page);
            }
        }
        true
    }

    /// A page, if need be from a prefix that nobody uses.
    fn allocate(&mut self, step: &mut Step) -> Option<PageId> {
        loop {
            if let Some(page) = self.pages.allocate() {
                step.fresh.push(page);
                return Some(page);
            }
            let evicted = self.prefixes.evict_oldest(&mut self.pages)?;
            step.copies.retain(|d| *d != evicted);
            self.counters.prefix_evictions += 1;
        }
    }

    /// Plans rows up to `end` and charges what is computed for the first time.
    fn run(&mut self, id: SequenceId, end: usize, budget: &mut usize, step: &mut Step) {
        let Some(e) = self.sequences.get_mut(&id) else { return };
        let rows = e.computed..end;
        let new = end.saturating_sub(e.charged.max(rows.start));
        let prompt = e.prompt_len.min(end).saturating_sub(e.charged.max(rows.start));
        e.charged = e.charged.max(end);
        self.counters.prompt_tokens += prompt as u64;
        self.queue.charge(&e.tenant, prompt as u64 + (new - prompt) as u64 * DECODE_COST);
        *budget = budget.saturating_sub(rows.len());
        step.sequences.push(Chunk { id, rows });
    }

    fn preempt(&mut self, id: SequenceId, step: &mut Step) {
        self.release(id);
        self.counters.preemptions += 1;
        let tenant = self.sequences[&id].tenant.clone();
        self.queue.push_front(&tenant, id);
        step.admitted.retain(|a| *a != id);
        step.preempted.push(id);
    }

    fn count_prefix(&mut self, id: SequenceId, hit: bool) {
        let Some(e) = self.sequences.get_mut(&id).filter(|e| !e.seen_prefix) else { return };
        e.seen_prefix = true;
        let counter = if hit { &mut self.counters.prefix_hits } else { &mut self.counters.prefix_misses };
        *counter += 1;
    }
}
