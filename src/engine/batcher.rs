//! From a planned step to a ragged batch: which rows, from where, and whose logits are for what.
use super::scheduler::{Scheduler, SequenceId, Step};
use crate::adapter::InputRow;
use crate::model::batch::{Batch, Rows};
use crate::ops::embed::RowSource;

/// What a row of logits is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitUse {
    /// The log-probability of own token `index`.
    Score { id: SequenceId, index: usize },
    /// The next token.
    Sample { id: SequenceId },
}

/// The batch of a step, and the use of each of its `logit_rows`.
pub fn build(step: &Step, scheduler: &Scheduler, hidden: usize) -> (Batch, Vec<LogitUse>) {
    let (mut batch, mut uses) = (Batch::default(), Vec::new());
    let mut inputs = Vec::new();
    for chunk in &step.prefixes {
        let Some(resident) = scheduler.prefixes().get(&chunk.digest) else { continue };
        let (prefix, stored) = (&resident.prefix, resident.prefix.kv_len());
        inputs.clear();
        let rows = &prefix.rows[chunk.rows.start - stored..chunk.rows.end - stored];
        let (mut first_soft, mut end_soft) = (u32::MAX, 0);
        for row in rows {
            if let InputRow::Soft(i) = row {
                (first_soft, end_soft) = (first_soft.min(*i), end_soft.max(i + 1));
            }
        }
        let first_soft = first_soft.min(end_soft);
        inputs.extend(rows.iter().map(|row| match row {
            InputRow::Token(id) => RowSource::Token(*id),
            InputRow::Soft(i) => RowSource::Soft(i - first_soft),
        }));
        // A prefix at work is a sequence without a prefix: its positions are its own.
        batch.push(
            &Rows {
                inputs: &inputs,
                soft: &prefix.soft[first_soft as usize * hidden..end_soft as usize * hidden],
                first: chunk.rows.start,
                prefix_len: 0,
                prefix_pages: &[],
                own_pages: &resident.pages,
                scored: 0..0,
                sampled: false,
            },
            hidden,
        );
    }
    for chunk in &step.sequences {
        let Some(entry) = scheduler.get(chunk.id) else { continue };
        let resident = entry.prefix().and_then(|p| scheduler.prefixes().get(&p.digest));
        inputs.clear();
        inputs.extend(entry.tokens()[chunk.rows.clone()].iter().map(|id| RowSource::Token(*id)));
        let (scored, sampled) = entry.logits(&chunk.rows);
        uses.extend(scored.clone().map(|row| LogitUse::Score { id: chunk.id, index: row + 1 }));
        uses.extend(sampled.then_some(LogitUse::Sample { id: chunk.id }));
        let start = chunk.rows.start;
        batch.push(
            &Rows {
                inputs: &inputs,
                soft: &[],
                first: start,
                prefix_len: resident.map_or(0, |r| r.prefix.len()),
                prefix_pages: resident.map_or(&[], |r| &r.pages),
                own_pages: entry.pages(),
                // An empty range may lie outside the chunk.
                scored: if scored.is_empty() { 0..0 } else { scored.start - start..scored.end - start },
                sampled,
            },
            hidden,
        );
    }
    debug_assert_eq!(batch.logit_rows.len(), uses.len());
    (batch, uses)
}
