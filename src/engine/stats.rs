//! Figures of the engine, for `GetStats` and `/metrics`.

use std::time::Duration;

/// A snapshot after a step. Counters grow from the start of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences in the batch.
    pub running: usize,
    /// Sequences that wait.
    pub waiting: usize,
    /// Pages of the KV pool.
    pub kv_pages_total: usize,
    /// Pages free, or holding cached blocks that nobody uses.
    pub kv_pages_available: usize,
    /// Prefixes whose pages are in the pool.
    pub prefixes_resident: usize,
    /// Steps.
    pub steps: u64,
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Prompt tokens found in the cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Preemptions.
    pub preemptions: u64,
    /// Sequences that found their prefix resident.
    pub prefix_hits: u64,
    /// Sequences whose prefix had to be compiled.
    pub prefix_misses: u64,
    /// Prefixes that left the pool to make room.
    pub prefix_evictions: u64,
    /// Time of all steps, from taking in what came to handing out tokens.
    pub step_time: Duration,
    /// Of that, what the forward pass took, logits included. On a GPU: until all of it was queued.
    pub forward_time: Duration,
}
