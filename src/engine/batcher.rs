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
    /// The class: the hidden row goes to a head of its own.
    Pool { id: SequenceId },
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
        let soft = gather(rows, &prefix.soft, hidden, &mut inputs);
        // A prefix at work is a sequence without a prefix: its positions are its own.
        batch.push(
            &Rows {
                inputs: &inputs,
                soft,
                first: chunk.rows.start,
                prefix_len: 0,
                prefix_pages: &[],
                own_pages: &resident.pages,
                wanted: 0..0,
                sampled: false,
            },
            hidden,
        );
    }
    for chunk in &step.sequences {
        let Some(entry) = scheduler.get(chunk.id) else { continue };
        let resident = entry.prefix().and_then(|p| scheduler.prefixes().get(&p.digest));
        inputs.clear();
        let own = entry.soft().map_or(&[][..], |s| &s.rows);
        let known = chunk.rows.end.min(entry.tokens().len());
        let soft = gather(&entry.tokens()[chunk.rows.start..known], own, hidden, &mut inputs);
        // One step is under way at most, so that one token may be unread.
        inputs.extend(entry.unread().filter(|_| known < chunk.rows.end).map(RowSource::Sampled));
        let (scored, sampled) = entry.logits(&chunk.rows);
        uses.extend(scored.clone().map(|row| LogitUse::Score { id: chunk.id, index: row + 1 }));
        uses.extend(sampled.then_some(LogitUse::Sample { id: chunk.id }));
        let (start, pooled) = (chunk.rows.start, entry.pooled(&chunk.rows));
        uses.extend(pooled.map(|_| LogitUse::Pool { id: chunk.id }));
        // An empty range may lie outside the chunk. A sequence that is classified is not scored.
        let wanted = pooled.map_or(scored.clone(), |row| row..row + 1);
        batch.push(
            &Rows {
                inputs: &inputs,
                soft,
                first: start,
                prefix_len: resident.map_or(0, |r| r.prefix.len()),
                prefix_pages: resident.map_or(&[], |r| &r.pages),
                own_pages: entry.pages(),
                wanted: if wanted.is_empty() { 0..0 } else { wanted.start - start..wanted.end - start },
                sampled,
            },
            hidden,
        );
    }
    debug_assert_eq!(batch.logit_rows.len(), uses.len());
    (batch, uses)
}

/// Appends `rows` to `inputs` and returns the part of `soft` `[n, hidden]` that they point into, renumbered from 0.
fn gather<'a>(rows: &[InputRow], soft: &'a [f32], hidden: usize, inputs: &mut Vec<RowSource>) -> &'a [f32] {
    let used = || rows.iter().filter_map(|row| if let InputRow::Soft(i) = row { Some(*i) } else { None });
    let (first, end) = (used().min().unwrap_or(0), used().max().map_or(0, |i| i + 1));
    inputs.extend(rows.iter().map(|row| match row {
        InputRow::Token(id) => RowSource::Token(*id),
        InputRow::Soft(i) => RowSource::Soft(i - first),
    }));
    &soft[first as usize * hidden..end as usize * hidden]
}
