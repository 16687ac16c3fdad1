//! Which prefixes are in the pool. An entry is one content digest: adapters of equal content share it.
use crate::adapter::{Digest, Prefix};
use crate::kv::PageId;
use crate::kv::block_allocator::BlockAllocator;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// A prefix in the pool, compiled or on its way.
#[derive(Debug)]
pub struct Resident {
    /// Its content.
    pub prefix: Arc<Prefix>,
    /// Pages of all its positions, held until it is evicted.
    pub pages: Vec<PageId>,
    /// Positions whose K and V are there. Stored rows count as soon as their copy is planned.
    pub computed: usize,
    /// Sequences that run on it.
    pub users: usize,
    last_used: u64,
}

impl Resident {
    /// All positions are there.
    pub fn ready(&self) -> bool {
        self.computed == self.prefix.len()
    }
}

/// The prefixes in the pool, and those that must stay.
#[derive(Debug, Default)]
pub struct Residency {
    entries: HashMap<Digest, Resident>,
    /// Digest -> pages of prefixes that must stay, resident or not yet.
    pinned: HashMap<Digest, usize>,
    /// Out of service: they leave with their last user.
    forgotten: HashSet<Digest>,
    clock: u64,
}

impl Residency {
    /// The entry of a digest.
    pub fn get(&self, digest: &Digest) -> Option<&Resident> {
        self.entries.get(digest)
    }

    /// The entry of a digest.
    pub fn get_mut(&mut self, digest: &Digest) -> Option<&mut Resident> {
        self.entries.get_mut(digest)
    }

    /// Puts a prefix in: its stored rows are to be copied now, its input rows to be run.
    pub fn insert(&mut self, prefix: Arc<Prefix>, pages: Vec<PageId>) {
        self.clock += 1;
        let entry = Resident { computed: prefix.kv_len(), users: 0, last_used: self.clock, pages, prefix };
        self.entries.insert(entry.prefix.digest, entry);
    }

    /// A sequence starts on a prefix.
    pub fn retain(&mut self, digest: &Digest) {
        self.clock += 1;
        if let Some(entry) = self.entries.get_mut(digest) {
            entry.users += 1;
            entry.last_used = self.clock;
        }
    }

    /// A sequence on it ended or was preempted. A prefix that is out of service leaves with its last user.
    pub fn release(&mut self, digest: &Digest, pages: &mut BlockAllocator) {
        if let Some(entry) = self.entries.get_mut(digest) {
            entry.users -= 1;
        }
        if self.forgotten.contains(digest) {
            self.evict(digest, pages);
        }
    }

    /// It is out of service: it may leave, and does so as soon as nobody uses it. `true` if it left now.
    pub fn forget(&mut self, digest: &Digest, pages: &mut BlockAllocator) -> bool {
        self.pinned.remove(digest);
        let left = self.evict(digest, pages);
        if self.entries.contains_key(digest) {
            self.forgotten.insert(*digest);
        }
        left
    }

    /// It is in service (again).
    pub fn recall(&mut self, digest: &Digest) {
        self.forgotten.remove(digest);
    }

    /// Gives back the pages of the entry; `false` if it is not there or in use.
    pub fn evict(&mut self, digest: &Digest, pages: &mut BlockAllocator) -> bool {
        if self.entries.get(digest).is_none_or(|e| e.users > 0) {
            return false;
        }
        let entry = self.entries.remove(digest);
        self.forgotten.remove(digest);
        entry.into_iter().flat_map(|e| e.pages).for_each(|page| pages.release(page));
        true
    }

    /// Gives back the least recently used prefix that is ready, unused and not pinned.
    pub fn evict_oldest(&mut self, pages: &mut BlockAllocator) -> Option<Digest> {
        let oldest = self.evictable().min_by_key(|e| e.last_used)?.prefix.digest;
        self.evict(&oldest, pages).then_some(oldest)
    }

    /// Pages that evictions could give back.
    pub fn evictable_pages(&self) -> usize {
        self.evictable().map(|e| e.pages.len()).sum()
    }

    fn evictable(&self) -> impl Iterator<Item = &Resident> {
        self.entries.values().filter(|e| e.users == 0 && e.ready() && !self.pinned.contains_key(&e.prefix.digest))
    }

    /// It must stay from now on.
    pub fn pin(&mut self, prefix: &Prefix, pages: usize) {
        self.pinned.insert(prefix.digest, pages);
    }

    /// Pages of pinned prefixes other than `digest`.
    pub fn pinned_pages_besides(&self, digest: Option<Digest>) -> usize {
        self.pinned.iter().filter(|(d, _)| Some(**d) != digest).map(|(_, pages)| pages).sum()
    }

    /// Digests of the prefixes that are ready.
    pub fn ready(&self) -> impl Iterator<Item = Digest> {
        self.entries.values().filter(|e| e.ready()).map(|e| e.prefix.digest)
    }
}
