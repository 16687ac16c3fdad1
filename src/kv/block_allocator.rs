//! Who owns which page: reference counts, and blocks that stay findable by content after their last user left.
//!
//! Pure bookkeeping, no tensor. A page is in one of three states:
//!
//! | state | references | findable by hash |
//! |---|---|---|
//! | used | 1 or more | if sealed |
//! | cached | 0 | yes; the least recently used one is recycled when pages run out |
//! | free | 0 | no |
use super::PageId;
use crate::adapter::{Digest, InputRow};
use std::collections::{BTreeMap, HashMap};

/// Content of a full block: the hash of its parent's hash and its tokens; the first one's parent is the adapter's digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash(pub [u8; 32]);

impl BlockHash {
    /// Start of a chain: nothing but the prefix (none: the bare base), and the virtual tokens that its blocks may name.
    pub fn root(prefix: Option<Digest>, soft: Option<Digest>) -> Self {
        let prefix = prefix.map_or([0; 32], |d| d.0);
        let Some(soft) = soft else { return BlockHash(prefix) };
        BlockHash(*blake3::Hasher::new().update(b"soft").update(&prefix).update(&soft.0).finalize().as_bytes())
    }

    /// The block that follows this one with `rows`.
    pub fn child(self, rows: &[InputRow]) -> Self {
        let mut h = blake3::Hasher::new();
        h.update(&self.0);
        for row in rows {
            match row {
                InputRow::Token(id) => h.update(b"t").update(&id.to_le_bytes()),
                InputRow::Soft(i) => h.update(b"s").update(&i.to_le_bytes()),
            };
        }
        BlockHash(*h.finalize().as_bytes())
    }
}

#[derive(Clone, Debug, Default)]
struct Page {
    references: u32,
    hash: Option<BlockHash>,
    /// When its last user left, while cached: its key in `cached`.
    released_at: u64,
}

/// The pages of one pool.
#[derive(Debug)]
pub struct BlockAllocator {
    pages: Vec<Page>,
    free: Vec<PageId>,
    /// Cached pages by the time their last user left: the first is recycled first.
    cached: BTreeMap<u64, PageId>,
    by_hash: HashMap<BlockHash, PageId>,
    clock: u64,
}

impl BlockAllocator {
    /// All of `pages` free.
    pub fn new(pages: usize) -> Self {
        BlockAllocator {
            pages: vec![Page::default(); pages],
            // The last is taken first: low ids come first.
            free: (0..pages as u32).rev().map(PageId).collect(),
            cached: BTreeMap::new(),
            by_hash: HashMap::new(),
            clock: 0,
        }
    }

    /// Pages in all.
    pub fn total(&self) -> usize {
        self.pages.len()
    }

    /// Pages that [`BlockAllocator::allocate`] can give: free and cached ones.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// A page with one reference; `None` if all are used.
    pub fn allocate(&mut self) -> Option<PageId> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => {
                let (_, page) = self.cached.pop_first()?;
                if let Some(hash) = self.pages[page.0 as usize].hash.take() {
                    self.by_hash.remove(&hash);
                }
                page
            }
        };
        self.pages[page.0 as usize].references = 1;
        Some(page)
    }

    /// One more user of a used page.
    pub fn retain(&mut self, page: PageId) {
        let entry = &mut self.pages[page.0 as usize];
        debug_assert!(entry.references > 0, "{page:?} is not in use");
        entry.references += 1;
    }

    /// One user less. A sealed page stays findable until it is recycled.
    pub fn release(&mut self, page: PageId) {
        let entry = &mut self.pages[page.0 as usize];
        assert!(entry.references > 0, "{page:?} released twice");
        entry.references -= 1;
        if entry.references > 0 {
            return;
        }
        if entry.hash.is_some() {
            self.clock += 1;
            entry.released_at = self.clock;
            self.cached.insert(self.clock, page);
        } else {
            self.free.push(page);
        }
    }

    /// Makes a full, used page findable. If its content is known already, the older page keeps the name.
    pub fn seal(&mut self, page: PageId, hash: BlockHash) {
        let entry = &mut self.pages[page.0 as usize];
        if entry.hash.is_none() && !self.by_hash.contains_key(&hash) {
            entry.hash = Some(hash);
            self.by_hash.insert(hash, page);
        }
    }

    /// The page of that content, with one more reference.
    pub fn find(&mut self, hash: &BlockHash) -> Option<PageId> {
        let page = *self.by_hash.get(hash)?;
        let entry = &mut self.pages[page.0 as usize];
        if entry.references == 0 {
            self.cached.remove(&entry.released_at);
        }
        entry.references += 1;
        Some(page)
    }

    /// References of a page.
    pub fn references(&self, page: PageId) -> u32 {
        self.pages[page.0 as usize].references
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_cached_block_comes_back_until_it_is_recycled() {
        let mut a = BlockAllocator::new(2);
        let hash = BlockHash::root(None, None).child(&[InputRow::Token(1), InputRow::Token(2)]);
        let page = a.allocate().unwrap();
        a.seal(page, hash);
        a.release(page);
        assert_eq!((a.available(), a.find(&hash)), (2, Some(page)));
        a.release(page);
        let other = a.allocate().unwrap();
        assert_ne!(other, page, "free pages go before cached ones");
        assert_eq!(a.allocate(), Some(page));
        assert_eq!((a.find(&hash), a.allocate()), (None, None));
    }

    #[test]
    fn chains_differ_by_root_and_by_order() {
        let d = |b| Some(Digest([b; 32]));
        let of = |prefix, soft, rows: &[InputRow]| {
            rows.iter().fold(BlockHash::root(prefix, soft), |h, row| h.child(&[*row]))
        };
        let (one, two) = (InputRow::Token(1), InputRow::Token(2));
        let all = [
            of(None, None, &[one]),
            of(d(1), None, &[one]),
            of(d(2), None, &[one]),
            of(d(1), None, &[one, two]),
            of(d(1), None, &[two, one]),
            of(d(1), None, &[InputRow::Soft(1)]),
            of(d(1), d(2), &[InputRow::Soft(1)]),
            of(d(1), d(3), &[InputRow::Soft(1)]),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b));
        }
    }

    proptest! {
        /// Against a plain model: no page is given twice, none is lost, `find` gives only what was sealed there.
        #[test]
        fn books_balance(ops in prop::collection::vec((0u8..5, any::<u8>()), 1..400), pages in 1usize..12) {
            let mut a = BlockAllocator::new(pages);
            let mut held: Vec<PageId> = Vec::new();
            let mut content: HashMap<PageId, BlockHash> = HashMap::new();
            for (op, x) in ops {
                let pick = |held: &Vec<PageId>| (!held.is_empty()).then(|| x as usize % held.len());
                let hash = BlockHash::root(None, None).child(&[InputRow::Token(u32::from(x) % 7)]);
                match op {
                    0 => match a.allocate() {
                        Some(page) => {
                            prop_assert!(!held.contains(&page));
                            content.remove(&page);
                            held.push(page);
                        }
                        None => prop_assert_eq!(a.available(), 0),
                    },
                    1 => if let Some(i) = pick(&held) { a.release(held.swap_remove(i)); },
                    2 => if let Some(i) = pick(&held) { a.retain(held[i]); held.push(held[i]); },
                    3 => if let Some(i) = pick(&held) {
                        let known = content.contains_key(&held[i]) || content.values().any(|h| *h == hash);
                        a.seal(held[i], hash);
                        if !known { content.insert(held[i], hash); }
                    },
                    _ => {
                        let found = a.find(&hash);
                        prop_assert_eq!(found, content.iter().find(|(_, h)| **h == hash).map(|(p, _)| *p));
                        held.extend(found);
                    }
                }
                for p in 0..pages as u32 {
                    let users = held.iter().filter(|h| h.0 == p).count();
                    prop_assert_eq!(a.references(PageId(p)) as usize, users);
                }
                let used: std::collections::HashSet<_> = held.iter().collect();
                prop_assert_eq!(a.available(), pages - used.len());
            }
        }
    }
}
