//! What goes into the scheduler, and the plan that comes out of it.
use crate::adapter::{Digest, InputRow, Prefix, SoftPrompt};
use crate::kv::PageId;
use std::ops::Range;
use std::sync::Arc;

/// A sequence of this engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// The limits of a step and of the queue.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// Pages of the pool.
    pub pages: usize,
    /// Rows in a step.
    pub max_batch_tokens: usize,
    /// Sequences in a step.
    pub max_sequences: usize,
    /// Sequences that may wait.
    pub max_queue: usize,
    /// Of those, sequences of one tenant.
    pub max_queue_per_tenant: usize,
    /// Reuse equal leading blocks.
    pub prefix_caching: bool,
}

/// A sequence to run.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// Whom the work is charged to.
    pub tenant: Arc<str>,
    /// What it attends to first.
    pub prefix: Option<Arc<Prefix>>,
    /// The prompt.
    pub input: Vec<InputRow>,
    /// Its virtual tokens.
    pub soft: Option<Arc<SoftPrompt>>,
    /// Whose hidden row is classified, if any.
    pub pooling: Option<Pooling>,
    /// First token whose log-probability is wanted.
    pub score_from: Option<usize>,
    /// New tokens at most; 0: scores only.
    pub max_new_tokens: usize,
}

/// Which row of a sequence is classified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The last one: it has seen all others.
    Last,
    /// The first one of an encoder. All rows see each other, so they run in one step and nothing of them is cached.
    First,
}

/// Rows of a sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The sequence.
    pub id: SequenceId,
    /// Own indices of the rows.
    pub rows: Range<usize>,
}

/// Rows of a prefix being compiled; positions within the prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixChunk {
    /// The prefix.
    pub digest: Digest,
    /// Positions of the rows.
    pub rows: Range<usize>,
}

/// What to run now.
#[derive(Debug, Default)]
pub struct Step {
    /// Prefixes whose stored K and V are to be written before anything runs.
    pub copies: Vec<Digest>,
    /// Prefixes to run.
    pub prefixes: Vec<PrefixChunk>,
    /// Sequences to run.
    pub sequences: Vec<Chunk>,
    /// Pages that changed hands: what they hold is void.
    pub fresh: Vec<PageId>,
    /// Sequences that run for the first time, or again.
    pub admitted: Vec<SequenceId>,
    /// Sequences that lost their pages.
    pub preempted: Vec<SequenceId>,
    /// Sequences that cannot be run although the pool has nobody else in it.
    pub stuck: Vec<SequenceId>,
    /// Prefixes that were asked for and do not fit although nobody runs.
    pub unfit: Vec<Digest>,
}

impl Step {
    /// Nothing to run.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty() && self.prefixes.is_empty() && self.sequences.is_empty()
    }
}

/// Counters from the start.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Counters {
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub preemptions: u64,
    pub prefix_hits: u64,
    pub prefix_misses: u64,
    pub prefix_evictions: u64,
}
