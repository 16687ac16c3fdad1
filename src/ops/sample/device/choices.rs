//! What to choose from rows of logits, as the kernel reads it.
use super::{NONE, number};
use crate::ops::gpu::Plain;
use crate::ops::sample::Filter;
use std::cmp::Reverse;

/// What makes a token less likely the more often it was seen.
#[derive(Clone, Copy, Debug)]
pub struct Penalties {
    /// Divides positive logits and multiplies others, of tokens in the prompt too. 1 changes nothing.
    pub repetition: f32,
    /// Taken off once. 0 changes nothing.
    pub presence: f32,
    /// Taken off for each time. 0 changes nothing.
    pub frequency: f32,
    /// The place of a token that the step before chose: it was seen once more than is known.
    pub pending: Option<u32>,
}

impl Penalties {
    /// Change nothing.
    pub const NONE: Self = Penalties { repetition: 1.0, presence: 0.0, frequency: 0.0, pending: None };
}

/// As the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Choice {
    pub(super) u: f64,
    pub(super) row: u32,
    pub(super) temperature: f32,
    pub(super) top_k: u32,
    pub(super) top_p: f32,
    pub(super) min_p: f32,
    pub(super) repetition: f32,
    pub(super) presence: f32,
    pub(super) frequency: f32,
    pub(super) begin: u32,
    pub(super) end: u32,
    pub(super) pending: u32,
    /// What an f64 in an array wants.
    pub(super) unused: u32,
}
// SAFETY: one f64 and twelve fields of 4 bytes leave no padding, and all of them are numbers.
unsafe impl Plain for Choice {}

/// As the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Change {
    pub(super) id: u32,
    pub(super) count: u32,
}
// SAFETY: two numbers of 4 bytes.
unsafe impl Plain for Change {}

/// The tokens to choose from a block of rows.
#[derive(Default)]
pub struct Choices {
    pub(super) rows: Vec<Choice>,
    pub(super) changes: Vec<Change>,
}

impl Choices {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// One more: from row `row` of the logits, with `u` in [0, 1). `seen` has each token that `penalties` apply to once, and how
    /// often it is in the output, 0 if only in the prompt; `banned` ones are not chosen.
    pub fn push(
        &mut self,
        row: usize,
        filter: &Filter,
        u: f64,
        penalties: &Penalties,
        seen: impl IntoIterator<Item = (u32, u32)>,
        banned: &[u32],
    ) {
        let begin = self.changes.len();
        self.changes.extend(seen.into_iter().map(|(id, count)| Change { id, count: count.min(NONE - 2) }));
        self.changes.extend(banned.iter().map(|id| Change { id: *id, count: NONE }));
        // The kernel takes each id once, and searches by it. A ban outweighs a count.
        self.changes[begin..].sort_unstable_by_key(|c| (c.id, Reverse(c.count)));
        let mut end = begin;
        for i in begin..self.changes.len() {
            if end == begin || self.changes[end - 1].id != self.changes[i].id {
                self.changes[end] = self.changes[i];
                end += 1;
            }
        }
        self.changes.truncate(end);
        let Penalties { repetition, presence, frequency, pending } = *penalties;
        self.rows.push(Choice {
            u,
            row: number(row),
            temperature: filter.temperature,
            top_k: number(filter.top_k),
            top_p: filter.top_p,
            min_p: filter.min_p,
            repetition,
            presence,
            frequency,
            begin: number(begin),
            end: number(end),
            pending: pending.unwrap_or(NONE),
            unused: 0,
        });
    }
}
