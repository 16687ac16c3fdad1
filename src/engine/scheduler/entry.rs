//! One sequence in the scheduler's books.
use super::{NewSequence, Pooling};
use crate::adapter::{InputRow, Prefix, SoftPrompt};
use crate::kv::block_allocator::BlockHash;
use crate::kv::{PAGE_TOKENS, PageId};
use std::ops::Range;
use std::sync::Arc;

/// A sequence as the scheduler sees it.
#[derive(Debug)]
pub struct Entry {
    pub(super) tenant: Arc<str>,
    pub(super) prefix: Option<Arc<Prefix>>,
    /// Prompt, then generated tokens.
    pub(super) tokens: Vec<InputRow>,
    soft: Option<Arc<SoftPrompt>>,
    pooling: Option<Pooling>,
    pub(super) prompt_len: usize,
    pub(super) score_from: Option<usize>,
    /// Tokens at most, those of the prompt counted.
    most: usize,
    /// Generated ones that nobody has read from the device yet, behind `tokens`.
    unread: usize,
    /// Where the last of them lies there.
    place: u32,
    /// Own tokens whose K and V are in `pages`, or will be when what was launched is done.
    pub(super) computed: usize,
    pub(super) pages: Vec<PageId>,
    /// Hashes of its full blocks, as far as known.
    pub(super) hashes: Vec<BlockHash>,
    /// Pages that others may find.
    pub(super) sealed: usize,
    /// Tokens charged already: what is computed again is not charged again.
    pub(super) charged: usize,
    /// Tokens found in the cache at the first admission.
    pub(super) cached: usize,
    pub(super) running: bool,
    pub(super) seen_prefix: bool,
}

impl Entry {
    pub(super) fn new(new: NewSequence) -> Self {
        let prompt_len = new.input.len();
        Entry {
            prompt_len,
            tenant: new.tenant,
            prefix: new.prefix,
            tokens: new.input,
            soft: new.soft,
            pooling: new.pooling,
            score_from: new.score_from,
            most: prompt_len + new.max_new_tokens,
            unread: 0,
            place: 0,
            computed: 0,
            pages: Vec::new(),
            hashes: Vec::new(),
            sealed: 0,
            charged: 0,
            cached: 0,
            running: false,
            seen_prefix: false,
        }
    }

    /// Tokens, read or not.
    pub(super) fn len(&self) -> usize {
        self.tokens.len() + self.unread
    }

    fn generates(&self) -> bool {
        self.len() < self.most
    }

    /// Tokens to compute before something can be sampled, or everything is scored.
    pub(super) fn goal(&self) -> usize {
        let last_counts = self.generates() || self.pooling.is_some();
        if last_counts { self.len() } else { self.len() - 1 }
    }

    /// The device chooses the next token, and puts it in `place`.
    pub(super) fn chosen(&mut self, place: u32) {
        self.unread += 1;
        self.place = place;
    }

    /// The first token that was not known is `id`.
    pub(super) fn push(&mut self, id: u32) {
        self.unread = self.unread.saturating_sub(1);
        self.tokens.push(InputRow::Token(id));
    }

    /// Where the token behind [`Self::tokens`] lies on the device, if it was chosen and not read.
    pub fn unread(&self) -> Option<u32> {
        (self.unread > 0).then_some(self.place)
    }

    /// All rows must run in one step.
    pub(super) fn whole(&self) -> bool {
        self.pooling == Some(Pooling::First)
    }

    /// Prompt and generated tokens, as far as read.
    pub fn tokens(&self) -> &[InputRow] {
        &self.tokens
    }

    /// The embeddings of its virtual tokens.
    pub fn soft(&self) -> Option<&Arc<SoftPrompt>> {
        self.soft.as_ref()
    }

    /// Own pages.
    pub fn pages(&self) -> &[PageId] {
        &self.pages
    }

    /// Its prefix.
    pub fn prefix(&self) -> Option<&Arc<Prefix>> {
        self.prefix.as_ref()
    }

    /// Whom the work is charged to.
    pub fn tenant(&self) -> &Arc<str> {
        &self.tenant
    }

    /// Prompt tokens found in the cache.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// The row of `chunk` that is classified.
    pub fn pooled(&self, chunk: &Range<usize>) -> Option<usize> {
        match self.pooling? {
            Pooling::First => Some(0),
            Pooling::Last => (chunk.end == self.len()).then(|| chunk.end - 1),
        }
    }

    /// Rows of `chunk` whose logits are scored, then whether the last row is sampled.
    pub fn logits(&self, chunk: &Range<usize>) -> (Range<usize>, bool) {
        let sample = self.generates() && chunk.end == self.len();
        // Row i predicts token i + 1.
        let scored = self.score_from.map_or(0..0, |from| {
            let (start, end) = (chunk.start.max(from - 1), chunk.end.min(self.prompt_len - 1));
            start..end.max(start)
        });
        (scored, sample)
    }

    /// Continues the hash chain to `blocks` full blocks.
    pub(super) fn extend_hashes(&mut self, blocks: usize) {
        let soft = self.soft.as_ref().map(|s| s.digest);
        let root = || BlockHash::root(self.prefix.as_ref().map(|p| p.digest), soft);
        let mut hash = self.hashes.last().copied().unwrap_or_else(root);
        for block in self.hashes.len()..blocks {
            hash = hash.child(&self.tokens[block * PAGE_TOKENS..(block + 1) * PAGE_TOKENS]);
            self.hashes.push(hash);
        }
    }
}
