//! A ragged batch: rows of many sequences, packed, as plain data.
//!
//! Position p of a sequence with a prefix of P lies in its prefix pages if p < P, else in its own pages at own index
//! p - P; so a prefix need not fill its last page. Chunks of prompts, decode rows and prefixes being compiled
//! sit side by side.
use crate::kv::{PAGE_TOKENS, PageId};
use crate::ops::embed::RowSource;
use crate::ops::prefix_attention::{PackedSequence, SequenceView};
use crate::ops::sample::device::{Block, Chosen};
use candle_core::Tensor;
use std::ops::Range;

/// The rows of one step.
#[derive(Default)]
pub struct Batch {
    /// Where each row's embedding comes from.
    pub inputs: Vec<RowSource>,
    /// `[num_soft, hidden]` virtual token embeddings that `inputs` points into.
    pub soft: Vec<f32>,
    /// Position of each row, prefix counted.
    pub positions: Vec<u32>,
    /// Slot of each row in the pool: page * PAGE_TOKENS + place.
    pub slots: Vec<u32>,
    /// Which rows belong together, and their pages.
    pub sequences: Vec<SequenceView>,
    /// The block tables, one after the other.
    pub pages: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// What becomes of the logits on a GPU, where they stay; rows are those of `logit_rows`. What the processor reads is left out.
    pub choose: Vec<Block>,
}

/// What a forward pass gives.
pub struct Forward {
    /// `[logit_rows, hidden]`, final norm applied; `None` if no logits are wanted, and of a step that a GPU ran as a graph.
    pub hidden: Option<Tensor>,
    /// What came of [`Batch::choose`], on a GPU.
    pub chosen: Option<Chosen>,
}

/// Packed sequences for training: no pages, no cache.
#[derive(Default)]
pub struct PackedBatch {
    /// Where each row's embedding comes from.
    pub inputs: Vec<RowSource>,
    /// Position of each row, prefix counted.
    pub positions: Vec<u32>,
    /// Which rows attend to which; rows of K and V are the stored prefixes, then these rows.
    pub sequences: Vec<PackedSequence>,
    /// Rows whose hidden states are wanted, in the order of what is to be learnt from them; one may come again.
    pub wanted: Vec<u32>,
}

/// Rows of one sequence to add to a batch.
pub struct Rows<'a> {
    /// The rows' tokens; soft rows count from the sequence's first soft row.
    pub inputs: &'a [RowSource],
    /// `[n, hidden]` of this sequence.
    pub soft: &'a [f32],
    /// Own index of the first row.
    pub first: usize,
    /// Positions before own index 0.
    pub prefix_len: usize,
    /// Pages of the prefix.
    pub prefix_pages: &'a [PageId],
    /// Own pages, those of these rows included.
    pub own_pages: &'a [PageId],
    /// Rows (0 is the first of `inputs`) whose hidden states are wanted, for scores or for a head.
    pub wanted: Range<usize>,
    /// Whether the last row's logits are wanted.
    pub sampled: bool,
}

impl Batch {
    /// Adds a sequence's rows; `hidden` is the width of a soft row.
    pub fn push(&mut self, rows: &Rows<'_>, hidden: usize) {
        let start = self.inputs.len();
        let soft = (self.soft.len() / hidden.max(1)) as u32;
        self.inputs.extend(rows.inputs.iter().map(|row| match *row {
            RowSource::Soft(i) => RowSource::Soft(soft + i),
            token => token,
        }));
        self.soft.extend_from_slice(rows.soft);
        let own = rows.first..rows.first + rows.inputs.len();
        self.positions.extend(own.clone().map(|i| (rows.prefix_len + i) as u32));
        self.slots
            .extend(own.map(|i| rows.own_pages[i / PAGE_TOKENS].0 * PAGE_TOKENS as u32 + (i % PAGE_TOKENS) as u32));
        let mut table = |pages: &[PageId]| {
            let at = self.pages.len();
            self.pages.extend(pages.iter().map(|p| p.0));
            at..self.pages.len()
        };
        let (prefix_pages, own_pages) = (table(rows.prefix_pages), table(rows.own_pages));
        self.sequences.push(SequenceView {
            rows: start..self.inputs.len(),
            first: rows.first,
            prefix_len: rows.prefix_len,
            prefix_pages,
            own_pages,
        });
        let last = rows.sampled.then(|| rows.inputs.len() - 1);
        self.logit_rows.extend(rows.wanted.clone().chain(last).map(|i| (start + i) as u32));
    }
}
